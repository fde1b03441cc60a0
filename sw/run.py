"""``python -m sw.run``; the command itself is :mod:`sw.cli.run`."""

from systole.sw.cli.start import start_command

if __name__ == "__main__":
    start_command("run")
