"""``python -m sw.bench``; the command itself is :mod:`sw.cli.bench`."""

from systole.sw.cli.start import start_command

if __name__ == "__main__":
    start_command("bench")
