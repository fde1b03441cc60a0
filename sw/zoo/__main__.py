"""``python -m systole.sw.zoo``; the command itself is :mod:`sw.cli.zoo`."""

from systole.sw.cli.interrupt import run_command

if __name__ == "__main__":
    run_command("systole.sw.cli.zoo")
