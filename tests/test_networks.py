"""Whole networks of the zoo on the RTL at 16x16: every output equal to the golden model, the cycles
to the number pinned here, and the cycle model within 1 % of them."""

from __future__ import annotations

import pytest

from isa import Config
from sw.bench import load_network, measured

CYCLES = {
    "resnet8": 0,
    "dscnn-kws": 0,
    "mobilenetv1-0.25-vww": 0,
    "autoencoder-ad": 0,
    "resnet18": 0,
    "mobilenetv1": 0,
    "mobilenetv2": 0,
    "squeezenet": 0,
    "yolov3-tiny": 0,
    "mobilenetv3-small": 0,
    "unet-small": 0,
    "resnet50": 0,
}
"""With the fast schedule, the memory model's defaults, trace on. A change of hardware or compiler
that moves them is welcome or not; a test that fails says the new number to write here."""

LONG = ("resnet50",)

TOTAL = 0.01


@pytest.mark.xdist_group("16x16")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long) if n in LONG else n for n in CYCLES]
)
def test_network(name):
    result = measured(name, load_network(name), Config())
    assert result.mismatches == 0
    assert result.predicted.cycles == pytest.approx(result.cycles, rel=TOTAL)
    assert result.cycles == CYCLES[name]
