"""The golden model: every operator of the graph in numpy, exactly as the hardware computes it.

It is the specification of the RTL. The arithmetic is ``isa.numerics``; here are the geometry
and the sums. Integer sums run through float BLAS wherever every partial sum is exact there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from systole.isa import numerics
from systole.isa import rows as row_numerics
from systole.sw.ir.graph import (
    Activation,
    Binary,
    BinaryKind,
    Conv,
    ConvTranspose,
    Graph,
    MatMul,
    Normalise,
    Op,
    Pick,
    Pool,
    Port,
    Select,
    Softmax,
    Table,
    Tensor,
    Transpose,
    normalisation,
    shares,
)

CHUNK = 1 << 22
"""Elements of the largest intermediate (im2col) array, to bound memory."""
NO_BIAS = np.zeros((), np.int64)
FLOAT32_REACH = (1 << 24) // 255
"""Product sums of zero-shifted int8 stay exact in float32 while their weights' magnitudes are not
more than this together."""


def run(graph: Graph, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All tensors as int8 (N, C, H, W), given those behind the graph's input ports. Constants and
    the intermediates of fused residuals and activations (as ``mid_name``) are among them."""
    tensors = dict(graph.constants)
    for port in graph.inputs:
        array = np.asarray(inputs[port.tensor])
        wanted = graph.tensors[port.tensor].shape
        if array.dtype != np.int8 or array.shape != wanted:
            raise ValueError(
                f"input {port.tensor!r} is {array.dtype} {array.shape}; int8 {wanted} is needed"
            )
        tensors[port.tensor] = array
    for op in graph.ops:
        tensors.update(evaluate(op, graph, tensors))
    return tensors


def evaluate(op: Op, graph: Graph, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors that one operator computes from those it reads."""
    if isinstance(op, Conv):
        return _conv(op, graph, tensors)
    if isinstance(op, ConvTranspose):
        return _activated(op, op.activation, _transposed(op, graph, tensors[op.x]))
    if isinstance(op, Pool):
        return {op.output: _pool(op, graph, tensors[op.x])}
    if isinstance(op, Select):
        return {op.output: _select(op, graph, tensors)}
    if isinstance(op, MatMul):
        return _activated(op, op.activation, _product(op, graph, tensors))
    if isinstance(op, Transpose):
        shape = graph.tensors[op.output].shape
        x = tensors[op.x][:, op.first : op.first + shape[3]]
        return {op.output: x.reshape(*x.shape[:2], -1).transpose(0, 2, 1).reshape(shape)}
    if isinstance(op, Softmax):
        return {op.output: _softmax(op, graph, tensors)}
    if isinstance(op, Normalise):
        return {op.output: _normalise(op, graph, tensors[op.x])}
    if isinstance(op, Table):
        return {op.output: np.clip(numerics.lookup(tensors[op.x], op.values), op.low, op.high)}
    assert isinstance(op, Binary)
    total = _combined(
        op.kind,
        _Operand(tensors[op.a], graph.tensors[op.a].zero, op.a_ratio),
        _Operand(tensors[op.b], graph.tensors[op.b].zero, op.b_ratio),
        zero=own_zero(op, op.activation, graph),
        low=op.low,
        high=op.high,
    )
    return _activated(op, op.activation, total)


def _softmax(op: Softmax, graph: Graph, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    out = row_numerics.softmax(
        np.moveaxis(tensors[op.x], 1, -1),
        shares(op),
        np.moveaxis(counted(op, tensors), 1, -1),
        zero=graph.tensors[op.output].zero,
        low=op.low,
        high=op.high,
    )
    return np.moveaxis(out, -1, 1)


def counted(op: Softmax, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """The channels of every position that count: bool, to be broadcast to the operand's shape."""
    _, channels, h, w = tensors[op.x].shape
    inside = np.ones((1, channels, 1, 1), bool)
    if op.period:
        last = np.arange(h * w).reshape(h, w) % op.period
        inside = (np.arange(channels)[:, None, None] <= last)[None]
    return inside if op.mask is None else inside & (tensors[op.mask] >= 0)


def _normalise(op: Normalise, graph: Graph, x: np.ndarray) -> np.ndarray:
    out = row_numerics.normalise(
        np.moveaxis(x, 1, -1),
        normalisation(op),
        x_zero=graph.tensors[op.x].zero,
        zero=graph.tensors[op.output].zero,
        low=op.low,
        high=op.high,
    )
    return np.moveaxis(out, -1, 1)


def own_zero(op: Op, activation: Activation | None, graph: Graph) -> int:
    """Zero point of ``op``'s own result, in front of its activation if it has one."""
    return activation.zero if activation else graph.tensors[op.output].zero


def _activated(op: Op, activation: Activation | None, own: np.ndarray) -> dict[str, np.ndarray]:
    """``op``'s own result, and what its activation makes of it."""
    if activation is None:
        return {op.output: own}
    return {activation.mid_name: own, op.output: numerics.lookup(own, activation.values)}


class _Operand(NamedTuple):
    """An operand of elementwise arithmetic; ``ratio`` is its scale divided by the result's."""

    array: np.ndarray
    zero: int
    ratio: float


def _combined(
    kind: BinaryKind, a: _Operand, b: _Operand, *, zero: int, low: int, high: int
) -> np.ndarray:
    """Two operands combined, as a result of zero point ``zero`` within ``low``..``high``."""
    if kind == "mul":
        (ma,), shift = numerics.split_ratios(a.ratio)
        mb = 0
    else:
        (ma, mb), shift = numerics.split_ratios(a.ratio, b.ratio)
    return numerics.combine(
        kind,
        a.array,
        b.array,
        za=a.zero,
        zb=b.zero,
        zo=zero,
        ma=ma,
        mb=mb,
        shift=shift,
        low=low,
        high=high,
    )


def _conv(op: Conv, graph: Graph, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    x, residual = tensors[op.x], op.residual
    multiplier, shift = numerics.split_scale(op.scale)
    out = np.empty(graph.tensors[op.output].shape, np.int8)
    final = own_zero(op, op.activation, graph)
    zero, low, high = final, op.low, op.high
    if residual:
        zero, low, high = residual.mid_zero, residual.mid_low, residual.mid_high
    for n, rows, acc in accumulate(op, x, graph.tensors[op.x].zero):
        if op.shortcut:
            other = tensors[op.shortcut.other][n, :, rows].astype(np.int64)
            other -= graph.tensors[op.shortcut.other].zero
            acc += np.moveaxis(other, 0, -1) * op.shortcut.factors
        result = numerics.requantise(
            acc,
            bias=op.bias,
            multiplier=multiplier,
            shift=shift,
            zero=zero,
            low=low,
            high=high,
        )
        out[n, :, rows] = np.moveaxis(result, -1, 0)
    if not residual:
        return _activated(op, op.activation, out)
    total = _combined(
        "add",
        _Operand(out, residual.mid_zero, residual.conv_ratio),
        _Operand(tensors[residual.other], graph.tensors[residual.other].zero, residual.other_ratio),
        zero=final,
        low=op.low,
        high=op.high,
    )
    return {residual.mid_name: out} | _activated(op, op.activation, total)


def accumulate(op: Conv, x: np.ndarray, zero: int) -> Iterator[tuple[int, slice, np.ndarray]]:
    """The convolution's sums of (x - zero) * w, bias not added, in pieces: image, output rows,
    int64 (rows, columns, output channels)."""
    outputs, depth, kh, kw = op.weights.shape
    for n, image in enumerate(x):
        taps = window_taps(
            image,
            kernel=(kh, kw),
            strides=op.strides,
            pads=op.pads,
            dilations=op.dilations,
            zero=zero,
            pad=zero,
        )
        columns = taps.shape[4]
        if depth == 1 and op.group > 1:
            elements = outputs * columns
        else:
            elements = max(depth * kh * kw, outputs) * columns
        step = max(CHUNK // elements, 1)
        for at in range(0, taps.shape[3], step):
            rows = slice(at, min(at + step, taps.shape[3]))
            yield n, rows, _sums(op, taps[:, :, :, rows])


def _sums(op: Conv, taps: np.ndarray) -> np.ndarray:
    """Product sums of the taps (C, kh, kw, rows, columns), int64 (rows, columns, O)."""
    outputs, depth, kh, kw = op.weights.shape
    rows, columns = taps.shape[3:]
    if depth == 1 and op.group > 1:
        acc = np.zeros((outputs, rows, columns), np.int64)
        for ky in range(kh):
            for kx in range(kw):
                tap = np.repeat(taps[:, ky, kx], outputs // op.group, axis=0).astype(np.int32)
                acc += tap * op.weights[:, 0, ky, kx, None, None]
        return np.moveaxis(acc, 0, -1)
    terms = depth * kh * kw
    reach = np.abs(op.weights.reshape(outputs, terms).astype(np.int64)).sum(axis=1).max()
    kind: np.dtype = np.dtype(np.float32 if reach <= FLOAT32_REACH else np.float64)
    weights = op.weights.reshape(op.group, outputs // op.group, terms).astype(kind)
    acc = np.empty((rows * columns, outputs), np.int64)
    for g, w in enumerate(weights):
        part = taps[g * depth : (g + 1) * depth].reshape(terms, rows * columns).astype(kind)
        acc[:, g * len(w) : (g + 1) * len(w)] = (w @ part).T
    return acc.reshape(rows, columns, outputs)


def window_taps(
    image: np.ndarray,
    *,
    kernel: tuple[int, int],
    strides: tuple[int, int],
    pads: tuple[int, int, int, int],
    dilations: tuple[int, int],
    zero: int,
    pad: int,
) -> np.ndarray:
    """A view (C, kh, kw, H_out, W_out) of ``image - zero`` (int16), padded with ``pad - zero``."""
    top, left, bottom, right = pads
    image = image.astype(np.int16) - zero
    image = np.pad(image, ((0, 0), (top, bottom), (left, right)), constant_values=pad - zero)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(image, reach, axis=(1, 2))
    windows = windows[
        :, :: strides[0], :: strides[1], :: dilations[0], :: dilations[1]
    ]  # C, H_out, W_out, kh, kw
    return windows.transpose(0, 3, 4, 1, 2)


def _pool(op: Pool, graph: Graph, x: np.ndarray) -> np.ndarray:
    tensor = graph.tensors[op.output]
    out = np.empty(tensor.shape, np.int8)
    average = op.kind == "average"
    zero = graph.tensors[op.x].zero if average else 0
    multiplier, shift = numerics.split_scale(pool_scales(op))
    for n, image in enumerate(x):
        taps = window_taps(
            image,
            kernel=op.kernel,
            strides=op.strides,
            pads=op.pads,
            dilations=op.dilations,
            zero=zero,
            pad=zero if average else -128,
        )
        if average:
            out[n] = numerics.requantise(
                taps.sum(axis=(1, 2), dtype=np.int64),
                bias=NO_BIAS,
                multiplier=multiplier,
                shift=shift,
                zero=tensor.zero,
                low=op.low,
                high=op.high,
            )
        else:
            out[n] = np.clip(taps.max(axis=(1, 2)), op.low, op.high)
    return out


def pool_scales(op: Pool) -> np.ndarray:
    """The scale of every window (rows, columns), or one for all."""
    if op.counts is None:
        return np.asarray(op.scale)
    scales = [[op.scale_of(row * column) for column in op.counts[1]] for row in op.counts[0]]
    return np.array(scales)


def _transposed(op: ConvTranspose, graph: Graph, x: np.ndarray) -> np.ndarray:
    tensor = graph.tensors[op.output]
    zero = own_zero(op, op.activation, graph)
    multiplier, shift = numerics.split_scale(op.scale)
    out = np.empty(tensor.shape, np.int8)
    for i, image in enumerate(x):
        acc = spread(op, image.astype(np.float64) - graph.tensors[op.x].zero, tensor.shape)
        result = numerics.requantise(
            np.moveaxis(acc, 0, -1),
            bias=op.bias,
            multiplier=multiplier,
            shift=shift,
            zero=zero,
            low=op.low,
            high=op.high,
        )
        out[i] = np.moveaxis(result, -1, 0)
    return out


def spread(op: ConvTranspose, image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A transposed convolution's sums of ``image`` (C, H, W), float64 less its zero point, times
    the weights: int64 (O, H_out, W_out) of an output of ``shape``, bias not added."""
    outputs, depth, kh, kw = op.weights.shape
    (sy, sx), (dy, dx) = op.strides, op.dilations
    (top, left, bottom, right), (out_h, out_w) = op.pads, shape[2:]
    h, w = image.shape[1:]
    image = image.reshape(depth, h * w)
    acc = np.zeros((outputs, top + out_h + bottom, left + out_w + right), np.int64)
    for ky in range(kh):
        for kx in range(kw):
            part = op.weights[:, :, ky, kx].astype(np.float64) @ image
            rows = slice(ky * dy, ky * dy + (h - 1) * sy + 1, sy)
            columns = slice(kx * dx, kx * dx + (w - 1) * sx + 1, sx)
            acc[:, rows, columns] += part.reshape(outputs, h, w).astype(np.int64)
    return acc[:, top : top + out_h, left : left + out_w]


def _select(op: Select, graph: Graph, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    tensor = graph.tensors[op.output]
    sy, sx = op.steps
    out = np.full(tensor.shape, np.clip(op.fill, op.low, op.high), np.int8)
    seen = out.reshape(op.seen(tensor.shape))
    for at, picks in enumerate(op.phases):
        phase = seen[:, :, at // sx :: sy, at % sx :: sx]
        total = np.zeros(phase.shape, np.int64)
        for pick in picks:
            source = tensors[pick.x]
            source = source.reshape(op.seen(source.shape))
            add_pick(total, pick, source, graph.tensors[pick.x].zero)
        scale = channel_scales(op, picks, phase.shape[1])
        taken = np.flatnonzero(scale)
        multiplier, shift = numerics.split_scale(scale[taken])
        result = numerics.requantise(
            np.moveaxis(total[:, taken], 1, -1),
            bias=NO_BIAS,
            multiplier=multiplier,
            shift=shift,
            zero=tensor.zero,
            low=op.low,
            high=op.high,
        )
        phase[:, taken] = np.moveaxis(result, -1, 1)
    return out


def channel_scales(op: Select, picks: Sequence[Pick], channels: int) -> np.ndarray:
    """The scale of every output channel of a phase, 0 of one that no pick gives."""
    scale = np.zeros(channels, np.float32)
    for pick in picks:
        taken = pick.channels >= 0
        own = scale[taken]
        if ((own != 0) & (own != np.float32(pick.scale))).any():
            raise ValueError(f"{op.name}: picks of one channel differ in scale")
        scale[taken] = pick.scale
    return scale


def add_pick(total: np.ndarray, pick: Pick, source: np.ndarray, zero: int) -> None:
    """Adds a pick's elements of ``source``, less their zero point, to a phase's sums."""
    taken = np.flatnonzero(pick.channels >= 0)
    rows, columns = (
        np.arange(count) * stride + offset
        for count, stride, offset in zip(total.shape[2:], pick.strides, pick.offsets, strict=True)
    )
    inside = [
        np.flatnonzero((places >= 0) & (places < size))
        for places, size in zip((rows, columns), source.shape[2:], strict=True)
    ]
    moved = source[:, pick.channels[taken]][:, :, rows[inside[0]]]
    moved = moved[..., columns[inside[1]]].astype(np.int64) - zero
    total[np.ix_(np.arange(len(total)), taken, *inside)] += moved * pick.weight


def _product(op: MatMul, graph: Graph, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    tensor = graph.tensors[op.output]
    zero = own_zero(op, op.activation, graph)
    multiplier, shift = numerics.split_scale(np.asarray(op.scale))
    a, b = (
        tensors[m.tensor].astype(np.float64) - graph.tensors[m.tensor].zero for m in (op.a, op.b)
    )
    return numerics.requantise(
        products(op, a, b, tensor.shape),
        bias=NO_BIAS,
        multiplier=multiplier,
        shift=shift,
        zero=zero,
        low=op.low,
        high=op.high,
    )


def products(op: MatMul, a: np.ndarray, b: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The sums of a product of activations ``a`` and ``b``, float64 (N, C, H, W) less their zero
    points: int64 of ``shape``, the output's."""
    a, b = (x.reshape(*x.shape[:2], -1) for x in (a, b))
    out = np.empty((*shape[:2], shape[2] * shape[3]), np.int64)
    for (n, c, p), at, bt in zip(op.places, op.a.places, op.b.places, strict=True):
        left = a[at[0], at[1] : at[1] + op.depth, at[2] : at[2] + op.rows]
        right = b[bt[0], bt[1] : bt[1] + op.columns, bt[2] : bt[2] + op.depth]
        out[n, c : c + op.columns, p : p + op.rows] = right @ left
    return out.reshape(shape)


def quantise_input(port: Port, tensor: Tensor, array: np.ndarray) -> np.ndarray:
    """What the host gives the accelerator for a model's input array: int8 (N, C, H, W). Quantises a
    float32 port as QuantizeLinear does: ``saturate(rint(x / scale) + zero)`` in float32."""
    array = np.asarray(array)
    if array.dtype != np.dtype(port.dtype) or array.shape != tensor.onnx_shape:
        raise ValueError(
            f"input {port.name!r} is {array.dtype} {array.shape}; "
            f"{port.dtype} {tensor.onnx_shape} is needed"
        )
    if port.dtype != "float32":
        return tensor.from_onnx(array)
    if np.isnan(array).any():  # a mask may hold minus infinity
        raise ValueError(f"input {port.name!r} has values that are no numbers")
    number = np.clip(np.rint(array / tensor.scale) + tensor.zero, -128, 127).astype(np.int8)
    return np.ascontiguousarray(number.transpose(tensor.perm).reshape(tensor.shape))


def dequantise_output(port: Port, tensor: Tensor, array: np.ndarray) -> np.ndarray:
    """What the host returns for a result in int8 (N, C, H, W): the model's array, dequantised for a
    float32 port."""
    out = tensor.to_onnx(array)
    if port.dtype != "float32":
        return out
    zero = tensor.zero + (128 if tensor.unsigned else 0)
    return (out.astype(np.int32) - zero).astype(np.float32) * tensor.scale
