"""Random graphs of all operators, against onnxruntime."""

import numpy as np
import onnx
import pytest

from systole.sw.frontend.load import load
from systole.sw.ir.graph import Binary, Conv, ConvTranspose, Pool, Select, Table
from tests.helpers.operator_models import (
    compare,
)
from tests.helpers.random_models import random_graph_model


@pytest.mark.parametrize("seed", range(20))
def test_random_graph(seed, tmp_path):
    """Rounding that differs by one on the way may differ by more behind: most must agree."""
    model = random_graph_model(np.random.default_rng(seed))
    _, results = compare(model, tmp_path, seed)
    for result in results:
        assert result.max_abs_diff <= 2 and result.equal >= 0.99 * result.elements - 1, result


def test_random_graphs_have_all_operators(tmp_path):
    seen = set()
    for seed in range(20):
        path = tmp_path / "model.onnx"
        onnx.save(random_graph_model(np.random.default_rng(seed)), path)
        for op in load(path).ops:
            seen.add(type(op))
            seen.update({"residual"} if getattr(op, "residual", None) else ())
            seen.update({"activation"} if getattr(op, "activation", None) else ())
    assert seen >= {Conv, ConvTranspose, Binary, Table, Select, Pool, "residual", "activation"}
