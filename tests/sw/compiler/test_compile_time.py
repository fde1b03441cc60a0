"""How long published networks take to load, place and compile."""

import time

import numpy as np
import onnx
import pytest

from systole.isa import Config
from systole.sw.compiler.partition import partition
from systole.sw.quantisation.pipeline import quantise_model
from tests.helpers import published

LIMIT = 180
"""Seconds of CPU: a busy machine takes more than twice what an idle one does."""


@pytest.mark.long
@pytest.mark.parametrize(
    "build, size, on_host",
    [
        (published.densenet121, 224, set()),
        (published.movenet, 192, {"ArgMax", "GatherND", "Cast"}),
        (published.swin, 224, {"LayerNormalization", "Softmax"}),
    ],
)
def test_published_network_compiles_in_time(build, size, on_host, tmp_path):
    path, quantised = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    onnx.save(build(), path)
    x = np.random.default_rng(1).normal(size=(1, 3, size, size)).astype(np.float32)
    onnx.save(quantise_model(path, {"x": x}), quantised)
    start = time.process_time()
    plan = partition(quantised, Config())
    assert time.process_time() - start < LIMIT
    hosts = {p.op_type for p in plan.placements if p.host}
    assert on_host <= hosts and bool(on_host) == bool(hosts)
