"""``python -m sw.demo``; the command itself is :mod:`sw.cli.demo`."""

from systole.sw.cli.common import run_command
from systole.sw.cli.demo import main

if __name__ == "__main__":
    run_command(main)
