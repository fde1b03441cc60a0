"""``python -m systole``: the command line, the same as the command ``systole``."""

from systole.sw.cli.start import start_all

if __name__ == "__main__":
    start_all()
