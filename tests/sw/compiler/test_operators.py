"""Every graph operator with random parameters, compiled for random memories: the command-level
simulator (races included) against the golden model."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal, cast

import numpy as np
import onnx
import pytest

from systole.isa import Config
from systole.sw.frontend.load import load
from systole.sw.golden import model as golden
from systole.sw.ir.graph import (
    Activation,
    Binary,
    Conv,
    ConvTranspose,
    Graph,
    MatMul,
    Matrices,
    Pick,
    Pool,
    Port,
    Select,
    Shortcut,
    Table,
    Tensor,
    Transpose,
)
from systole.sw.session.backends import open_device
from tests.helpers.layer_checks import check_on, check_program, compile_by_chance
from tests.helpers.random_models import random_graph_model

SMALL = dict(scratchpad_bytes=32768, weight_bytes=8192, accumulator_bytes=4096)
CONFIGS = [
    Config(),
    Config.sized(4, 4, scratchpad_bytes=8192),
    Config.sized(12, 20),
    Config.sized(16, 16, **SMALL),
    Config.sized(8, 16, window=False),
]


PoolKind = Literal["max", "average"]


def pair(values: Iterable) -> tuple[int, int]:
    a, b = (int(v) for v in values)
    return a, b


def four(values: Iterable) -> tuple[int, int, int, int]:
    a, b, c, d = (int(v) for v in values)
    return a, b, c, d


class Sketch:
    """A graph under construction. ``constants``: all inputs but the first become constants."""

    def __init__(self, rng, constants=False):
        self.rng = rng
        self.constants = constants
        self.tensors = {}
        self.ops = []
        self.inputs = []

    def tensor(self, shape, zero=None):
        name = f"t{len(self.tensors)}"
        zero = int(self.rng.integers(-128, 128)) if zero is None else zero
        shape = four(shape)
        self.tensors[name] = Tensor(
            name=name,
            shape=shape,
            scale=np.float32(0.1),
            zero=zero,
            unsigned=False,
            onnx_shape=shape,
            perm=(0, 1, 2, 3),
        )
        return name

    def input(self, shape):
        name = self.tensor(shape)
        self.inputs.append(Port(name, name, "int8"))
        return name

    def shape(self, name):
        return self.tensors[name].shape

    def common(self, output):
        low = int(self.rng.choice([-128, -100, 0]))
        return dict(
            name=f"op{len(self.ops)}",
            op_type="Test",
            output=output,
            low=low,
            high=int(self.rng.choice([127, 100])),
        )

    def table(self):
        return self.rng.integers(-128, 128, 256).astype(np.int8)

    def activation(self):
        if self.rng.integers(2):
            return None
        return Activation(f"mid{len(self.ops)}", int(self.rng.integers(-128, 128)), self.table())

    def weights(self, shape):
        if self.rng.integers(3) == 0:
            return self.rng.integers(-255, 255, shape).astype(np.int16)
        return self.rng.integers(-128, 128, shape).astype(np.int8)

    def scales(self, count, terms):
        scale = self.rng.uniform(0.5, 1.5, count) / (3000 * np.sqrt(terms))
        return scale.astype(np.float32)

    def graph(self):
        used = {x for op in self.ops for x in op.inputs}
        outputs = [op.output for op in self.ops if op.output not in used]
        ports = [Port(o, o, "int8") for o in outputs]
        count = 1 if self.constants else len(self.inputs)
        constants = {
            p.tensor: self.rng.integers(-128, 128, self.shape(p.tensor)).astype(np.int8)
            for p in self.inputs[count:]
        }
        return Graph(
            name="test",
            tensors=self.tensors,
            ops=self.ops,
            inputs=self.inputs[:count],
            outputs=ports,
            constants=constants,
        )


def some_shape(rng, channels=40, size=14):
    return (int(rng.integers(1, 3)), *(int(v) for v in rng.integers(1, (channels, size, size))))


def make_binary(s, rng):
    shape = some_shape(rng)
    a = s.input(shape)
    b = s.input((*shape[:2], 1, 1) if rng.integers(2) else shape)
    ratios = rng.uniform(0.2, 1.5, 2)
    kind = cast(Literal["add", "sub", "mul"], str(rng.choice(["add", "sub", "mul"])))
    if kind == "mul":
        ratios = [ratios[0] / 50, 1.0]
    out = s.tensor(shape)
    s.ops.append(
        Binary(
            **s.common(out),
            kind=kind,
            a=a,
            b=b,
            a_ratio=float(ratios[0]),
            b_ratio=float(ratios[1]),
            activation=s.activation(),
        )
    )


def make_table(s, rng):
    shape = some_shape(rng)
    out = s.tensor(shape)
    s.ops.append(Table(**s.common(out), x=s.input(shape), values=s.table()))


def make_conv(s, rng):
    n, c, h, w = some_shape(rng)
    group = int(rng.choice([1, 1, 2, c]))
    c = -(-c // group) * group
    o = group * int(rng.integers(1, 20 if group < 3 else 3))
    kernel = rng.integers(1, 4, 2)
    pads = rng.integers(0, 3, 4)
    strides, dilations = rng.integers(1, 3, 2), rng.integers(1, 3, 2)
    room = np.array([h, w]) + pads[:2] + pads[2:] - (kernel - 1) * dilations - 1
    if (room < 0).any():
        return make_conv(s, rng)
    weights = s.weights((o, c // group, *kernel))
    out = s.tensor((n, o, *(room // strides + 1)))
    s.ops.append(
        Conv(
            **s.common(out),
            x=s.input((n, c, h, w)),
            weights=weights,
            bias=rng.integers(-5000, 5000, o).astype(np.int32),
            scale=s.scales(o, weights[0].size),
            strides=pair(strides),
            pads=four(pads),
            dilations=pair(dilations),
            group=group,
            activation=s.activation(),
        )
    )


def make_transposed(s, rng):
    n, c, h, w = some_shape(rng, size=9)
    o = int(rng.integers(1, 30))
    kernel, strides = rng.integers(1, 5, 2), rng.integers(1, 4, 2)
    dilations = rng.integers(1, 3, 2)
    pads = rng.integers(0, 2, 4)
    extra = rng.integers(0, strides)
    size = (np.array([h, w]) - 1) * strides + (kernel - 1) * dilations + 1 + extra
    size = size - pads[:2] - pads[2:]
    if (size < 1).any():
        return make_transposed(s, rng)
    pads[2:] -= extra
    weights = s.weights((o, c, *kernel))
    if (pads[2:] < 0).any():
        # The golden model takes the crop as it is given; rows that no input reaches are bias.
        pads[2:] = np.maximum(pads[2:], 0)
        size = (np.array([h, w]) - 1) * strides + (kernel - 1) * dilations + 1
        size = size - pads[:2] - pads[2:]
        if (size < 1).any():
            return make_transposed(s, rng)
    out = s.tensor((n, o, *size))
    s.ops.append(
        ConvTranspose(
            **s.common(out),
            x=s.input((n, c, h, w)),
            weights=weights,
            bias=rng.integers(-5000, 5000, o).astype(np.int32),
            scale=s.scales(o, c * kernel.prod()),
            strides=pair(strides),
            pads=four(pads),
            dilations=pair(dilations),
            activation=s.activation(),
        )
    )


def make_select(s, rng):
    joined = not rng.integers(3)
    images = [int(n) for n in (rng.integers(1, 4, 5) if joined else [rng.integers(1, 3)] * 5)]
    n = images[-1]
    sources = [
        s.input((images[k], *rng.integers(1, (40, 10, 10)))) for k in range(rng.integers(1, 4))
    ]
    channels = int(rng.integers(1, 70))
    flat = bool(rng.integers(2))
    steps = pair(rng.choice([1, 1, 2, 3], 2))
    steps = (1, steps[1]) if flat else steps
    size = [int(v) for v in rng.integers(1, 12, 2)]
    phases = []
    for _ in range(steps[0] * steps[1]):
        # Channels of one owner, or sums of all of them, which have a scale and weights in common.
        owner = rng.integers(-1, len(sources), channels * n if joined else channels)
        sums = bool(rng.integers(2))
        common = float(np.float32(rng.uniform(0.003, 0.01)))
        picks = []
        for k, x in enumerate(sources):
            if k not in owner:
                continue
            have = s.shape(x)[1] * (s.shape(x)[0] if joined else 1)
            taken = rng.integers(0, have, len(owner))
            picks.append(
                Pick(
                    x=x,
                    channels=np.where((owner == k) | (sums and owner >= 0), taken, -1),
                    strides=pair(rng.integers(1, 3, 2)),
                    offsets=pair(rng.integers(-3, 4, 2)),
                    scale=common
                    if sums
                    else float(np.float32(rng.choice([1.0, rng.uniform(0.3, 2)]))),
                    weight=int(rng.integers(-255, 255)) if sums else 1,
                )
            )
        phases.append(picks)
    if not any(phases):
        return make_select(s, rng)
    out = s.tensor((n, channels, *size))
    s.ops.append(
        Select(
            **s.common(out),
            phases=phases,
            steps=steps,
            fill=int(rng.integers(-128, 128)),
            flat=flat,
            across_images=joined,
        )
    )


def make_pool(s, rng):
    n, c, h, w = some_shape(rng)
    kernel = (int(rng.integers(1, h + 1)), int(rng.integers(1, w + 1)))
    kind = cast(PoolKind, str(rng.choice(["max", "average"])))
    pads = (0, 0, 0, 0) if kind == "average" else four(k // 2 for k in kernel * 2)
    strides = (int(rng.integers(1, 4)), int(rng.integers(1, 4)))
    size = [
        (d + pads[i] + pads[i + 2] - k) // t + 1
        for i, (d, k, t) in enumerate(zip((h, w), kernel, strides))
    ]
    counts, scale = None, np.float32(0.7 / (kernel[0] * kernel[1]))
    if kind == "average" and rng.integers(2):
        # The last window of an axis hangs over: fewer elements count; so at the start, at random.
        scale = np.float32(0.7)
        rows, columns = (
            tuple(sorted(int(v) for v in rng.integers(1, k + 1, z))) for k, z in zip(kernel, size)
        )
        counts = rows, columns
    out = s.tensor((n, c, *size))
    s.ops.append(
        Pool(
            **s.common(out),
            x=s.input((n, c, h, w)),
            kind=kind,
            kernel=kernel,
            strides=strides,
            pads=pads,
            scale=scale,
            counts=counts,
        )
    )


def make_whole_pool(s, rng):
    """One window over an image longer than windows are."""
    n, c = (int(v) for v in rng.integers(1, (3, 40)))
    h, w = [(1, 196), (2, 98), (112, 8), (1, 441), (70, 1)][rng.integers(5)]
    kind = cast(PoolKind, str(rng.choice(["max", "average"])))
    x, out = s.input((n, c, h, w)), s.tensor((n, c, 1, 1))
    s.ops.append(
        Pool(
            **s.common(out),
            x=x,
            kind=kind,
            kernel=(h, w),
            strides=(1, 1),
            pads=(0, 0, 0, 0),
            scale=np.float32(0.7 / (h * w) ** 0.5),
        )
    )


def loaded_graph(seed: int, path):
    """A random model by way of its ONNX file, random inputs by tensor, all tensors by the golden
    model."""
    onnx.save(random_graph_model(np.random.default_rng(seed)), path)
    graph, rng = load(path), np.random.default_rng(seed)
    shapes = {p.tensor: graph.tensors[p.tensor].shape for p in graph.inputs}
    inputs = {name: rng.integers(-128, 128, s).astype(np.int8) for name, s in shapes.items()}
    return graph, inputs, golden.run(graph, inputs)


SEEDS = [*range(301), 1000, 1129, 2005]
"""257: a concatenation of what is stored in another order. 1129: an interleaved output in several
regions; 2005: a Select that changes rows, between others."""


@pytest.mark.parametrize("seed", SEEDS)
def test_random_graph_on_commands(seed, tmp_path):
    """Models from their ONNX files, also by a random schedule."""
    graph, inputs, expected = loaded_graph(seed, tmp_path / "model.onnx")
    config, rng = CONFIGS[seed % 3], np.random.default_rng(seed)
    with open_device("command", config, memory_bytes=64 << 20) as device:
        check_on(device, config, graph, inputs, expected)
        program, _ = compile_by_chance(rng, graph, config, dump=True)
        check_program(device, program, inputs, expected)


def make_product(s, rng):
    """Matrices anywhere in their tensors; those of the result in any order."""
    batch = int(rng.integers(1, 5))
    m, k, n = (int(v) for v in rng.integers(1, (40, 50, 40)))

    def operand(channels, positions):
        shape = (int(rng.integers(1, 3)), *(rng.integers(0, 20, 3) + (channels, 1, positions)))
        name = s.input(shape)
        images, c, h, w = s.shape(name)
        most = images, c - channels + 1, h * w - positions + 1
        return Matrices(name, rng.integers(0, most, (batch, 3)))

    a, b = operand(k, m), operand(n, k)
    across = int(rng.choice([d for d in range(1, batch + 1) if batch % d == 0]))
    order = rng.permutation(batch)
    places = np.stack([0 * order, order % across * n, order // across * m], 1)
    out = s.tensor((1, across * n, 1, batch // across * m))
    s.ops.append(
        MatMul(
            **s.common(out),
            a=a,
            b=b,
            places=places,
            rows=m,
            depth=k,
            columns=n,
            scale=s.scales(1, k)[0],
            activation=s.activation(),
        )
    )


def make_transpose(s, rng):
    n, c, h, w = shape = some_shape(rng, channels=70)
    x = s.input(shape)
    out = s.tensor((n, h * w, 1, c), s.tensors[x].zero)
    s.ops.append(Transpose(**(s.common(out) | dict(low=-128, high=127)), x=x))


def make_shortcut(s, rng):
    """A convolution with an activation added to its sums."""
    make_conv(s, rng)
    op = s.ops[-1]
    factors = rng.integers(0, 400, len(op.bias)).astype(np.int32)
    shortcut = Shortcut(s.input(s.shape(op.output)), factors)
    s.ops[-1] = replace(op, shortcut=shortcut)


MAKERS = [
    make_binary,
    make_table,
    make_conv,
    make_shortcut,
    make_transposed,
    make_select,
    make_pool,
]
SQUARE = [make_product]
"""Those that take a square array."""
WINDOW = [make_pool, make_transpose, make_whole_pool]
"""Those that take the window engine."""
MAKERS += [make_product, make_transpose, make_whole_pool]


def makers(config):
    """Those that a configuration takes."""
    return [
        m
        for m in MAKERS
        if (m not in SQUARE or config.rows == config.cols) and (m not in WINDOW or config.window)
    ]


@pytest.mark.parametrize("make", MAKERS, ids=lambda m: m.__name__)
def test_operator_on_commands(make):
    for seed in range(40):
        rng = np.random.default_rng(seed)
        config = CONFIGS[seed % len(CONFIGS)]
        if make not in makers(config):
            continue
        sketch = Sketch(rng, constants=seed % 4 == 3)
        make(sketch, rng)
        graph = sketch.graph()
        inputs = {
            p.tensor: rng.integers(-128, 128, graph.tensors[p.tensor].shape).astype(np.int8)
            for p in graph.inputs
        }
        expected = golden.run(graph, inputs)
        with open_device("command", config, memory_bytes=64 << 20) as device:
            try:
                check_on(device, config, graph, inputs, expected)
            except BaseException as e:
                e.add_note(f"seed {seed}, {config.rows}x{config.cols}")
                raise
