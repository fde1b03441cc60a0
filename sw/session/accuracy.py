"""Accuracy of a model on labelled samples: by the accelerator, by onnxruntime, and in float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from systole.sw.compiler.partition import AcceleratorSegment, Partition
from systole.sw.frontend.inputs import InputError
from systole.sw.golden import oracle
from systole.sw.progress import Progress, silent, step
from systole.sw.runtime.driver import Driver
from systole.sw.runtime.execute import execute, load, memory_needed
from systole.sw.session.host import KeptHost
from systole.sw.session.report import programs_of
from systole.sw.session.run import DEVICELESS, RunOptions, open_simulator
from systole.sw.session.segments import Accelerator, follow, golden_accelerator


@dataclass(frozen=True)
class Accuracy:
    """Shares of the samples, 0 to 1, whose class is right or the same."""

    simulator: str
    """What stood for the accelerator; the golden model where no program runs."""
    samples: int
    accelerator: float
    onnxruntime: float
    """By onnxruntime's integer kernels."""
    same_class: float
    """Samples that accelerator and onnxruntime put into the same class."""
    float_model: float | None = None
    """By the float model, if there is one."""


def measure(
    plan: Partition,
    samples: Sequence[Mapping[str, np.ndarray]],
    labels: np.ndarray,
    *,
    options: RunOptions,
    float_model: Path | None = None,
    progress: Progress = silent,
) -> Accuracy:
    """The accuracy of a compiled model. Raises :class:`InputError` if its first output is no number
    per class, :class:`ModelError` and :class:`DeviceError` as a run does."""
    kernels = oracle.session(plan.path)
    real = None if float_model is None else oracle.session(float_model)
    name, on_host = kernels.get_outputs()[0].name, KeptHost()
    rows = []
    with ExitStack() as stack:
        accelerator = _accelerator(plan, options, stack)
        share = stack.enter_context(step(progress, f"classifying {len(samples)} samples"))
        for i, feeds in enumerate(samples):
            share(i / len(samples))
            values = follow(plan, feeds, accelerator, on_host).values[name]
            outputs = [values, kernels.run([name], dict(feeds))[0]]
            if real is not None:
                first = real.get_outputs()[0].name
                outputs.append(real.run([first], dict(feeds))[0])
            rows.append([_class(name, np.asarray(output)) for output in outputs])
    found = np.array(rows)
    right = [float(share) for share in (found == labels[:, None]).mean(axis=0)]
    return Accuracy(
        simulator="golden" if options.simulator in DEVICELESS else options.simulator,
        samples=len(labels),
        accelerator=right[0],
        onnxruntime=right[1],
        same_class=float((found[:, 0] == found[:, 1]).mean()),
        float_model=right[2] if real is not None else None,
    )


def _class(name: str, output: np.ndarray) -> int:
    if output.size != max(output.shape, default=1) or output.size < 2:
        raise InputError(
            f"accuracy: output {name} of shape {output.shape} is not one number per class"
        )
    return int(output.argmax())


def _accelerator(plan: Partition, options: RunOptions, stack: ExitStack) -> Accelerator:
    """What runs the accelerator's segments; a device is open as long as ``stack``."""
    if options.simulator in DEVICELESS:
        return golden_accelerator
    needed = max(memory_needed(program) for program in programs_of(plan))
    driver = Driver(stack.enter_context(open_simulator(options, -(-needed // 4096) * 4096)))
    loaded: list[AcceleratorSegment] = []

    def run(segment: AcceleratorSegment, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert segment.program is not None, "programs_of has seen to that"
        if not loaded or loaded[0] is not segment:
            load(driver, segment.program)
            loaded[:] = [segment]
        return execute(driver, segment.program, inputs, trace=False).tensors

    return run
