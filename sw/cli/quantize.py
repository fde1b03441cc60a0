"""A float ONNX model to int8, ready for ``systole run``.

systole quantize FLOAT.onnx --calibrate FOLDER|X.npz -o INT8.onnx
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from systole import api
from systole.sw.cli.common import (
    DimOption,
    JsonOption,
    LayoutOption,
    MeanOption,
    StdOption,
    check_outputs,
    one_line_errors,
    output_console,
    parse_dims,
    parse_numbers,
    print_table,
    progress_console,
)
from systole.sw.files import write_atomically
from systole.sw.frontend.inputs import InputError
from systole.sw.quantisation.pipeline import QuantisationOptions
from systole.sw.quantisation.report import QuantisationReport
from systole.sw.quantisation.samples import Preprocessing, read_labels

POOR_STATE_DB = 20
"""Signal to noise of a recurrent operator's state below which the report says so."""


def _ratio(snr_db: float | None) -> str:
    return "none in float" if snr_db is None else f"{snr_db:.1f}"


def _is_poor(kind: str, snr_db: float | None) -> bool:
    return kind != "output" and snr_db is not None and snr_db < POOR_STATE_DB


def show(report: QuantisationReport, console: Console, rows: int) -> None:
    """Print a report for people: the ``rows`` noisiest layers."""
    table = Table(title=f"{escape(report.model)}: quantisation noise, the worst layers first")
    for name in ("layer", "operator", "tensor"):
        table.add_column(name, overflow="fold")
    table.add_column("SNR, dB", justify="right")
    for row in report.layers[:rows]:
        table.add_row(escape(row.layer), row.op_type, escape(row.tensor), _ratio(row.snr_db))
    if len(report.layers) > rows:
        table.caption = f"{len(report.layers) - rows} better layers not shown"
    print_table(console, table)
    if report.blocks:
        behind = ", ".join(_ratio(row.snr_db) for row in report.blocks)
        console.print(f"dB behind each block, in order: {behind}", markup=False)
    for name, (low, high) in report.input_ranges.items():
        console.print(
            f"input {name}: {low:.4g} to {high:.4g} over {report.calibration_samples} samples",
            markup=False,
        )
    for kind, ratios in (("output", report.outputs_snr_db), ("state of", report.states_snr_db)):
        for name, snr in ratios.items():
            poor = "; int8 costs it much, --exclude leaves it float" if _is_poor(kind, snr) else ""
            console.print(f"{kind} {name}: {_ratio(snr)} dB{poor}", markup=False)
    for name, reason in report.left_float.items():
        console.print(f"{name} stays float: {reason}", markup=False)
    if report.float_accuracy is not None:
        before, after, same = (
            f"{100 * (share or 0):.2f} %"
            for share in (report.float_accuracy, report.int8_accuracy, report.agreement)
        )
        console.print(
            f"accuracy on {report.labelled_samples} samples: float {before}, int8 {after}; "
            f"same class {same}"
        )
    console.print(
        f"{report.output}: {report.int8_bytes:,} bytes (float: {report.float_bytes:,})",
        markup=False,
    )


def parse_size(text: str) -> tuple[int, int]:
    """Height and width of ``--size HEIGHTxWIDTH``. Raises :class:`InputError`."""
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise InputError(f"--size {text}: must be HEIGHTxWIDTH")
    return int(height), int(width)


def parse_alpha(text: str | None) -> float | Literal["auto"] | None:
    """``--smooth auto`` or a number. Raises :class:`InputError`."""
    if text is None:
        return None
    if text == "auto":
        return "auto"
    return parse_numbers("--smooth", text)[0]


def main(
    model: Annotated[Path, typer.Argument(help="ONNX model, float or partly quantised")],
    calibrate: Annotated[
        Path, typer.Option(help="folder of pictures, or .npz/.npy with samples along axis 0")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="the int8 model")],
    method: Annotated[str, typer.Option(help="minmax | entropy | percentile")] = "minmax",
    percentile: Annotated[float, typer.Option(help="for --method percentile")] = 99.999,
    samples: Annotated[
        int, typer.Option(min=1, help="calibration samples at most, evenly spread")
    ] = api.CALIBRATION_SAMPLES,
    labels: Annotated[
        Path | None, typer.Option(help=".npy with a class number per sample; or y in the .npz")
    ] = None,
    dim: DimOption = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="node or operator type that stays float")
    ] = None,
    equalise: Annotated[
        bool, typer.Option("--equalise", help="balance channels between layers")
    ] = False,
    smooth: Annotated[
        str | None,
        typer.Option(help="move scales behind normalisations into weights: auto, or alpha, 0 to 1"),
    ] = None,
    bias_correction: Annotated[
        bool, typer.Option("--bias-correction", help="take mean errors off the biases")
    ] = False,
    mean: MeanOption = "0",
    std: StdOption = "1",
    scale: Annotated[
        str | None, typer.Option(help="default: 1/255 for pictures, 1 for arrays")
    ] = None,
    layout: LayoutOption = None,
    size: Annotated[str | None, typer.Option(help="of pictures, HxW; default: the model's")] = None,
    channels: Annotated[str | None, typer.Option(help="rgb | bgr | gray")] = None,
    rows: Annotated[int, typer.Option(min=0, help="layers to print")] = 12,
    json_file: JsonOption = None,
) -> None:
    """Quantise a float ONNX model to int8 (QDQ, weights per channel), or what of a partly quantised
    one is still float, and report what it cost."""
    with one_line_errors():
        check_outputs(output, json_file)
        quantised, report = api.quantize(
            model,
            calibrate,
            options=QuantisationOptions(
                method=method,
                percentile=percentile,
                exclude=exclude or (),
                equalise=equalise,
                smooth=parse_alpha(smooth),
                bias_correction=bias_correction,
                dims=parse_dims(dim),
            ),
            preprocessing=Preprocessing(
                mean=parse_numbers("--mean", mean),
                std=parse_numbers("--std", std),
                scale=None if scale is None else parse_numbers("--scale", scale)[0],
                layout=layout,
                size=None if size is None else parse_size(size),
                channels=channels,
            ),
            samples=samples,
            labels=None if labels is None else read_labels(labels),
            progress=progress_console().status,
        )
        report.output = str(output)
        write_atomically(output, quantised.SerializeToString())
        if json_file is not None:
            write_atomically(json_file, report.to_json().encode())
    show(report, output_console(), rows)
