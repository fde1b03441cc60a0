"""``python -m sw.quantize``; the command itself is :mod:`sw.cli.quantize`."""

import typer

from systole.sw.cli.quantize import main

if __name__ == "__main__":
    typer.run(main)
