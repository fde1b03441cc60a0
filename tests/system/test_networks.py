"""Whole networks of the zoo on the RTL at 16x16: every output equal to the golden model, the cycles
to the number pinned here, and the cycle model within 1 % of them."""

from __future__ import annotations

import pytest

from tests.helpers.networks import measured

CYCLES = {
    "resnet8": 51_306,
    "dscnn-kws": 11_872,
    "mobilenetv1-0.25-vww": 39_657,
    "autoencoder-ad": 18_158,
    "resnet18": 7_173_124,
    "mobilenetv1": 2_286_671,
    "mobilenetv2": 1_311_432,
    "squeezenet": 1_424_438,
    "yolov3-tiny": 10_982_628,
    "mobilenetv3-small": 476_073,
    "unet-small": 1_320_068,
    "resnet50": 16_232_472,
}
"""With the fast schedule, the memory model's defaults, trace on. A change of hardware or compiler
that moves them is welcome or not; a test that fails says the new number to write here."""

LONG = ("resnet18", "mobilenetv1", "mobilenetv2", "squeezenet", "yolov3-tiny", "resnet50")
"""For `make test-long`: a quarter of a minute and more each, of kinds that others stand for."""

TOTAL = 0.01


@pytest.mark.xdist_group("16x16")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long) if n in LONG else n for n in CYCLES]
)
def test_network(name):
    result = measured(name)
    assert result.mismatches == 0
    assert result.predicted.cycles == pytest.approx(result.cycles, rel=TOTAL)
    assert result.cycles == CYCLES[name]
