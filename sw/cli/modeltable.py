"""Published, trained models through onnxruntime, golden model, program and RTL, as a table.

    python -m systole.sw.cli.modeltable --models FOLDER -o docs/models.md [--rtl] [--samples N]

The folder is laid out as ``sw.zoo.recipes`` says, per model with its data and preparation. Float
models are quantised first, as ``systole quantize`` does, with samples that are not measured
where there are enough. Exit status: 0 written, 1 written but a program or the RTL differs from the
golden model somewhere, 2 bad input (one line on stderr).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import typer

from systole.isa import Config
from systole.sw.cli.common import (
    MISMATCH,
    check_outputs,
    one_line_errors,
    progress_console,
)
from systole.sw.cli.start import start_command
from systole.sw.compiler.partition import Partition, partition
from systole.sw.files import write_atomically
from systole.sw.frontend.dataflow import CONVERSIONS
from systole.sw.frontend.inputs import InputError
from systole.sw.golden import model as golden
from systole.sw.golden import oracle
from systole.sw.ir.graph import ModelError, Port, Tensor
from systole.sw.quantisation.pipeline import quantise_model
from systole.sw.quantisation.prepare import prepare as fix_shapes
from systole.sw.session.diff import Exposed
from systole.sw.session.run import RunOptions, run_model
from systole.sw.session.segments import follow
from systole.sw.zoo.recipes import RECIPES, Recipe

CALIBRATION = 50
"""Samples that a float model is quantised with, from the end of its data."""
RTL = 2
"""Samples on the RTL, per model."""
Arrays = dict[str, np.ndarray]


@dataclass
class ModelRow:
    """What was measured of one model. Scores: the recipe's metric over the same samples; None
    where there is no such model or metric."""

    recipe: Recipe
    refusal: str = ""
    """Why nothing could be measured."""
    samples: int = 0
    elements: int = 0
    """Elements that the accelerator hands out, over all samples."""
    equal: int = 0
    largest: int = 0
    """Difference from onnxruntime, in quantised units."""
    scores: dict[str, float | None] = field(default_factory=dict)
    """``float`` and ``int8`` by onnxruntime, ``golden``."""
    same_class: int | None = None
    """Samples that the golden path puts where onnxruntime's int8 does."""
    mismatches: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By simulator: samples run, elements over all layers that differ from the golden model."""
    cycles: int | None = None
    """Cycles of the first sample on the RTL."""
    host: list[tuple[str, str]] = field(default_factory=list)
    """Types of the operators on the host, with the reasons."""


def measure(
    recipe: Recipe, folder: Path, samples: int, config: Config, *, commands: int = 0, rtl: int = 0
) -> ModelRow:
    """Measure one model: ``samples`` by the golden model, of these the first ``commands`` by the
    command-level simulator and ``rtl`` on Verilator."""
    row = ModelRow(recipe)
    source = folder / recipe.file
    stored, truth = recipe.samples(folder)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            path = _quantised(recipe, source, stored, Path(scratch)) if recipe.is_float else source
            plan = partition(path, config)
        except ModelError as e:
            row.refusal = str(e)
            return row
        row.host = [
            (p.op_type, p.rule) for p in plan.placements if p.host and p.op_type not in CONVERSIONS
        ]
        chosen = stored[:samples]
        inputs = [_input(recipe, sample, plan) for sample in chosen]
        row.samples = len(inputs)
        truth = None if truth is None else truth[:samples]
        ours, theirs = _agreement(row, plan, inputs)
        row.scores = {
            "int8": _score(recipe, chosen, theirs, truth),
            "golden": _score(recipe, chosen, ours, truth),
        }
        if recipe.metric == "accuracy":
            row.same_class = int((_classes(ours) == _classes(theirs)).sum())
        row.scores["float"] = _float_score(recipe, folder, chosen, truth)
        for simulator, count in (("commands", commands), ("verilator", rtl)):
            if count:
                _simulate(row, plan, inputs[:count], RunOptions(config, simulator))
    return row


def _quantised(recipe: Recipe, source: Path, stored: np.ndarray, scratch: Path) -> Path:
    """A float model as int8."""
    (port,) = fix_shapes(source).graph.input
    shape = tuple(d.dim_value for d in port.type.tensor_type.shape.dim)
    samples = [recipe.prepare(s, *_float_port(port.name, shape)) for s in stored[-CALIBRATION:]]
    model = quantise_model(source, {port.name: np.concatenate(samples)})
    path = scratch / source.name
    onnx.save(model, path)
    return path


def _float_port(name: str, shape: tuple[int, ...]) -> tuple[Port, Tensor]:
    """A float model's input; it has no scale."""
    tensor = Tensor(
        name=name,
        shape=(1, int(np.prod(shape)), 1, 1),
        scale=np.float32(1),
        zero=0,
        unsigned=False,
        onnx_shape=shape,
        perm=tuple(range(len(shape))),
    )
    return Port(name, name, "float32"), tensor


def _input(recipe: Recipe, sample: np.ndarray, plan: Partition) -> Arrays:
    (port,) = plan.inputs.inputs
    return {port.name: recipe.prepare(sample, port, plan.inputs.tensors[port.tensor])}


def _agreement(
    row: ModelRow, plan: Partition, inputs: Sequence[Arrays]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Fill in how the accelerator's results compare with onnxruntime's. Returned is the model's
    first output for each sample, by the golden model with the host, and by onnxruntime."""
    ours, theirs = [], []
    exposed = None
    output = oracle.session(plan.path).get_outputs()[0].name
    for arrays in inputs:
        trail = follow(plan, arrays)
        results = trail.handed_out()
        if exposed is None:
            exposed = Exposed(plan.path, results)
        values = exposed.run(arrays)
        for name, (port, tensor, array) in results.items():
            result = oracle.compare(port, tensor, array, values[name])
            row.elements += result.elements
            row.equal += result.equal
            row.largest = max(row.largest, int(result.max_abs_diff or 0))
        ours.append(_real(results, output, trail.values[output]))
        theirs.append(_real(results, output, values[output]))
    return ours, theirs


def _real(results: dict, output: str, array: np.ndarray) -> np.ndarray:
    """An output in real numbers if the accelerator made it; the host's stay as they are."""
    if output not in results:
        return array
    port, tensor, _ = results[output]
    if port.dtype == "float32":
        return array
    real = Port(port.name, port.tensor, "float32")
    return golden.dequantise_output(real, tensor, tensor.from_onnx(array))


def _classes(outputs: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([int(output.argmax()) for output in outputs])


def _score(
    recipe: Recipe,
    samples: np.ndarray,
    outputs: Sequence[np.ndarray],
    truth: np.ndarray | None,
) -> float | None:
    """The recipe's metric, on the samples as stored."""
    if recipe.metric is None:
        return None
    if recipe.metric == "accuracy":
        return float((_classes(outputs) == truth).mean())
    errors = [((x - y) ** 2).mean() for x, y in zip(samples, outputs, strict=True)]
    return float(np.mean(errors))


def _float_score(
    recipe: Recipe, folder: Path, chosen: np.ndarray, truth: np.ndarray | None
) -> float | None:
    """The score of the float model by onnxruntime, on the same samples."""
    if not recipe.is_float:
        twin = next((r for r in RECIPES if r.file == recipe.twin), None)
        if twin is None:
            return None
        stored, _ = twin.samples(folder)
        recipe, chosen = twin, stored[: len(chosen)]
    if recipe.metric is None:
        return None
    session = oracle.session(folder / recipe.file)
    (info,) = session.get_inputs()
    shape = tuple(d if isinstance(d, int) else 1 for d in info.shape)
    port = _float_port(info.name, shape)
    inputs = [{info.name: recipe.prepare(sample, *port)} for sample in chosen]
    outputs = [np.asarray(session.run(None, arrays)[0]) for arrays in inputs]
    return _score(recipe, chosen, outputs, truth)


def _simulate(
    row: ModelRow, plan: Partition, inputs: Sequence[Arrays], options: RunOptions
) -> None:
    """Compare every layer of every sample with the golden model."""
    total = 0
    for arrays in inputs:
        report, _ = run_model(plan, arrays, options, progress_console().status)
        total += report.golden_mismatches
        if row.cycles is None:
            row.cycles = report.cycles
    row.mismatches[options.simulator] = (len(inputs), total)


# The document -----------------------------------------------------------------------------------

HEADER = """# Published models, measured

Written by `make models`. The models were trained by others and are not part of this project.
{config}. Float models were quantised by `systole quantize` (its defaults, the last {calibration}
samples of the data; where not enough are left, they are among the measured ones).

* *equal to onnxruntime*: elements that the accelerator hands out (the model's output, or what goes
  to the host) by the golden model against onnxruntime's int8 kernels on the same samples; largest
  difference in quantised units. An addition may round one element in thousands the other way, by
  one unit, and the layers behind spread it: `systole diff` shows where.
* *float*, *int8*, *Systole*: accuracy on these samples by onnxruntime on the float model, by
  onnxruntime on the int8 model, by the golden model with the host's operators; *same class*:
  samples in which the latter two agree. For the autoencoder the mean squared reconstruction error.
* *commands*, *RTL*: elements over all layers that differ from the golden model / samples run.
* *cycles*: of one sample on the RTL, the accelerator's share.

"""
COLUMNS = (
    "model",
    "samples",
    "equal to onnxruntime",
    "largest",
    "float",
    "int8",
    "Systole",
    "same class",
    "commands",
    "RTL",
    "cycles",
)


def document(rows: Sequence[ModelRow], config: Config) -> str:
    """The rows as Markdown."""
    size = f"Configuration: {config.rows}x{config.cols}, {config.axi_data_bits}-bit AXI"
    lines = [HEADER.format(config=size, calibration=CALIBRATION)]
    lines += [f"| {' | '.join(COLUMNS)} |\n", f"|---|{'---:|' * (len(COLUMNS) - 1)}\n"]
    lines += [f"| {' | '.join(_cells(row))} |\n" for row in rows]
    notes = _notes(rows)
    if notes:
        lines += ["\n## Refused, or run on the host\n\n", *(f"* {note}\n" for note in notes)]
    return "".join(lines)


def _cells(row: ModelRow) -> list[str]:
    name = row.recipe.name
    if row.refusal:
        return [name, "refused", *["-"] * (len(COLUMNS) - 2)]
    scores = [_score_text(row.recipe, row.scores[k]) for k in ("float", "int8", "golden")]
    same = "-" if row.same_class is None else f"{row.same_class}/{row.samples}"
    runs = [
        "{1} / {0}".format(*row.mismatches[s]) if s in row.mismatches else "-"
        for s in ("commands", "verilator")
    ]
    cycles = "-" if row.cycles is None else f"{row.cycles:,}"
    share = f"{100 * row.equal / row.elements:.3f} % of {row.elements:,}"
    return [name, str(row.samples), share, str(int(row.largest)), *scores, same, *runs, cycles]


def _score_text(recipe: Recipe, score: float | None) -> str:
    if score is None:
        return "-"
    return f"{100 * score:.1f} %" if recipe.metric == "accuracy" else f"{score:.3f}"


def _notes(rows: Sequence[ModelRow]) -> list[str]:
    """What does not run on the accelerator, and in which models. The first reason stands for all
    operators of a type in a model."""
    models: dict[str, list[str]] = {}
    for row in rows:
        notes = [f"refused: {row.refusal}"] if row.refusal else []
        for op_type in dict.fromkeys(op for op, _ in row.host):
            reasons = [reason for op, reason in row.host if op == op_type]
            notes.append(f"{len(reasons)} {op_type} on the host: {reasons[0]}")
        for note in notes:
            models.setdefault(note, []).append(row.recipe.name)
    return [f"{', '.join(names)}: {note}" for note, names in models.items()]


def main(
    models: Annotated[Path, typer.Option(help="folder with the models and their data")],
    output: Annotated[Path, typer.Option("--output", "-o", help="the table, Markdown")],
    samples: Annotated[int, typer.Option(min=1, help="by the golden model, per model")] = 100,
    commands: Annotated[
        int, typer.Option(min=0, help="of these by the command-level simulator")
    ] = 3,
    rtl: Annotated[bool, typer.Option("--rtl", help="two of them on the RTL (Verilator)")] = False,
    only: Annotated[list[str] | None, typer.Option(help="names of models; default: all")] = None,
) -> None:
    """Measure the published models and write the table."""
    progress, config = progress_console(), Config()
    rows = []
    with one_line_errors():
        check_outputs(output)
        unknown = set(only or ()) - {r.name for r in RECIPES}
        if unknown:
            raise InputError(f"--only {min(unknown)}: no such model")
        chosen = [r for r in RECIPES if not only or r.name in only]
        missing = [r.file for r in chosen if not (models / r.file).is_file()]
        if missing:
            raise InputError(f"--models {models}: {missing[0]} is not there")
        for recipe in chosen:
            rows.append(
                measure(recipe, models, samples, config, commands=commands, rtl=RTL if rtl else 0)
            )
            progress.print(" | ".join(_cells(rows[-1])), markup=False, soft_wrap=True)
        write_atomically(output, document(rows, config).encode())
    if any(count for row in rows for _, count in row.mismatches.values()):
        raise typer.Exit(MISMATCH)


if __name__ == "__main__":
    start_command("modeltable")
