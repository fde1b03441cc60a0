"""A float ONNX model to int8, ready for :mod:`sw.run`.

python -m sw.quantize FLOAT.onnx --calibrate FOLDER|X.npz -o INT8.onnx
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import typer
from rich.console import Console
from rich.table import Table

from systole.sw.files import write_atomically
from systole.sw.frontend.inputs import InputError
from systole.sw.ir.graph import ModelError
from systole.sw.quantisation.calibrate import Feeds
from systole.sw.quantisation.measure import LayerNoise, classes, layer_noise
from systole.sw.quantisation.pipeline import QuantisationOptions, quantise, quantise_model
from systole.sw.quantisation.prepare import input_shapes, input_types, prepare
from systole.sw.quantisation.samples import (
    Chosen,
    Preprocessing,
    check_labels,
    read_labels,
    read_samples,
)

__all__ = ["QuantisationOptions", "QuantisationReport", "main", "quantise_model"]

SAMPLES = 200
NOISE_SAMPLES = 16
"""Samples over which the layers' noise is measured."""


@dataclass
class QuantisationReport:
    """What ``--json`` writes. Accuracies: fraction of the labelled samples; null without labels."""

    model: str
    output: str
    calibration_samples: int
    input_ranges: dict[str, tuple[float, float]]
    """After preprocessing, over the calibration samples."""
    float_bytes: int = 0
    int8_bytes: int = 0
    labelled_samples: int = 0
    float_accuracy: float | None = None
    int8_accuracy: float | None = None
    agreement: float | None = None
    """Samples that both models put into the same class."""
    layers: list[LayerNoise] = field(default_factory=list)
    """The noisiest first; ``snr_db`` null: no noise at all."""


def measure(
    report: QuantisationReport,
    model: onnx.ModelProto,
    quantised: onnx.ModelProto,
    samples: Sequence[Feeds],
    labels: np.ndarray | None,
) -> None:
    """Fills in noise and accuracy."""
    report.layers = layer_noise(model, quantised, Chosen(samples, NOISE_SAMPLES))
    if labels is not None:
        before, after = classes(model, samples), classes(quantised, samples)
        report.labelled_samples = len(labels)
        report.float_accuracy = float((before == labels).mean())
        report.int8_accuracy = float((after == labels).mean())
        report.agreement = float((before == after).mean())


def show(report: QuantisationReport, console: Console, rows: int) -> None:
    """Print a report for people: the ``rows`` noisiest layers."""
    table = Table(title=f"{report.model}: noise of quantisation, the worst layers first")
    for name in ("layer", "operator", "tensor"):
        table.add_column(name, overflow="fold")
    table.add_column("SNR, dB", justify="right")
    for row in report.layers[:rows]:
        ratio = "none in float" if row.snr_db is None else f"{row.snr_db:.1f}"
        table.add_row(row.layer, row.op_type, row.tensor, ratio)
    if len(report.layers) > rows:
        table.caption = f"{len(report.layers) - rows} better ones not shown"
    console.print(table)
    for name, (low, high) in report.input_ranges.items():
        console.print(
            f"input {name}: {low:.4g} to {high:.4g} over {report.calibration_samples} samples",
            markup=False,
        )
    if report.float_accuracy is not None:
        console.print(
            f"accuracy on {report.labelled_samples} samples: float "
            f"{100 * report.float_accuracy:.2f} %, int8 {100 * report.int8_accuracy:.2f} %; "
            f"same class {100 * report.agreement:.2f} %"
        )
    console.print(
        f"{report.output}: {report.int8_bytes:,} bytes (float: {report.float_bytes:,})",
        markup=False,
    )


def parse_dims(texts: Sequence[str]) -> dict[str, int]:
    dims = {}
    for text in texts:
        name, equals, number = text.rpartition("=")
        if not (equals and name and number.isdecimal()):
            raise InputError(f"--dim {text}: must be NAME=NUMBER")
        dims[name] = int(number)
    return dims


def parse_numbers(option: str, text: str) -> tuple[float, ...]:
    """Comma-separated; each a number or a fraction such as 1/255."""
    try:
        return tuple(float(Fraction(part.strip())) for part in text.split(","))
    except (ValueError, ZeroDivisionError):
        raise InputError(f"{option} {text}: must be numbers separated by commas") from None


def parse_size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise InputError(f"--size {text}: must be HEIGHTxWIDTH")
    return int(height), int(width)


def main(
    model: Annotated[Path, typer.Argument(help="float32 ONNX model")],
    calibrate: Annotated[
        Path, typer.Option(help="folder of pictures, or .npz/.npy with samples along axis 0")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="the int8 model")],
    method: Annotated[str, typer.Option(help="minmax | entropy | percentile")] = "minmax",
    percentile: Annotated[float, typer.Option(help="for --method percentile")] = 99.999,
    samples: Annotated[
        int, typer.Option(min=1, help="to calibrate with, spread over all")
    ] = SAMPLES,
    labels: Annotated[
        Path | None, typer.Option(help=".npy with a class number per sample; or y in the .npz")
    ] = None,
    dim: Annotated[
        list[str] | None, typer.Option(help="bind an open dimension: NAME=N or INPUT:AXIS=N")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="node or operator type that stays float")
    ] = None,
    equalise: Annotated[
        bool, typer.Option("--equalise", help="balance channels between layers")
    ] = False,
    bias_correction: Annotated[
        bool, typer.Option("--bias-correction", help="take mean errors off the biases")
    ] = False,
    mean: Annotated[
        str, typer.Option(help="per channel; a value becomes (value * scale - mean) / std")
    ] = "0",
    std: Annotated[str, typer.Option(help="per channel")] = "1",
    scale: Annotated[
        str | None, typer.Option(help="default: 1/255 for pictures, 1 for arrays")
    ] = None,
    layout: Annotated[str | None, typer.Option(help="nchw | nhwc; default: by shape")] = None,
    size: Annotated[str | None, typer.Option(help="of pictures, HxW; default: the model's")] = None,
    channels: Annotated[str | None, typer.Option(help="rgb | bgr | gray")] = None,
    rows: Annotated[int, typer.Option(min=0, help="layers to print")] = 12,
    json_file: Annotated[Path | None, typer.Option("--json", help="report as JSON")] = None,
) -> None:
    """Quantise a float ONNX model to int8 (QDQ, weights per channel) and report what it cost."""
    console, progress = Console(), Console(stderr=True)
    console = console if console.is_terminal else Console(width=150)
    try:
        for path in (output, json_file):
            if path is not None and not path.absolute().parent.is_dir():
                raise InputError(f"output {path}: its folder does not exist")
        options = QuantisationOptions(
            method, percentile, exclude or (), equalise, bias_correction, parse_dims(dim or ())
        )
        preprocessing = Preprocessing(
            parse_numbers("--mean", mean),
            parse_numbers("--std", std),
            None if scale is None else parse_numbers("--scale", scale)[0],
            layout,
            None if size is None else parse_size(size),
            channels,
        )
        with progress.status("preparing the model"):
            prepared = prepare(model, options.dims, preprocessing.size)
        everything, truth = read_samples(
            calibrate, input_shapes(prepared), preprocessing, input_types(prepared)
        )
        if labels is not None:
            truth = read_labels(labels)
        if truth is not None:
            truth = check_labels(truth, len(everything))
        chosen = Chosen(everything, samples)
        with progress.status(f"quantising on {len(chosen)} samples"):
            prepared, quantised = quantise(prepared, chosen, options)
        report = QuantisationReport(model.name, str(output), len(chosen), _input_ranges(chosen))
        with progress.status("measuring"):
            measure(report, prepared, quantised, everything, truth)
    except (ModelError, InputError) as e:
        progress.print(f"error: {e}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    content = quantised.SerializeToString()
    write_atomically(output, content)
    report.float_bytes, report.int8_bytes = model.stat().st_size, len(content)
    if json_file is not None:
        write_atomically(json_file, _to_json(report).encode())
    show(report, console, rows)


def _input_ranges(samples: Sequence[Feeds]) -> dict[str, tuple[float, float]]:
    ranges: dict[str, tuple[float, float]] = {}
    for feeds in samples:
        for name, array in feeds.items():
            low, high = ranges.get(name, (math.inf, -math.inf))
            ranges[name] = (min(low, float(array.min())), max(high, float(array.max())))
    return ranges


def _to_json(report: QuantisationReport) -> str:
    rows = [
        replace(r, snr_db=None if r.snr_db is not None and math.isinf(r.snr_db) else r.snr_db)
        for r in report.layers
    ]
    return json.dumps(asdict(replace(report, layers=rows)), indent=1) + "\n"
