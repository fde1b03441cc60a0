"""``python -m sw.check``; the command itself is :mod:`sw.cli.check`."""

from systole.sw.cli.start import start_command

if __name__ == "__main__":
    start_command("check")
