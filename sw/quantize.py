"""``python -m sw.quantize``; the command itself is :mod:`sw.cli.quantize`."""

from systole.sw.cli.interrupt import run_command

if __name__ == "__main__":
    run_command("systole.sw.cli.quantize")
