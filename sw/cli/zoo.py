"""The networks built in code, as ONNX files.

systole zoo NAME -o FILE.onnx
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from systole.sw.cli.common import check_outputs, one_line_errors
from systole.sw.frontend.inputs import InputError
from systole.sw.zoo import NETWORKS, build, write
from systole.sw.zoo.measure import macs, saturated_share, saturation


def main(
    name: Annotated[str, typer.Argument(help=f"one of {', '.join(NETWORKS)}")],
    output: Annotated[Path, typer.Option("--output", "-o", help="ONNX file to write")],
    size: Annotated[
        int | None, typer.Option(min=1, help="height and width of the picture, for larger networks")
    ] = None,
    m: Annotated[int | None, typer.Option(min=1, help="gemm: rows of activations")] = None,
    k: Annotated[int | None, typer.Option(min=1, help="gemm: reduction length")] = None,
    n: Annotated[int | None, typer.Option(min=1, help="gemm: columns of the constant")] = None,
    seed: Annotated[int, typer.Option(min=0, help="seed of weights and calibration")] = 0,
) -> None:
    """Write a network built in code, in QDQ int8 per-channel form; print its multiply-accumulates
    and the share of activations that saturate on a random input."""
    options = {"size": size, "m": m, "k": k, "n": n}
    with one_line_errors():
        check_outputs(output)
        try:
            model = build(name, seed=seed, **{o: v for o, v in options.items() if v is not None})
        except ValueError as e:
            raise InputError(str(e)) from None
        write(model, output)
    share = saturated_share(saturation(model))
    print(f"{output}: {macs(model):,} multiply-accumulates, {share:.4%} of activations saturate")
