"""What ``make run`` shows: the bundled digits model on the simulated RTL.

    python -m sw.demo [--count 100]

A batch of real test digits, one after the other on the same loaded program, gives the accuracy as
the RTL measures it; then one digit's full report. The same digits by a vision transformer follow,
on the golden model and the command-level simulator: an RTL simulator with row operations would have
to be built first."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from systole import api
from systole.isa import Config
from systole.sw.cli.common import (
    MISMATCH,
    one_line_errors,
    output_console,
    progress_console,
    shown_progress,
)
from systole.sw.cli.show_run import show
from systole.sw.golden import model as golden
from systole.sw.golden import oracle
from systole.sw.runtime.driver import Driver
from systole.sw.runtime.execute import execute, load, memory_needed
from systole.sw.session.backends import open_device
from systole.sw.session.report import compiled_segments
from systole.sw.zoo import digits

SHADES = " .:-=+*#@"


def picture(image: np.ndarray) -> str:
    """An 8x8 digit (any range) in characters."""
    scaled = (image - image.min()) / max(np.ptp(image), 1e-9) * (len(SHADES) - 1)
    return "\n".join("".join(2 * SHADES[int(v)] for v in row) for row in scaled)


def accuracy(compiled: api.CompiledModel, count: int, console: Console, progress: Console) -> None:
    """Classify ``count`` test digits on the RTL, on one loaded program, and print how many are
    right."""
    segment, program = compiled_segments(compiled.partition)[0]
    graph = segment.graph
    port, out = graph.inputs[0], graph.outputs[0]
    with np.load(digits.TEST_SET) as data:
        images, labels = data["x"][:count], data["y"][:count]
    memory_bytes = memory_needed(program)
    with progress.status("building the RTL simulator (once per configuration)"):
        device = open_device("verilator", compiled.config, memory_bytes=memory_bytes)
    right = equal = same = cycles = 0
    session = oracle.session(digits.MODEL)
    with device, progress.status("classifying on the RTL"):
        driver = Driver(device)
        load(driver, program)
        for image, label in zip(images, labels):
            x = golden.quantise_input(port, graph.tensors[port.tensor], image[None])
            run = execute(driver, program, {port.tensor: x}, trace=False)
            result = run.tensors[out.tensor]
            equal += np.array_equal(result, golden.run(graph, {port.tensor: x})[out.tensor])
            reference = np.asarray(session.run(None, {port.name: image[None]})[0])
            answer = golden.dequantise_output(out, graph.tensors[out.tensor], result)
            same += answer.argmax() == reference.argmax()
            right += answer.argmax() == label
            cycles += run.cycles
    n = len(labels)
    console.print(
        f"{n} handwritten test digits on the RTL: {right} right ({100 * right / n:.1f} %), "
        f"{equal} bit-exact with the golden model, {same} classified as by onnxruntime, "
        f"{cycles / n:,.0f} cycles each"
    )


def transformer(count: int, console: Console, progress: Console) -> int:
    """Classify ``count`` test digits by the vision transformer, run one command by command, and
    print both in a sentence. Returns how many of its layers differ from the golden model."""
    config = Config(row_ops=True, zero_points=True)
    compiled = api.compile(digits.TRANSFORMER, config)
    with np.load(digits.TEST_SET) as data:
        images, labels = data["x"][:count], data["y"][:count]
    with progress.status("classifying by the vision transformer"):
        found = api.accuracy(compiled, images, labels)
        report, _ = api.run(compiled, images[0], simulator="commands")
    console.print(
        f"the same digits by a vision transformer (row_ops, zero_points): "
        f"{round(found.accelerator * len(labels))} right by the golden model, "
        f"{round(found.same_class * len(labels))} classified as by onnxruntime; "
        f"{report.model_macs - report.host_macs:,} of {report.model_macs:,} MACs on the "
        "accelerator, "
        f"{report.predicted_cycles:,} cycles predicted, {report.golden_mismatches} differences "
        "on the command simulator",
        soft_wrap=True,
    )
    return report.golden_mismatches


def main(
    count: Annotated[int, typer.Option(min=1, help="test digits to classify")] = 100,
) -> None:
    """Classify handwritten digits on the simulated RTL; report one in full."""
    console, progress = output_console(), progress_console()
    with one_line_errors():
        compiled = api.compile(digits.MODEL)
        accuracy(compiled, count, console, progress)
        with np.load(digits.TEST_SET) as data:
            image, label = data["x"][0], int(data["y"][0])
        console.print(f"one of them, a {label}:\n{picture(image[0])}", highlight=False)
        report, _ = api.run(compiled, image, progress=shown_progress(progress))
    show(report, console, compiled.read_latency)
    with one_line_errors():
        mismatches = transformer(count, console, progress)
    if report.golden_mismatches or mismatches:
        raise typer.Exit(MISMATCH)
