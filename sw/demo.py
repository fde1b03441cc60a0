"""``python -m sw.demo``; the command itself is :mod:`sw.cli.demo`."""

from systole.sw.cli.start import start_command

if __name__ == "__main__":
    start_command("demo")
