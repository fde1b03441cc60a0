"""All steps in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import onnx

from systole.sw.frontend.inputs import InputError
from systole.sw.ir.graph import ModelError, first_line
from systole.sw.quantisation.calibrate import METHODS, activation_ranges, to_qdq
from systole.sw.quantisation.complete import complete, fold_rest
from systole.sw.quantisation.correct import add_biases, correct_biases
from systole.sw.quantisation.equalise import equalise
from systole.sw.quantisation.floating import finite_masks, floating_nodes, masking_nodes
from systole.sw.quantisation.prepare import (
    input_shapes,
    input_types,
    is_quantised,
    prepare,
    session,
)
from systole.sw.quantisation.recurrent import exact_states, settle, split_states
from systole.sw.quantisation.samples import ArraySamples, Feeds
from systole.sw.quantisation.smooth import smooth

CORRECTION_SAMPLES = 64
"""Bias correction runs the model once a layer on so many; means need no more."""


@dataclass(frozen=True)
class QuantisationOptions:
    """How to quantise. ``exclude``: names of nodes, or operator types, that stay float."""

    method: str = "minmax"
    percentile: float = 99.999
    exclude: Sequence[str] = ()
    equalise: bool = False
    smooth: float | Literal["auto"] | None = None
    """Alpha of smoothing, 0 to 1, or ``"auto"``: chosen for each normalisation. None: no
    smoothing."""
    bias_correction: bool = False
    dims: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"--method {self.method}: must be one of {', '.join(METHODS)}")
        if isinstance(self.smooth, float) and not 0 <= self.smooth <= 1:
            raise InputError(f"--smooth {self.smooth}: must be within 0 to 1, or auto")
        if not 50 < self.percentile <= 100:
            raise InputError(f"--percentile {self.percentile}: must be above 50, at most 100")


def quantise_model(
    model_path: str | Path,
    calibration: Mapping[str, np.ndarray],
    options: QuantisationOptions | None = None,
) -> onnx.ModelProto:
    """The float model in ``model_path`` as an int8 QDQ model. ``calibration``: arrays by input
    name, samples along the first axis. Raises :class:`sw.ir.graph.ModelError` about the model,
    :class:`sw.frontend.inputs.InputError` about the samples and options."""
    options = options or QuantisationOptions()
    model = prepare(model_path, options.dims, exclude=options.exclude)
    samples = ArraySamples(calibration, input_shapes(model), types=input_types(model))
    return quantise(model, samples, options)[1]


def quantise(
    model: onnx.ModelProto, samples: Sequence[Feeds], options: QuantisationOptions
) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Quantise a ``model`` from :func:`prepare`, or what of it is still float. It is left as it is.
    Returned are the model that was quantised (with equalised weights if ``options`` ask for them)
    and the int8 one. Raises as :func:`quantise_model` does."""
    original, model = model, onnx.ModelProto()
    model.CopyFrom(original)
    partly = is_quantised(model)
    if partly:
        _check_keeps(options)
        fold_rest(model)
    excluded = excluded_nodes(model, options.exclude)
    if options.bias_correction:
        add_biases(model)
    if options.equalise:
        equalise(model, samples)
    if options.smooth is not None:
        smooth(model, samples, None if options.smooth == "auto" else options.smooth)
    ranges = activation_ranges(finite_masks(model), samples, options.method, options.percentile)
    ranges = settle(model, ranges)
    excluded |= floating_nodes(model) | exact_states(model)
    excluded |= {node.name for node in masking_nodes(model, ranges)}
    if partly:
        quantised = complete(model, ranges, samples[0], excluded)
    else:
        quantised = to_qdq(model, ranges, excluded)
    split_states(quantised)
    if options.bias_correction:
        few = [samples[i] for i in range(0, len(samples), -(-len(samples) // CORRECTION_SAMPLES))]
        correct_biases(model, quantised, few)
    quantised.producer_name = "systole"
    _check_runs(quantised, samples[0])
    return model, quantised


def _check_keeps(options: QuantisationOptions) -> None:
    """Raises :class:`InputError` for what would change the quantised part of a model."""
    for option in ("equalise", "smooth", "bias_correction"):
        if getattr(options, option) not in (False, None):
            raise InputError(
                f"--{option.replace('_', '-')} changes weights and biases, and the model is partly "
                "quantised: what is quantised is kept"
            )


def _check_runs(quantised: onnx.ModelProto, sample: Feeds) -> None:
    """Raises :class:`ModelError` if what quantising made does not run."""
    try:
        onnx.checker.check_model(quantised)
        session(quantised).run(None, dict(sample))
    except Exception as e:  # onnxruntime's errors have no class of their own in common
        reason = first_line(e)
        raise ModelError(f"quantising made a model that does not run: {reason}") from None


def excluded_nodes(model: onnx.ModelProto, exclude: Sequence[str]) -> set[str]:
    """The names of the nodes that ``exclude`` means: by node, by operator type, or by a node's
    output."""
    names = set()
    for wanted in exclude:
        matching = {
            node.name
            for node in model.graph.node
            if wanted in (node.name, node.op_type, *node.output)
        }
        if not matching:
            raise ModelError(
                f"--exclude {wanted}: no such node, output or operator type (after folding, the "
                f"operators are {', '.join(sorted({n.op_type for n in model.graph.node}))})"
            )
        names |= matching
    return names
