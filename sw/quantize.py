"""``python -m sw.quantize``; the command itself is :mod:`sw.cli.quantize`."""

from systole.sw.cli.common import run_command
from systole.sw.cli.quantize import main

if __name__ == "__main__":
    run_command(main)
