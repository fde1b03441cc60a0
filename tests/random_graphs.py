"""Random quantised graphs for the tests, built from ``sw.graph`` directly: chains, residuals to
earlier tensors, several outputs and inputs, tensors with several readers, batches."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from sw import golden
from sw.graph import Binary, Conv, Graph, Pool, Port, Residual, Tensor


@dataclass
class GraphBuilder:
    """Collects operators; every tensor's values are at hand, so that scales suit them."""

    rng: np.random.Generator
    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, np.ndarray] = field(default_factory=dict)
    ops: list = field(default_factory=list)
    inputs: list[Port] = field(default_factory=list)

    def _tensor(self, name: str, shape, zero: int) -> None:
        perm = (0, 1, 2, 3)
        self.tensors[name] = Tensor(name, shape, np.float32(0.05), zero, False, shape, perm)

    def _zero(self) -> int:
        return int(self.rng.choice([-128, 0, 127, self.rng.integers(-128, 128)]))

    def _clamp(self) -> tuple[int, int]:
        return [(-128, 127), (int(self.rng.integers(-100, 0)), 127), (-128, 100)][
            self.rng.integers(3)
        ]

    def input(self, shape) -> str:
        name = f"in{len(self.inputs)}"
        self._tensor(name, tuple(map(int, shape)), self._zero())
        self.values[name] = self.rng.integers(-128, 128, shape).astype(np.int8)
        self.inputs.append(Port(name, name, "int8"))
        return name

    def _emit(self, make, shape) -> str:
        """Add the operator ``make(name, output)`` that makes a tensor of ``shape``."""
        output = f"t{len(self.ops)}"
        self._tensor(output, tuple(map(int, shape)), self._zero())
        op = make(f"op{len(self.ops)}", output)
        self.ops.append(op)
        graph = Graph("", self.tensors, self.ops, [], [])
        self.values[output] = golden.evaluate(op, graph, self.values)[output]
        return output

    def _spread(self, x: str) -> float:
        v = self.values[x].astype(float) - self.tensors[x].zero
        return max(float(np.sqrt(np.mean(v * v))), 1.0)

    def conv(
        self, x, outputs, kernel, strides, pads, dilations, group=1, other: str | None = None
    ) -> str:
        """A convolution; ``other``: a tensor of its result's shape to add."""
        n, c, h, w = self.tensors[x].shape
        weights = self.rng.integers(-128, 128, (outputs, c // group, *kernel)).astype(np.int8)
        terms = weights[0].size
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations)]
        oh = (h + pads[0] + pads[2] - reach[0]) // strides[0] + 1
        ow = (w + pads[1] + pads[3] - reach[1]) // strides[1] + 1
        spread = self._spread(x) * 74 * np.sqrt(terms)
        scale = (self.rng.uniform(30, 90, outputs) / spread).astype(np.float32)
        bias = self.rng.integers(-int(spread), int(spread) + 1, outputs).astype(np.int32)

        def make(name, output):
            residual = None
            if other is not None:
                ratios = self.rng.uniform(0.3, 1.2, 2)
                residual = Residual(
                    other, self._zero(), *self._clamp(), *ratios, f"{output}_mid", f"{name}_add"
                )
            op_type = "Conv+Add" if residual else "Conv"
            return Conv(
                name, op_type, output, *self._clamp(), x, weights, bias, scale, strides, pads,
                dilations, group, residual,
            )  # fmt: skip

        return self._emit(make, (n, outputs, oh, ow))

    def pool(self, x, kind, kernel, strides, pads) -> str:
        n, c, h, w = self.tensors[x].shape
        oh = (h + pads[0] + pads[2] - kernel[0]) // strides[0] + 1
        ow = (w + pads[1] + pads[3] - kernel[1]) // strides[1] + 1
        scale = np.float32(self.rng.uniform(0.5, 2) / (kernel[0] * kernel[1]))

        def make(name, output):
            op_type = {"max": "MaxPool", "average": "AveragePool"}[kind]
            zero = self.tensors[x].zero
            if kind == "max":
                self._tensor(output, self.tensors[output].shape, zero)
            return Pool(
                name, op_type, output, *self._clamp(), x, kind, kernel, strides, pads, scale=scale
            )

        return self._emit(make, (n, c, oh, ow))

    def add(self, a, b) -> str:
        ratios = self.rng.uniform(0.3, 1.2, 2)
        return self._emit(
            lambda name, output: Binary(
                name, "Add", output, *self._clamp(), "add", a, b, *map(float, ratios)
            ),
            self.tensors[a].shape,
        )

    def graph(self, outputs: list[str]) -> Graph:
        ports = [Port(name, name, "int8") for name in outputs]
        return Graph("random", self.tensors, self.ops, self.inputs, ports)


def random_graph(
    seed: int,
    *,
    ops: int = 8,
    channels: int = 60,
    size: int = 24,
    batch: int = 3,
    work: int = 3_000_000,
    window: bool = True,
) -> tuple[Graph, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A graph of up to ``ops`` operators, its inputs and all its tensors by the golden model.
    ``window``: with pools."""
    rng = np.random.default_rng(seed)
    b = GraphBuilder(rng)
    n = int(rng.integers(1, batch + 1))
    for _ in range(rng.integers(1, 3)):
        c = int(rng.choice([1, 3, rng.integers(1, channels + 1)]))
        b.input((n, c, *map(int, rng.integers(1, size + 1, 2))))
    wanted = int(rng.integers(2, ops + 1))
    while len(b.ops) < wanted:
        names = list(b.tensors)
        # Mostly the newest tensor, sometimes any earlier one: long lives, several readers.
        x = names[-1] if rng.integers(3) else names[rng.integers(len(names))]
        _random_op(b, rng, x, channels, work, window)
    read = {name for op in b.ops for name in op.inputs}
    made = [op.output for op in b.ops]
    outputs = [t for t in made if t not in read or rng.integers(6) == 0]
    inputs = {p.tensor: b.values[p.tensor] for p in b.inputs}
    return b.graph(outputs), inputs, b.values


def _random_op(b: GraphBuilder, rng, x: str, channels: int, work: int, window: bool) -> None:
    """One more operator on ``x``, unless what was drawn does not fit it."""
    n, c, h, w = b.tensors[x].shape
    same = [t for t, v in b.tensors.items() if v.shape == (n, c, h, w)]
    kind = rng.choice(["conv", "conv", "same", "pointwise", "depthwise", "group", "pool", "add"])
    kernel = tuple(map(int, rng.integers(1, 5, 2)))
    strides = tuple(map(int, rng.integers(1, 3, 2)))
    dilations = tuple(map(int, rng.integers(1, 3, 2)))
    outputs = int(np.exp(rng.uniform(0, np.log(channels + 1))))
    group = 1
    if kind == "add":
        if rng.integers(2):
            b.add(x, same[rng.integers(len(same))])
        return
    if kind in ("same", "pointwise", "depthwise"):
        k = 1 if kind == "pointwise" else 3
        kernel, strides, dilations = (k, k), (1, 1), (1, 1)
        pads = (k // 2,) * 4
        if kind == "depthwise":
            outputs = group = c
        elif rng.integers(2):
            outputs = c
    else:
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations)]
        if kind == "pool":
            reach, dilations = kernel, (1, 1)
        pads = tuple(int(rng.integers(0, r)) for r in (*reach, *reach))
        if h + pads[0] + pads[2] < reach[0] or w + pads[1] + pads[3] < reach[1]:
            return
    if kind == "pool":
        if window:
            b.pool(x, str(rng.choice(["max", "average"])), kernel, strides, pads)
        return
    if kind == "group":
        divisors = [g for g in range(1, c + 1) if c % g == 0 and g <= 8]
        group = divisors[rng.integers(len(divisors))]
        outputs = -(-outputs // group) * group
    if n * h * w * c // group * outputs * kernel[0] * kernel[1] > work:
        return
    shape = (n, outputs, h, w)
    others = [t for t, v in b.tensors.items() if v.shape == shape]
    other = None
    if kind in ("same", "pointwise") and others and rng.integers(2):
        other = others[rng.integers(len(others))]
    b.conv(x, outputs, kernel, strides, pads, dilations, group, other)
