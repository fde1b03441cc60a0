"""``python -m sw.bench``; the command itself is :mod:`sw.cli.bench`."""

from systole.sw.cli.interrupt import run_command

if __name__ == "__main__":
    run_command("systole.sw.cli.bench")
