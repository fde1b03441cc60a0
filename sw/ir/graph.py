"""The quantised graph: what the loader makes of an ONNX file, the golden model evaluates and the
compiler lowers.

Every activation is an int8 array of shape (N, C, H, W). uint8 tensors of the model are held shifted
by -128, zero points likewise, so that nothing behind the loader knows of uint8. A matrix (M, K) is
the tensor (1, K, 1, M): features are channels, rows are columns of an image one pixel high."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from systole.isa import rows

BinaryKind = Literal["add", "sub", "mul"]
PortType = Literal["float32", "int8", "uint8"]


class ModelError(ValueError):
    """A model that cannot be taken: one sentence naming node, attribute, value and limit."""

    node: str | None = None
    """Name of the first output of the node it is about, where known."""


def first_line(error: BaseException) -> str:
    """What an error says first; the libraries' have no class in common, and some say nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class Tensor:
    """An activation and how it stands in the ONNX model.

    ``array.transpose(perm).reshape(shape)`` takes the model's array of ``onnx_shape`` to (N, C, H,
    W)."""

    name: str
    shape: tuple[int, int, int, int]
    scale: np.float32
    zero: int
    """Zero point in the int8 domain, -128..127."""
    unsigned: bool
    """The model holds it as uint8 (this int8 + 128)."""
    onnx_shape: tuple[int, ...]
    perm: tuple[int, ...]

    def from_onnx(self, array: np.ndarray) -> np.ndarray:
        """The model's int8/uint8 array as int8 (N, C, H, W)."""
        if self.unsigned:
            array = (array.astype(np.int16) - 128).astype(np.int8)
        return np.ascontiguousarray(array.transpose(self.perm).reshape(self.shape))

    def to_onnx(self, array: np.ndarray) -> np.ndarray:
        """int8 (N, C, H, W) as the model's int8/uint8 array."""
        out = array.reshape([self.onnx_shape[p] for p in self.perm])
        out = np.ascontiguousarray(out.transpose(np.argsort(self.perm)))
        return (out.astype(np.int16) + 128).astype(np.uint8) if self.unsigned else out


@dataclass(frozen=True)
class Port:
    """A graph input or output: the model's value name, its element type, and the tensor behind it.

    ``dtype`` float32 means that the host quantises (input) or dequantises (output)."""

    name: str
    tensor: str
    dtype: PortType
    limit: int = 256
    """Integers that only the host reads are below this: rows of a table, for instance."""


@dataclass(frozen=True)
class Residual:
    """An addition fused behind a convolution: out = add(conv, other)."""

    other: str
    mid_zero: int
    """Zero point of the convolution's own (intermediate) int8 output."""
    mid_low: int
    mid_high: int
    """Clamp of the intermediate output."""
    conv_ratio: float
    """scale of the intermediate / scale of the result (float32 quotient)."""
    other_ratio: float
    """scale of ``other`` / scale of the result (float32 quotient)."""
    mid_name: str
    """Name of the intermediate in the model."""
    name: str
    """Name of the addition's node."""


@dataclass(frozen=True, eq=False)
class Shortcut:
    """An activation added to a convolution's sums: sums[o] += factors[o] * (other - zero point),
    channel by channel."""

    other: str
    factors: np.ndarray
    """int32 (O,), at least 0."""


@dataclass(frozen=True, eq=False)
class Activation:
    """A function fused behind an operator: the operator's own int8 result (``zero`` its zero point,
    clamped to the operator's ``low``/``high``) indexes the table."""

    mid_name: str
    """The operator's own result in the model."""
    zero: int
    values: np.ndarray
    """int8 (256,): out = values[result + 128]."""


@dataclass(frozen=True, eq=False)
class Op:
    """One operator. ``low``/``high`` clamp the int8 result (fused activation)."""

    name: str
    op_type: str
    """The ONNX operator type(s), for reports: ``Conv``, ``Gemm``, ``Conv+Add`` ..."""
    output: str
    low: int
    high: int

    @property
    def inputs(self) -> tuple[str, ...]:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Conv(Op):
    """Convolution, Gemm, MatMul by a constant (kernel 1x1)."""

    x: str
    weights: np.ndarray
    """(O, C/group, kh, kw): int8, or int16 within -255..255 (uint8 weights less their zero
    point)."""
    bias: np.ndarray
    """int32 (O,), zeros if the model has none. The input's zero point is not folded in."""
    scale: np.ndarray
    """float32 (O,): x_scale * w_scale / y_scale (y: the intermediate if there is a residual),
    computed in float32 in onnxruntime's order."""
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    """top, left, bottom, right."""
    dilations: tuple[int, int]
    group: int = 1
    residual: Residual | None = None
    activation: Activation | None = None
    """Behind the residual, if there is one."""
    shortcut: Shortcut | None = None
    off: np.ndarray | None = None
    """float64 (O,): by how many units of the sums ``bias``, which is whole, is off the model's;
    None: by none."""

    @property
    def inputs(self) -> tuple[str, ...]:
        others = (each.other for each in (self.shortcut, self.residual) if each)
        return (self.x, *others)

    @property
    def depthwise(self) -> bool:
        """One input and one output channel per group."""
        return self.group > 1 and self.weights.shape[:2] == (self.group, 1)


@dataclass(frozen=True, eq=False)
class Pool(Op):
    """Max or average pooling; ``scale`` (average only) is x_scale / (y_scale * window size)."""

    x: str
    kind: Literal["max", "average"]
    kernel: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int] = (1, 1)
    scale: np.float32 = field(default=np.float32(1))
    counts: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    """Average only: the elements that each row and each column of windows counts, where padding
    does not count; ``scale`` is x_scale / y_scale then."""

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.x,)

    def scale_of(self, count: int) -> np.float32:
        """The scale of a window that counts ``count`` elements; ``counts`` is given."""
        return np.float32(self.scale / np.float32(count))

    def window(self, shape: tuple[int, int, int, int], limit: int) -> tuple[int, int]:
        """The kernel on an input of ``shape``. One that takes the whole image and is too large is
        seen with other rows and columns, at most ``limit`` each, if there are such."""
        size = shape[2] * shape[3]
        if self.kernel != shape[2:] or any(self.pads) or max(self.kernel) <= limit:
            return self.kernel
        divisors = (d for d in range(min(limit, size), 0, -1) if size % d == 0)
        rows = next(divisors)
        return (rows, size // rows) if size // rows <= limit else self.kernel

    @property
    def pointwise(self) -> bool:
        """A window of one element: a clamp alone (max), a change of scale (average)."""
        return self.kernel == self.strides == (1, 1) and not any(self.pads)

    @property
    def is_clamp(self) -> bool:
        """A maximum over one element, which only clamps it."""
        return self.kind == "max" and self.pointwise


@dataclass(frozen=True, eq=False)
class Binary(Op):
    """out = a + b, a - b or a * b, element by element. ``b`` has the shape of ``a``, or one row and
    column that stand for all (N, C, 1, 1).

    Ratios are float32 quotients scale(input) / scale(output); for ``mul`` ``a_ratio`` is
    scale(a) * scale(b) / scale(output) and ``b_ratio`` 1."""

    kind: BinaryKind
    a: str
    b: str
    a_ratio: float
    b_ratio: float
    activation: Activation | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.a, self.b)


@dataclass(frozen=True, eq=False)
class Table(Op):
    """out = values[x + 128]: any function of one int8."""

    x: str
    values: np.ndarray
    """int8 (256,)."""

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.x,)


@dataclass(frozen=True)
class Pick:
    """Where output channels come from: ``channels[o]`` is the channel of ``x`` that output channel
    o takes, or -1 for none. Output position (y, x) of the phase takes input position (y *
    strides[0] + offsets[0], x * strides[1] + offsets[1]), the zero point outside the input."""

    x: str
    channels: np.ndarray
    strides: tuple[int, int] = (1, 1)
    offsets: tuple[int, int] = (0, 0)
    scale: float = 1.0
    """x_scale / y_scale; less by the weights' common denominator."""
    weight: int = 1
    """Within -255..254."""


@dataclass(frozen=True, eq=False)
class Select(Op):
    """Moves elements, changing scales on the way: concatenation, slices, padding, channel shuffles,
    resizing, depth to space and back.

    The output is interleaved of ``steps[0] * steps[1]`` phases; ``phases[py * steps[1] + px]``
    makes the positions (py + i * steps[0], px + j * steps[1]). In a phase every output channel is
    the sum of its picks, each ``weight * (x - zero point)`` and nothing outside its input,
    requantised once: their scales are the same. A channel of no pick is ``fill`` everywhere."""

    phases: list[list[Pick]]
    steps: tuple[int, int] = (1, 1)
    fill: int = 0
    """int8."""
    flat: bool = False
    """Rows and columns of the output and of all inputs count as one row."""
    across_images: bool = False
    """Elements move between images: inputs and output count as one image each, (1, N * C, H, W).
    Else the elements of all images move alike."""

    def seen(self, shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """A tensor of this shape as ``flat`` and ``across_images`` say."""
        n, c, h, w = shape
        if self.across_images:
            n, c = 1, n * c
        return (n, c, 1, h * w) if self.flat else (n, c, h, w)

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(p.x for phase in self.phases for p in phase))


@dataclass(frozen=True, eq=False)
class ConvTranspose(Op):
    """Transposed convolution: out[y * s - p + ky * d] += x[y] * w[ky], likewise in x."""

    x: str
    weights: np.ndarray
    """(O, C, kh, kw), int8 or int16 as of a convolution: ONNX's (C, O / group, kh, kw) with the
    first two axes swapped and groups spread out, zeros between them."""
    bias: np.ndarray
    scale: np.ndarray
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    """top, left, bottom, right, as ONNX (they crop the output)."""
    dilations: tuple[int, int] = (1, 1)
    group: int = 1
    activation: Activation | None = None
    off: np.ndarray | None = None
    """As of a convolution."""

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.x,)


@dataclass(frozen=True, eq=False)
class Matrices:
    """The matrices of an operand of a product: matrix i is elements [n, c:, p:] of ``tensor`` seen
    as (N, C, H * W), with (n, c, p) = places[i]; its sizes are the operator's."""

    tensor: str
    places: np.ndarray
    """int64 (batch, 3)."""


@dataclass(frozen=True, eq=False)
class MatMul(Op):
    """Products of activations, out[i, m, n] = sum over k of a[i, m, k] * b[i, k, n].

    The columns of every matrix are channels, its rows positions: of ``a`` K channels at M
    positions, of ``b`` N channels at K positions, of the output N channels at M positions."""

    a: Matrices
    b: Matrices
    places: np.ndarray
    """Places of the output's matrices, which are all of it."""
    rows: int
    """M."""
    depth: int
    """K."""
    columns: int
    """N."""
    scale: np.float32
    """a_scale * b_scale / y_scale."""
    activation: Activation | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.a.tensor, self.b.tensor)

    @property
    def batch(self) -> int:
        return len(self.a.places)


@dataclass(frozen=True, eq=False)
class Softmax(Op):
    """Softmax over the channels of every position: out = exp(x) / sum of exp(x)."""

    x: str
    x_scale: np.float32
    y_scale: np.float32
    period: int = 0
    """Positions of one causal matrix, row by row: position p takes channels 0 to p modulo this
    alone. 0: all positions take all channels."""
    mask: str | None = None
    """Tensor of the channels of ``x`` that are left out: those where it is negative. It has one
    image for all or as many as ``x``, and one position for all or as many."""

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.x,) if self.mask is None else (self.x, self.mask)


@dataclass(frozen=True, eq=False)
class Normalise(Op):
    """The channels of every position less their mean, divided by their standard deviation, times
    ``gain``, plus ``shift``. A position without its mean taken off is divided by the root of its
    mean square."""

    x: str
    gain: np.ndarray
    """float64 (channels,)."""
    shift: np.ndarray
    """float64 (channels,)."""
    epsilon: float
    """Added to the variance."""
    centred: bool
    """The mean is taken off."""
    x_scale: np.float32
    y_scale: np.float32

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.x,)


def normalisation(op: Normalise) -> rows.NormaliseParameters:
    """The operator's parameters. Raises ``ValueError`` for an epsilon that is too large."""
    return rows.NormaliseParameters.of_scales(
        op.gain,
        op.shift,
        x=float(op.x_scale),
        y=float(op.y_scale),
        epsilon=op.epsilon,
        centred=op.centred,
    )


def shares(op: Softmax) -> rows.SoftmaxParameters:
    """The operator's parameters."""
    return rows.SoftmaxParameters.of_scales(float(op.x_scale), float(op.y_scale))


@dataclass(frozen=True, eq=False)
class Transpose(Op):
    """Channels and positions change places: (N, C, H, W) to (N, H * W, 1, C), or some channels
    alone: as many as the output has columns. It does not clamp."""

    x: str
    first: int = 0
    """The first of these channels."""

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.x,)


@dataclass(frozen=True)
class Graph:
    """Operators in topological order; every op's output is a key of ``tensors``."""

    name: str
    tensors: dict[str, Tensor]
    ops: list[Op]
    inputs: list[Port]
    outputs: list[Port]
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    """Tensors that nothing computes: positional embeddings, masks; int8 (N, C, H, W) by name."""


def macs(op: Op, graph: Graph) -> int:
    """Useful multiply-accumulates of an operator (padding counted, as published figures do)."""
    if isinstance(op, ConvTranspose):
        n, _, h, w = graph.tensors[op.x].shape
        return n * h * w * int(np.prod(op.weights.shape)) // op.group
    if isinstance(op, MatMul):
        return int(np.prod(graph.tensors[op.output].shape)) * op.depth
    if not isinstance(op, Conv):
        return 0
    n, _, h, w = graph.tensors[op.output].shape
    return n * h * w * int(np.prod(op.weights.shape))
