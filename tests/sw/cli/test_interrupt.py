"""Ctrl-C, as a signal to a process of its own: one line, status 130, and nothing is left."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from systole.sw.zoo import digits
from tests.helpers.processes import hear_interrupts

ROOT = Path(__file__).resolve().parents[3]

SLOW_LIBRARY = """
import time
print("reached", flush=True)
time.sleep(60)
"""


def started(*arguments, **environment):
    """A command that runs, its output in pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_interrupts,
    )


@pytest.fixture
def pipe(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path


def check_end(process, sent=signal.SIGINT):
    process.send_signal(sent)
    out, errors = process.communicate(timeout=60)
    if sent == signal.SIGINT:
        assert (process.returncode, errors) == (130, "interrupted\n")
    else:
        assert (process.returncode, errors) == (128 + sent, "")
    return out


@pytest.mark.parametrize(
    "command", ["sw.run", "sw.check", "sw.quantize", "sw.bench", "systole run", "systole zoo"]
)
def test_while_libraries_are_imported(command, tmp_path):
    (tmp_path / "onnx.py").write_text(SLOW_LIBRARY)
    module, *words = command.split()
    process = started(module, *words, "x", PYTHONPATH=str(tmp_path))
    assert process.stdout.readline() == "reached\n"
    assert check_end(process) == ""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_while_a_report_is_written(sent, pipe):
    """Into a pipe that takes a page, while nobody reads it."""
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    process = started("sw.run", digits.MODEL, "--sim", "golden", "--json", pipe)
    assert select.select([reader], [], [], 60)[0]
    assert "accelerator" not in check_end(process, sent)
    os.close(reader)
