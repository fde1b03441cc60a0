"""``python -m sw.silicon``; the command itself is :mod:`sw.cli.silicon`."""

from systole.sw.cli.common import run_command
from systole.sw.cli.silicon import main

if __name__ == "__main__":
    run_command(main)
