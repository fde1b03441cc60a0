"""What quantising a model costs, as a report."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import onnx

from systole.sw.quantisation.measure import (
    LayerNoise,
    block_ends,
    classes,
    layer_noise,
    output_noise,
)
from systole.sw.quantisation.recurrent import left_float, state_of
from systole.sw.quantisation.samples import Chosen, Feeds

NOISE_SAMPLES = 16
"""Samples over which the layers' noise is measured."""


@dataclass
class QuantisationReport:
    """What quantising a model costs, and what ``--json`` writes. Accuracies are fractions of the
    labelled samples; None without labels."""

    model: str
    """File name of the float model."""
    calibration_samples: int
    input_ranges: dict[str, tuple[float, float]]
    """After preprocessing, over the calibration samples."""
    output: str = ""
    """Path of the int8 model; empty if it is not written."""
    float_bytes: int = 0
    int8_bytes: int = 0
    labelled_samples: int = 0
    float_accuracy: float | None = None
    int8_accuracy: float | None = None
    agreement: float | None = None
    """Fraction of samples that both models put into the same class."""
    left_float: dict[str, str] = field(default_factory=dict)
    """Recurrent operators that could not be written out, by name, and why."""
    outputs_snr_db: dict[str, float | None] = field(default_factory=dict)
    """Signal to noise of the model's outputs, by name."""
    states_snr_db: dict[str, float | None] = field(default_factory=dict)
    """Signal to noise of the states of recurrent operators, by operator and direction: that of the
    worst step."""
    blocks: list[LayerNoise] = field(default_factory=list)
    """The noise behind each block with a way around it, in order."""
    layers: list[LayerNoise] = field(default_factory=list)
    """The noisiest first; ``snr_db`` null in the JSON: no noise, or noise without a signal."""

    def measure(
        self,
        model: onnx.ModelProto,
        quantised: onnx.ModelProto,
        samples: Sequence[Feeds],
        labels: np.ndarray | None,
    ) -> None:
        """Fill in the layers' noise and, given ``labels`` (a class number per sample), the
        accuracy. Raises :class:`InputError` if the model is no classifier."""
        few = Chosen(samples, NOISE_SAMPLES)
        self.layers = layer_noise(model, quantised, few)
        self.outputs_snr_db = output_noise(model, quantised, few)
        ends = {tensor: i for i, tensor in enumerate(block_ends(model))}
        self.blocks = [row for row in self.layers if row.tensor in ends]
        self.blocks.sort(key=lambda row: ends[row.tensor])
        self.left_float = left_float(model)
        for row in reversed(self.layers):  # the worst last
            if (state := state_of(row.tensor)) is not None:
                self.states_snr_db[state] = row.snr_db
        if labels is not None:
            before, after = classes(model, samples), classes(quantised, samples)
            self.labelled_samples = len(labels)
            self.float_accuracy = float((before == labels).mean())
            self.int8_accuracy = float((after == labels).mean())
            self.agreement = float((before == after).mean())

    def to_json(self) -> str:
        """The report as JSON, infinite ratios as null."""
        finite = replace(
            self,
            blocks=[replace(r, snr_db=_finite(r.snr_db)) for r in self.blocks],
            layers=[replace(r, snr_db=_finite(r.snr_db)) for r in self.layers],
            outputs_snr_db={k: _finite(v) for k, v in self.outputs_snr_db.items()},
            states_snr_db={k: _finite(v) for k, v in self.states_snr_db.items()},
        )
        return json.dumps(asdict(finite), indent=1) + "\n"


def _finite(ratio: float | None) -> float | None:
    return None if ratio is None or math.isinf(ratio) else ratio


def input_ranges(samples: Sequence[Feeds]) -> dict[str, tuple[float, float]]:
    """The least and the largest value of each input over all samples."""
    ranges: dict[str, tuple[float, float]] = {}
    for feeds in samples:
        for name, array in feeds.items():
            low, high = ranges.get(name, (math.inf, -math.inf))
            ranges[name] = (min(low, float(array.min())), max(high, float(array.max())))
    return ranges
