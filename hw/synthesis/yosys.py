"""Yosys, in a process of its own: a block's SystemVerilog to cells of a technology."""

from __future__ import annotations

import importlib.metadata
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

RUN = (
    "import sys; from pyosys import libyosys as y; d = y.Design();"
    "[y.run_pass(p, d) for p in sys.argv[1:]]"
)


class ToolError(Exception):
    """A tool is missing or failed; the message is a sentence."""


def version(package: str) -> str:
    """The version of an installed package. Raises :class:`ToolError` without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise ToolError(
            f"{package} is not installed; pip install 'systole[synth]' brings it"
        ) from None


def call(command: Sequence[str], directory: Path, log: str, name: str) -> float:
    """Run a tool in ``directory``; what it prints goes to the file ``log`` there.

    Returns the processor time it took, in seconds. Raises :class:`ToolError`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with open(directory / log, "w") as f:
        status = subprocess.run(command, cwd=directory, stdout=f, stderr=f).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if status:
        text = (directory / log).read_text().strip()
        raise ToolError(f"{name} failed: {text[-500:]}")
    return round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)


def run(passes: Sequence[str], directory: Path, log: str) -> float:
    """Run commands of Yosys; otherwise like :func:`call`."""
    version("pyosys")
    return call([sys.executable, "-c", RUN, *passes], directory, log, "yosys")


def read_all(directory: Path) -> list[str]:
    """Commands that read all SystemVerilog of a folder."""
    return [f"read_verilog -sv {path.name}" for path in sorted(directory.glob("*.sv"))]
