"""``python -m sw.quantize``; the command itself is :mod:`sw.cli.quantize`."""

from systole.sw.cli.start import start_command

if __name__ == "__main__":
    start_command("quantize")
