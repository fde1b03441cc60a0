"""``python -m sw.run``; the command itself is :mod:`sw.cli.run`."""

from systole.sw.cli.interrupt import run_command

if __name__ == "__main__":
    run_command("systole.sw.cli.run")
