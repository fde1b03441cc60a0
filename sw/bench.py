"""``python -m sw.bench``; the command itself is :mod:`sw.cli.bench`."""

from systole.sw.cli.bench import main
from systole.sw.cli.common import run_command

if __name__ == "__main__":
    run_command(main)
