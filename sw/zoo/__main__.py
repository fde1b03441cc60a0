"""``python -m systole.sw.zoo``; the command itself is :mod:`sw.cli.zoo`."""

from systole.sw.cli.common import run_command
from systole.sw.cli.zoo import main

if __name__ == "__main__":
    run_command(main)
