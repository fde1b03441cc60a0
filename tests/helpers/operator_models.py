"""Models of one operator or a few, and their comparison with onnxruntime."""

import numpy as np
import onnx

from systole.sw.frontend.load import load
from systole.sw.golden import model as golden
from systole.sw.golden import oracle
from tests.helpers.random_models import Model, random_array, random_inputs

DTYPES = [np.int8, np.uint8]


def compare(model, tmp_path, seed=0):
    """The graph and the golden model's comparison with onnxruntime, output by output."""
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    graph = load(path)
    inputs = random_inputs(np.random.default_rng(seed), model)
    ours = golden.run(
        graph,
        {
            p.tensor: golden.quantise_input(p, graph.tensors[p.tensor], inputs[p.name])
            for p in graph.inputs
        },
    )
    theirs = oracle.run(path, inputs)
    results = [
        oracle.compare(p, graph.tensors[p.tensor], ours[p.tensor], theirs[p.name])
        for p in graph.outputs
    ]
    return graph, results


def check(model, tmp_path, exact=False, seed=0):
    graph, results = compare(model, tmp_path, seed)
    for result in results:
        if exact:
            assert result.exact, result
        assert result.max_abs_diff <= 1 and result.equal >= 0.999 * result.elements - 1, result
    return graph


class Build(Model):
    """A model whose activations share a type; scales away from powers of two, so that ties are
    rare."""

    def __init__(self, dtype, opset=21):
        super().__init__(opset)
        self.dtype = np.dtype(dtype)

    def zero(self, signed):
        return np.array(signed + (128 if self.dtype == np.uint8 else 0), self.dtype)

    def x(self, name, shape, scale=0.0371, zero=3):
        return self.dq(self.input(name, self.dtype, shape), scale, self.zero(zero))

    def end(self, value, scale=0.0293, zero=-7, name="y"):
        return self.done(self.q(value, scale, self.zero(zero), name), self.dtype)

    def again(self, value, scale, zero, name):
        """Quantised and dequantised."""
        return self.dq(self.q(value, scale, self.zero(zero), name), scale, self.zero(zero))


def node(op_type, *constants, domain="", **attributes):
    """A step: one node of a value and constants."""

    def step(model, value):
        n = len(model.nodes)
        names = [model.const(f"c{n}_{i}", c[0]) if c else "" for i, c in enumerate(constants)]
        return model.node(op_type, [value, *names], f"v{n}", domain, **attributes)

    return step


def const(*values, kind=np.float32):
    return (np.array(values[0] if len(values) == 1 else values, kind),)


def ints(*values):
    return (np.array(values, np.int64),)


CONSTANTS = {
    "image": ((2, 5, 9, 7), (5, 1, 1)),
    "batched": ((1, 5, 9, 7), (1, 5, 1, 1)),
    "signal": ((2, 5, 30), (5, 1)),
    "sequence": ((2, 9, 40), (40,)),
    "matrix": ((9, 40), (1, 40)),
}


def convolved(model, name="c"):
    """A convolution's result of (1, 8, 8, 8), float, clamped."""
    w = random_array(np.random.default_rng(0), np.int8, (8, 4, 3, 3))
    w = model.dq(model.const(f"{name}_w", w), 0.01, np.int8(0))
    value = model.node("Conv", [model.x(f"{name}_x", (1, 4, 10, 10)), w], name)
    return model.node("Relu", [value], f"{name}_relu")


REPEATING = {
    "Expand": node("Expand", ints(1, 24, 8, 9)),
    "Tile": node("Tile", ints(1, 1, 8, 9)),
    "Resize": node("Resize", (), const(1, 1, 8, 9), mode="nearest"),
}
"""Steps from (1, 24, 1, 1) to (1, 24, 8, 9)."""


def repeated_model(name, op_type, *, swapped=False, scale=0.0213, dtype=np.int8):
    """Arithmetic on an image and its mean, which one of REPEATING has brought to the image's size;
    ``swapped``: on the mean and the image."""
    model = Build(dtype)
    pooled = node("MaxPool", kernel_shape=[1, 1])(model, model.x("x", (1, 24, 8, 9)))
    image = model.again(pooled, 0.0371, 3, "image")
    gate = model.again(node("GlobalAveragePool")(model, image), 0.0213, 3, "gate")
    gate = model.again(REPEATING[name](model, gate), scale, 3, "repeated")
    operands = [gate, image] if swapped else [image, gate]
    return model.end(model.node(op_type, operands, "r"))


OTHER_LAYOUTS = [(0, 1, 2, 3), (0, 3, 1, 2)]
"""Orders of axes that are not those of channels last."""


def two_layouts_model(other, op_type, *, swapped=False):
    """Arithmetic on two computed operands (1, 8, 12, 24): one is stored with channels last, one in
    ``other``'s order of axes."""
    model, operands = Build(np.int8), []
    for n, perm in enumerate(((0, 2, 3, 1), other)):
        given = [size for _, size in sorted(zip(perm, (1, 8, 12, 24), strict=True))]
        x = node("MaxPool", kernel_shape=[1, 1])(model, model.x(f"x{n}", tuple(given)))
        x = model.again(x, 0.0371, 3, f"a{n}")
        operands.append(node("Transpose", perm=list(perm))(model, x))
    return model.end(model.node(op_type, operands[::-1] if swapped else operands, "r"))
