"""Where float32 may round either way: the golden model is always one of the two, and most elements
leave no choice."""

import numpy as np
import pytest

from systole.sw.golden import model as golden
from systole.sw.golden.ties import near
from systole.sw.ir.graph import Pool, Table, Transpose
from tests.helpers.random_operators import MAKERS, Sketch


@pytest.mark.parametrize("make", MAKERS, ids=lambda m: m.__name__)
def test_golden_is_one_of_both(make):
    elements = free = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        sketch = Sketch(rng, constants=False)
        make(sketch, rng)
        graph = sketch.graph()
        inputs = {
            p.tensor: rng.integers(-128, 128, graph.tensors[p.tensor].shape).astype(np.int8)
            for p in graph.inputs
        }
        tensors = golden.run(graph, inputs)
        for op in graph.ops:
            results = near(op, graph, tensors)
            if not results:
                unsummed = isinstance(op, Table | Transpose) or (
                    isinstance(op, Pool) and op.kind == "max"
                )
                assert unsummed, op
            for name, ends in results.items():
                fits = np.any([end == tensors[name] for end in ends], axis=0)
                assert fits.all(), (seed, op.name, name)
                elements += fits.size
                free += int(np.any([end != ends[0] for end in ends], axis=0).sum())
    assert free <= 0.05 * elements
