"""What ``make run`` shows: the bundled digits model on the simulated RTL.

    python -m sw.demo [--count 100]

A batch of real test digits, one after the other on the same loaded program, gives the accuracy as
the RTL measures it; then one digit's full report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from systole.isa import Config
from systole.sw.cli.run import CLOCK_MHZ, READ_LATENCY, RunOptions, make_console, run_model, show
from systole.sw.compiler import compile_graph
from systole.sw.compiler.partition import partition
from systole.sw.frontend.load import load as load_model
from systole.sw.golden import model as golden
from systole.sw.golden import oracle
from systole.sw.runtime.device import DeviceError
from systole.sw.runtime.driver import Driver
from systole.sw.runtime.execute import execute, load, memory_needed
from systole.sw.session.backends import open_device
from systole.sw.zoo import digits

FOLDER = Path(digits.__file__).parent
SHADES = " .:-=+*#@"


def picture(image: np.ndarray) -> str:
    """An 8x8 digit (any range) in characters."""
    scaled = (image - image.min()) / max(np.ptp(image), 1e-9) * (len(SHADES) - 1)
    return "\n".join("".join(2 * SHADES[int(v)] for v in row) for row in scaled)


def accuracy(count: int, console: Console, progress: Console) -> None:
    """Classify ``count`` test digits on the RTL."""
    config, model = Config(), FOLDER / "digits.onnx"
    graph = load_model(model)
    program = compile_graph(graph, config)
    port, out = graph.inputs[0], graph.outputs[0]
    with np.load(FOLDER / "test.npz") as data:
        images, labels = data["x"][:count], data["y"][:count]
    with progress.status("building the RTL simulator (once per configuration)"):
        device = open_device("verilator", config, memory_bytes=memory_needed(program))
    right = equal = same = cycles = 0
    session = oracle.session(model)
    with device, progress.status("classifying on the RTL"):
        driver = Driver(device)
        load(driver, program)
        for image, label in zip(images, labels):
            x = golden.quantise_input(port, graph.tensors[port.tensor], image[None])
            run = execute(driver, program, {port.tensor: x}, trace=False)
            got = run.tensors[out.tensor]
            equal += np.array_equal(got, golden.run(graph, {port.tensor: x})[out.tensor])
            reference = session.run(None, {port.name: image[None]})[0]
            answer = golden.dequantise_output(out, graph.tensors[out.tensor], got)
            same += answer.argmax() == reference.argmax()
            right += answer.argmax() == label
            cycles += run.cycles
    n = len(labels)
    console.print(
        f"{n} handwritten test digits on the RTL: {right} right ({100 * right / n:.1f} %), "
        f"{equal} bit-exact with the golden model, {same} classified as by onnxruntime, "
        f"{cycles / n:,.0f} cycles each"
    )


def main(
    count: Annotated[int, typer.Option(min=1, help="test digits to classify")] = 100,
) -> None:
    """Classify handwritten digits on the simulated RTL; report one in full."""
    console, progress = make_console(), Console(stderr=True)
    try:
        accuracy(count, console, progress)
        model = FOLDER / "digits.onnx"
        options = RunOptions(Config())
        plan = partition(model, options.config)
        with np.load(FOLDER / "test.npz") as data:
            image, label = data["x"][0], int(data["y"][0])
        console.print(f"one of them, a {label}:\n{picture(image[0])}", highlight=False)
        arrays = {plan.inputs.inputs[0].name: image[None]}
        report = run_model(plan, arrays, options, progress)
    except DeviceError as e:
        progress.print(f"error: {e}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    show(report, console, CLOCK_MHZ, READ_LATENCY)
    if report.golden_mismatches:
        raise typer.Exit(1)
