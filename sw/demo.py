"""``python -m sw.demo``; the command itself is :mod:`sw.cli.demo`."""

import typer

from systole.sw.cli.demo import main

if __name__ == "__main__":
    typer.run(main)
