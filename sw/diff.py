"""``python -m sw.diff``; the command itself is :mod:`sw.cli.diff`."""

from systole.sw.cli.interrupt import run_command

if __name__ == "__main__":
    run_command("systole.sw.cli.diff")
