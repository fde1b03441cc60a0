"""``python -m sw.diff``; the command itself is :mod:`sw.cli.diff`."""

from systole.sw.cli.start import start_command

if __name__ == "__main__":
    start_command("diff")
