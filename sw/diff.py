"""``python -m sw.diff``; the command itself is :mod:`sw.cli.diff`."""

import typer

from systole.sw.cli.diff import main

if __name__ == "__main__":
    typer.run(main)
