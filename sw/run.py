"""``python -m sw.run``; the command itself is :mod:`sw.cli.run`."""

from systole.sw.cli.common import run_command
from systole.sw.cli.run import main

if __name__ == "__main__":
    run_command(main)
