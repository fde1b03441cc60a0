"""Random quantised graphs for the tests, built from ``sw.ir.graph`` directly: chains, residuals to
earlier tensors, several outputs and inputs, tensors with several readers, batches."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from systole.sw.golden import model as golden
from systole.sw.ir.graph import (
    Activation,
    Binary,
    Conv,
    ConvTranspose,
    Graph,
    Pick,
    Pool,
    Port,
    Residual,
    Select,
    Table,
    Tensor,
)


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

    def _emit(self, make, shape, zero: int | None = None) -> str:
        """Add the operator ``make(name, output)`` that makes a tensor of ``shape``."""
        output = f"t{len(self.ops)}"
        zero = self._zero() if zero is None else zero
        self._tensor(output, tuple(map(int, shape)), zero)
        op = make(f"op{len(self.ops)}", output)
        self.ops.append(op)
        graph = Graph("", self.tensors, self.ops, [], [])
        self.values[output] = golden.evaluate(op, graph, self.values)[output]
        return output

    def _spread(self, x: str) -> float:
        v = self.values[x].astype(float) - self.tensors[x].zero
        return max(float(np.sqrt(np.mean(v * v))), 1.0)

    def values_of(self) -> np.ndarray:
        """A random table, rising or not."""
        values = self.rng.integers(-128, 128, 256).astype(np.int8)
        return np.sort(values) if self.rng.integers(2) else values

    def conv(
        self,
        x,
        outputs,
        kernel,
        strides,
        pads,
        dilations,
        group=1,
        other: str | None = None,
        function: bool = False,
        zero: int | None = None,
    ) -> str:
        """A convolution; ``other``: a tensor of its result's shape to add; ``function``: with a
        table; ``zero``: of the result."""
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
            activation = None
            if function:
                activation = Activation(f"{output}_own", self._zero(), self.values_of())
            return Conv(
                name, op_type, output, *self._clamp(), x, weights, bias, scale, strides, pads,
                dilations, group, residual, activation,
            )  # fmt: skip

        return self._emit(make, (n, outputs, oh, ow), zero)

    def pool(self, x, kind, kernel, strides, pads) -> str:
        n, c, h, w = self.tensors[x].shape
        oh = (h + pads[0] + pads[2] - kernel[0]) // strides[0] + 1
        ow = (w + pads[1] + pads[3] - kernel[1]) // strides[1] + 1
        scale = np.float32(self.rng.uniform(0.5, 2) / (kernel[0] * kernel[1]))

        def make(name, output):
            op_type = {"max": "MaxPool", "average": "AveragePool"}[kind]
            return Pool(
                name, op_type, output, *self._clamp(), x, kind, kernel, strides, pads, scale=scale
            )

        return self._emit(make, (n, c, oh, ow), self.tensors[x].zero if kind == "max" else None)

    def add(self, a, b) -> str:
        ratios = self.rng.uniform(0.3, 1.2, 2)
        return self._emit(
            lambda name, output: Binary(
                name, "Add", output, *self._clamp(), "add", a, b, *map(float, ratios)
            ),
            self.tensors[a].shape,
        )

    def table(self, x) -> str:
        return self._emit(
            lambda name, output: Table(name, "Table", output, *self._clamp(), x, self.values_of()),
            self.tensors[x].shape,
        )

    def upscale(self, x) -> str:
        """A transposed convolution that doubles the size."""
        n, c, h, w = self.tensors[x].shape
        outputs = int(self.rng.integers(1, 20))
        weights = self.rng.integers(-128, 128, (outputs, c, 2, 2)).astype(np.int8)
        scale = np.full(outputs, 60 / (self._spread(x) * 74 * np.sqrt(4 * c)), np.float32)
        bias = np.zeros(outputs, np.int32)
        return self._emit(
            lambda name, output: ConvTranspose(
                name, "ConvTranspose", output, *self._clamp(), x, weights, bias, scale, (2, 2),
                (0, 0, 0, 0),
            ),
            (n, outputs, 2 * h, 2 * w),
        )  # fmt: skip

    def select(self, picks: list[tuple[str, np.ndarray]], *, same: bool = False) -> str:
        """Channels of tensors, each output channel one (-1: another pick's); ``same``: with the
        scale and zero point of the first."""
        first = self.tensors[picks[0][0]]

        def make(name, output):
            clamp = (-128, 127) if same else self._clamp()
            made = [
                Pick(x, np.array(channels), scale=1.0 if same else float(self._ratio()))
                for x, channels in picks
            ]
            return Select(name, "Concat", output, *clamp, phases=[made])

        n, _, h, w = first.shape
        return self._emit(make, (n, len(picks[0][1]), h, w), first.zero if same else None)

    def _ratio(self) -> np.float32:
        return np.float32(self.rng.choice([1, self.rng.uniform(0.4, 1.6)]))

    def concat(self, *parts: str, same: bool = False) -> str:
        counts = [self.tensors[x].shape[1] for x in parts]
        starts = np.cumsum([0, *counts])
        picks = []
        for x, at, count in zip(parts, starts, counts):
            channels = np.full(starts[-1], -1)
            channels[at : at + count] = np.arange(count)
            picks.append((x, channels))
        return self.select(picks, same=same)

    def nearest(self, x) -> str:
        """Every pixel twice in both directions."""
        n, c, h, w = self.tensors[x].shape
        pick = Pick(x, np.arange(c), scale=float(self._ratio()))
        return self._emit(
            lambda name, output: Select(
                name, "Resize", output, *self._clamp(), phases=[[pick]] * 4, steps=(2, 2)
            ),
            (n, c, 2 * h, 2 * w),
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


def random_joins(seed: int, *, ops: int = 12, window: bool = True):
    """A graph in which most tensors are joins or channels of others; as :func:`random_graph`."""
    rng = np.random.default_rng(seed)
    b = GraphBuilder(rng)
    n = int(rng.integers(1, 3))
    size = tuple(map(int, rng.integers(2, 14, 2)))
    for _ in range(rng.integers(1, 3)):
        b.input((n, int(rng.choice([4, 16, rng.integers(1, 40)])), *size))
    wanted = int(rng.integers(4, ops + 1))
    while len(b.ops) < wanted:
        names = list(b.tensors)
        x = names[-1] if rng.integers(3) else names[rng.integers(len(names))]
        _random_join(b, rng, x, window)
    read = {name for op in b.ops for name in op.inputs}
    made = [op.output for op in b.ops]
    outputs = [t for t in made if t not in read or rng.integers(10) == 0]
    return b.graph(outputs), {p.tensor: b.values[p.tensor] for p in b.inputs}, b.values


def random_windows(seed: int, *, ops: int = 4, most: int = 20):
    """Depthwise convolutions and pools one behind the other, of windows up to 7 x 7 on images of at
    most ``most`` rows and columns; as :func:`random_graph`."""
    rng = np.random.default_rng(seed)
    b = GraphBuilder(rng)
    channels = int(rng.integers(1, 40))
    x = b.input((int(rng.integers(1, 3)), channels, *map(int, rng.integers(1, most + 1, 2))))
    while len(b.ops) < ops:
        kind = str(rng.choice(["conv", "conv", "max", "average"]))
        large = rng.integers(2)
        kernel = tuple(map(int, rng.integers(5 if large else 1, 8, 2)))
        strides = tuple(map(int, rng.integers(1, 4, 2)))
        dilations = (1, 1)
        if kind == "conv" and not large:
            dilations = tuple(int(rng.integers(1, 4)) if k < 4 else 1 for k in kernel)
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations)]
        pads = tuple(int(rng.integers(0, r)) for r in (*reach, *reach))
        _, _, h, w = b.tensors[x].shape
        if h + pads[0] + pads[2] < reach[0] or w + pads[1] + pads[3] < reach[1]:
            continue
        if kind == "conv":
            x = b.conv(x, channels, kernel, strides, pads, dilations, channels)
        else:
            x = b.pool(x, kind, kernel, strides, pads)
    return b.graph([x]), {p.tensor: b.values[p.tensor] for p in b.inputs}, b.values


def _random_join(b: GraphBuilder, rng, x: str, window: bool) -> None:
    _, c, h, w = b.tensors[x].shape
    near = [t for t in b.tensors if b.tensors[t].shape[2:] == (h, w)]
    kind = rng.choice(["conv"] * 3 + ["concat"] * 4 + ["pick"] * 2 + ["pool", "depthwise", "rest"])
    outputs = int(rng.choice([8, 16, rng.integers(1, 40)]))
    pads = tuple(map(int, rng.integers(0, 2, 4)))
    if kind == "concat":
        parts = [x, *(near[rng.integers(len(near))] for _ in range(rng.integers(1, 4)))]
        rng.shuffle(parts)
        if sum(b.tensors[t].shape[1] for t in parts) < 150:
            b.concat(*parts, same=not rng.integers(3))
    elif kind == "pick":
        count = int(rng.integers(1, c + 1))
        start = int(rng.integers(0, c - count + 1))
        some = [np.arange(start, start + count), rng.permutation(c), rng.integers(0, c, count)]
        b.select([(x, some[rng.integers(3)])], same=bool(rng.integers(2)))
    elif kind == "pool" and window and min(h, w) > 1:
        b.pool(x, str(rng.choice(["max", "average"])), (2, 2), (1, 1), pads)
    elif kind == "depthwise":
        function = bool(rng.integers(2))
        b.conv(x, c, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), group=c, function=function)
    elif kind == "conv":
        k = int(rng.choice([1, 3]))
        groups = [g for g in (1, 1, 2, 3) if c % g == 0]
        group = groups[rng.integers(len(groups))]
        outputs = -(-outputs // group) * group
        same = [t for t in near if b.tensors[t].shape[1] == outputs]
        other = str(rng.choice(same)) if same and rng.integers(2) else None
        options = dict(group=group, other=other, function=bool(rng.integers(2)))
        b.conv(x, outputs, (k, k), (1, 1), (k // 2,) * 4, (1, 1), **options)
    elif kind == "rest":
        if rng.integers(2):
            b.table(x)
        elif h * w < 200:
            (b.upscale if rng.integers(2) else b.nearest)(x)


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
