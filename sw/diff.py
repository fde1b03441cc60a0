"""``python -m sw.diff``; the command itself is :mod:`sw.cli.diff`."""

from systole.sw.cli.common import run_command
from systole.sw.cli.diff import main

if __name__ == "__main__":
    run_command(main)
