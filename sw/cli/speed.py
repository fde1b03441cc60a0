"""How fast the simulation runs, what the array alone would do, and what clocking it from Python
would cost.

python -m systole.sw.cli.speed [--rows R --cols C]

Runs one program (a matrix product) on the same RTL twice in one go: with the clock in the
testbench, as everything here does, and clocked from Python (one coroutine toggles the clock, one
counts its edges); then the systolic array with nothing around it. Prints all rates."""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import typer

from systole.isa import Config
from systole.sim.build import build_array
from systole.sim.device import RtlDevice
from systole.sw.cli.common import (
    ColsOption,
    RowsOption,
    choose_config,
    one_line_errors,
)
from systole.sw.cli.start import start_command
from systole.sw.compiler import compile_graph
from systole.sw.frontend.load import load as load_model
from systole.sw.runtime.driver import Driver
from systole.sw.runtime.execute import execute, load, memory_needed
from systole.sw.zoo import build


def rate(config: Config, size: int, *, python_clock: bool) -> tuple[int, float]:
    """Cycles of a product of square matrices, and simulated cycles per second."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gemm.onnx"
        onnx.save(build("gemm", m=size, k=size, n=size), path)
        graph = load_model(path)
    program = compile_graph(graph, config)
    memory = -(-memory_needed(program) // 4096) * 4096
    inputs = {
        p.tensor: np.random.default_rng(0)
        .integers(-128, 128, graph.tensors[p.tensor].shape)
        .astype(np.int8)
        for p in graph.inputs
    }
    with RtlDevice(config, memory_bytes=memory, python_clock=python_clock) as device:
        driver = Driver(device)
        load(driver, program)
        run = execute(driver, program, inputs, trace=False)
    return run.cycles, run.cycles / run.seconds


def array_rate(config: Config, cycles: int) -> float:
    """Simulated cycles per second of the array alone, given a vector in every cycle."""
    command = build_array(config)
    start = time.perf_counter()
    subprocess.run([*command, f"+cycles={cycles}"], check=True, capture_output=True)
    return cycles / (time.perf_counter() - start)


def main(
    rows: RowsOption = None,
    cols: ColsOption = None,
    size: Annotated[int, typer.Option(min=1, help="rows and columns of the matrices")] = 384,
) -> None:
    """Measure the simulation rate with the clock in the testbench and in Python."""
    with one_line_errors():
        config = choose_config(rows, cols, None)
        cycles, fast = rate(config, size, python_clock=False)
        same, slow = rate(config, size, python_clock=True)
        assert cycles == same, f"{cycles} cycles and {same} cycles"
        alone = array_rate(config, cycles)
    print(
        f"{config.rows}x{config.cols}, {cycles:,} cycles: clock in the testbench {fast:,.0f} "
        f"cycles/s, clock from Python {slow:,.0f} cycles/s, ratio {fast / slow:.1f}; the array "
        f"alone {alone:,.0f} cycles/s, {100 * fast / alone:.0f} % of it reached"
    )


if __name__ == "__main__":
    start_command("speed")
