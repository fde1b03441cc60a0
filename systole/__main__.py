"""``python -m systole``: the command line, the same as the command ``systole``."""

from systole.sw.cli.main import app

if __name__ == "__main__":
    app(prog_name="systole")
