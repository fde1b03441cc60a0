"""Runs the commands of a documentation page, so that what it shows is what they print.

python docs/pages.py            # run them, and put what they print into the pages
python docs/pages.py --check    # run them, and exit 1 if a page shows anything else

In a page, a ``python`` block with a title is a file of that name, an ``sh`` block is run by bash,
and a ``text`` block right behind an ``sh`` block is what that prints. Everything runs in a scratch
folder that stands for the checkout. Times, and other numbers with a decimal point, may differ.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
PAGES = (ROOT / "README.md", FOLDER / "ten-minutes.md")

BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
VOLATILE = re.compile(r"[\d,]+\.\d+|[\d,]+(?= cycles/s)|(?<=host us )[\d,]+")
"""Numbers that depend on the machine: times, speeds, and floating point results."""


def run(commands: str, folder: Path) -> str:
    """What bash prints for ``commands``. Raises ``CalledProcessError`` if one of them fails."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        **{"COLUMNS": "100", "TERM": "dumb"},
    }
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", commands],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, commands, done.stdout)
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())


def executed(page: str, folder: Path) -> str:
    """The page with what its commands print now, run in ``folder`` in their order."""
    out, end, printed = [], 0, None
    for block in BLOCK.finditer(page):
        language, title, body = block.groups()
        between = page[end : block.start()]
        out.append(between)
        if language == "text" and printed is not None and not between.strip():
            out.append(f"```text\n{printed}```\n")
        else:
            out.append(block.group())
        printed = None
        if language == "sh":
            printed = run(body, folder)
        elif language == "python" and title:
            path = folder / title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(body, encoding="utf-8")
        end = block.end()
    return "".join((*out, page[end:]))


def comparable(page: str) -> str:
    """The page without what differs from machine to machine; the width of columns follows."""
    return re.sub(r"[ ─━]+", " ", VOLATILE.sub("0.0", page))


def main(check: bool) -> int:
    status = 0
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as folder:
            now = executed(page, Path(folder))
        if not check:
            path.write_text(now, encoding="utf-8")
        elif comparable(now) != comparable(page):
            print(f"{path} is out of date: run python docs/pages.py", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
