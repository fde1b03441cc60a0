"""``python -m sw.silicon``; the command itself is :mod:`sw.cli.silicon`."""

from systole.sw.cli.start import start_command

if __name__ == "__main__":
    start_command("silicon")
