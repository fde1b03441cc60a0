"""Ctrl-C ends a command with one line and status 130."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from systole.sw.zoo import digits
from tests.helpers.sources import ROOT

PATIENCE = 120
"""Seconds to wait for a command, on a busy machine."""


def wait_for_reader(fifo: Path, process: subprocess.Popen[str]) -> int:
    """A descriptor to write to ``fifo`` with, once the process reads it."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        try:
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads it yet
            time.sleep(0.02)
    process.kill()
    pytest.fail(f"the command has not read its input: {process.communicate()}")


@pytest.mark.parametrize("command", ["sw.run", "systole run"])
def test_one_line_and_nothing_written(command, tmp_path):
    fifo, output = tmp_path / "in.npy", tmp_path / "out.json"
    os.mkfifo(fifo)
    process = subprocess.Popen(
        [sys.executable, "-m", *command.split(), digits.MODEL]
        + ["--sim", "golden", "--input", fifo, "--json", output],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    writer = wait_for_reader(fifo, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    os.close(writer)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")
    assert [p.name for p in tmp_path.iterdir()] == ["in.npy"]
