"""``python -m sw.check``; the command itself is :mod:`sw.cli.check`."""

import typer

from systole.sw.cli.check import main

if __name__ == "__main__":
    typer.run(main)
