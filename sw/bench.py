"""``python -m sw.bench``; the command itself is :mod:`sw.cli.bench`."""

import typer

from systole.sw.cli.bench import main

if __name__ == "__main__":
    typer.run(main)
