"""Graphs of random operators, one maker for every kind that the compiler takes.

A maker appends an operator with inputs of its own to a :class:`Sketch`.
"""

from dataclasses import replace

import numpy as np

from systole.sw.ir.graph import (
    Activation,
    Binary,
    Conv,
    ConvTranspose,
    Graph,
    MatMul,
    Matrices,
    Normalise,
    Pick,
    Pool,
    Port,
    Select,
    Shortcut,
    Softmax,
    Table,
    Tensor,
    Transpose,
)


class Sketch:
    """A graph under construction, of random tensors.

    ``constants``: all inputs but the first become constants. ``uint8``: all weights are uint8 less
    a zero point of theirs.
    """

    def __init__(self, rng, constants=False, uint8=False):
        self.rng = rng
        self.uint8 = uint8
        self.constants = constants
        self.tensors = {}
        self.ops = []
        self.inputs = []

    def tensor(self, shape, zero=None):
        name = f"t{len(self.tensors)}"
        zero = int(self.rng.integers(-128, 128)) if zero is None else zero
        shape = tuple(int(s) for s in shape)
        self.tensors[name] = Tensor(name, shape, np.float32(0.1), zero, False, shape, (0, 1, 2, 3))
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
        if self.uint8:
            weights = self.rng.integers(0, 256, shape) - self.rng.integers(0, 256)
            return weights.astype(np.int16)
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
        return Graph("test", self.tensors, self.ops, self.inputs[:count], ports, constants)


def some_shape(rng, channels=40, size=14):
    return (int(rng.integers(1, 3)), *(int(v) for v in rng.integers(1, (channels, size, size))))


def make_binary(s, rng):
    shape = some_shape(rng)
    a = s.input(shape)
    b = s.input((*shape[:2], 1, 1) if rng.integers(2) else shape)
    ratios = rng.uniform(0.2, 1.5, 2)
    kind = str(rng.choice(["add", "sub", "mul"]))
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
            strides=tuple(int(v) for v in strides),
            pads=tuple(int(v) for v in pads),
            dilations=tuple(int(v) for v in dilations),
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
            strides=tuple(int(v) for v in strides),
            pads=tuple(int(v) for v in pads),
            dilations=tuple(int(v) for v in dilations),
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
    steps = tuple(int(v) for v in rng.choice([1, 1, 2, 3], 2))
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
                    x,
                    np.where((owner == k) | (sums and owner >= 0), taken, -1),
                    tuple(int(v) for v in rng.integers(1, 3, 2)),
                    tuple(int(v) for v in rng.integers(-3, 4, 2)),
                    common if sums else float(np.float32(rng.choice([1.0, rng.uniform(0.3, 2)]))),
                    int(rng.integers(-255, 255)) if sums else 1,
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
    kind = str(rng.choice(["max", "average"]))
    pads = (0, 0, 0, 0) if kind == "average" else tuple(int(k // 2) for k in kernel * 2)
    strides = (int(rng.integers(1, 4)), int(rng.integers(1, 4)))
    size = [
        (d + pads[i] + pads[i + 2] - k) // t + 1
        for i, (d, k, t) in enumerate(zip((h, w), kernel, strides))
    ]
    counts, scale = None, np.float32(0.7 / (kernel[0] * kernel[1]))
    if kind == "average" and rng.integers(2):
        # The last window of an axis hangs over: fewer elements count; so at the start, at random.
        scale = np.float32(0.7)
        counts = tuple(
            tuple(sorted(int(v) for v in rng.integers(1, k + 1, z))) for k, z in zip(kernel, size)
        )
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
    kind = str(rng.choice(["max", "average"]))
    x, out = s.input((n, c, h, w)), s.tensor((n, c, 1, 1))
    window = dict(kernel=(h, w), strides=(1, 1), pads=(0, 0, 0, 0))
    s.ops.append(
        Pool(**s.common(out), x=x, kind=kind, **window, scale=np.float32(0.7 / (h * w) ** 0.5))
    )


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


def make_softmax(s, rng):
    """Rows of any length; of some, only those up to their own number count."""
    shape = some_shape(rng, channels=70)
    (h, w), x, out = shape[2:], s.input(shape), s.tensor(shape)
    scales = np.float32([rng.choice([0.01, 0.1, 0.5]), rng.choice([1 / 256, 0.01, 1e-4])])
    period = int(rng.choice([0, h * w, w]))
    s.ops.append(Softmax(**s.common(out), x=x, x_scale=scales[0], y_scale=scales[1], period=period))


def make_normalise(s, rng):
    """Some channels have no gain, others one far smaller than their shift."""
    shape = some_shape(rng, channels=70)
    x, out = s.input(shape), s.tensor(shape)
    gain = rng.normal(1, 0.5, shape[1]) * rng.choice([1, 1, 1, 1e-4, 0], shape[1])
    s.ops.append(
        Normalise(
            **s.common(out),
            x=x,
            gain=gain,
            shift=rng.normal(0, 0.5, shape[1]),
            epsilon=float(rng.choice([1e-5, 1e-12])),
            centred=bool(rng.integers(2)),
            x_scale=np.float32(rng.choice([0.001, 0.1])),
            y_scale=np.float32(0.03),
        )
    )


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
WINDOW = [make_pool, make_transpose, make_whole_pool]
"""Makers of operators that need the window engine."""
ROWS = [make_softmax, make_normalise]
"""Makers of operators that need row operations."""
MAKERS += [make_product, make_transpose, make_whole_pool, *ROWS]


def takes_products(config):
    """Whether a configuration's array takes products of two activations."""
    return config.rows <= config.cols or config.rows.bit_count() == 1


def makers(config):
    """The makers of operators that a configuration can run."""
    return [
        m
        for m in MAKERS
        if (m is not make_product or takes_products(config))
        and (m not in WINDOW or config.window)
        and (m not in ROWS or config.row_ops)
    ]
