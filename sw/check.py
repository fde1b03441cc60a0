"""``python -m sw.check``; the command itself is :mod:`sw.cli.check`."""

from systole.sw.cli.check import main
from systole.sw.cli.common import run_command

if __name__ == "__main__":
    run_command(main)
