"""``python -m systole.sw.zoo``; the command itself is :mod:`sw.cli.zoo`."""

from systole.sw.cli.start import start_command

if __name__ == "__main__":
    start_command("zoo")
