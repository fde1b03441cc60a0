"""``python -m sw.run``; the command itself is :mod:`sw.cli.run`."""

import typer

from systole.sw.cli.run import main

if __name__ == "__main__":
    typer.run(main)
