"""Results quantised several times."""

import pytest

from systole.sw.ir.graph import Binary, Conv, Pool
from tests.helpers.operator_models import DTYPES, Build, check, convolved, node


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_twice_alike(dtype, tmp_path):
    """A QuantizeLinear for every reader, as some exporters write: computed once."""
    model = Build(dtype)
    value = convolved(model)
    a, b = (model.again(value, 0.0593, -20, name) for name in "ab")
    b = model.again(node("GlobalMaxPool")(model, b), 0.0593, -20, "m")
    graph = check(model.end(model.node("Add", [a, b], "s"), 0.0671), tmp_path)
    assert [type(op) for op in graph.ops] == [Conv, Pool, Binary]
