"""Lowering of convolution and transposed convolution to the array."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from systole.isa import Config
from systole.sw.compiler.lowering.array import (
    KernelPass,
    KernelPhase,
    array_stage,
    kernel_parts,
)
from systole.sw.compiler.lowering.context import LoweringContext, Size, flattened
from systole.sw.compiler.lowering.folding import (
    choose_fold,
    folded_kernel,
    packed_source,
    row_geometry,
)
from systole.sw.compiler.lowering.vector import add
from systole.sw.compiler.stages import POINTWISE, Combine, Fold, Geometry, Requant, Source, Stage
from systole.sw.ir.graph import Conv, ConvTranspose


def lower_conv(context: LoweringContext, layer: int, op: Conv) -> Stage:
    """A convolution with its fused additions and function.

    Groups are spread out; weights that no zero point makes int8 become several passes."""
    main = _folded_main(context, op) if op.x in context.packed else _plain_main(context, op)
    size, sources, passes = main.size, main.sources, main.passes
    bias = op.bias.astype(np.int64) - context.tensors[op.x].zero * _sums(op.weights)
    if op.shortcut is not None:
        other, factors = op.shortcut.other, op.shortcut.factors
        bias -= context.tensors[other].zero * factors.astype(np.int64)
        parts = kernel_parts(np.diag(factors)[:, :, None, None], context.config)
        passes += [KernelPass(len(sources), POINTWISE, part, zero) for part, zero in parts]
        sources.append(context.source(other, [POINTWISE], size, per_group=False))
    requant: Requant = context.requant(op, op.activation)
    combine: Combine | None = None
    if op.residual is not None:
        r = op.residual
        sources.append(context.source(r.other, [POINTWISE], size, per_group=True))
        combine = add(
            op,
            requant,
            zeros=(r.mid_zero, context.tensors[r.other].zero),
            scales=(r.conv_ratio, r.other_ratio),
        )
        requant = Requant(r.mid_zero, r.mid_low, r.mid_high)
    return array_stage(
        context,
        layer,
        op,
        size=size,
        out_size=size,
        sources=tuple(sources),
        phases=[KernelPhase(0, 0, passes)],
        params=context.params(op, bias, op.scale, context.config.lanes),
        requant=requant,
        combine=combine,
        fold=main.fold,
        table=context.table(op.activation),
    )


class _Main(NamedTuple):
    """A convolution without what is added to it."""

    size: Size
    """Rows and columns of the output, which may be seen as one row."""
    sources: list[Source]
    passes: list[KernelPass]
    fold: Fold | None


def _folded_main(context: LoweringContext, op: Conv) -> _Main:
    """The convolution of a packed input. WINDOW gathers its bytes first."""
    fold = choose_fold(context, op)
    geometry = row_geometry(fold.geometry) if fold.by_row else POINTWISE
    passes = _passes(geometry, [folded_kernel(op.weights, fold)], context.config)
    return _Main(context.size(op.output), [packed_source(context, op, fold)], passes, fold)


def _plain_main(context: LoweringContext, op: Conv) -> _Main:
    """The convolution of a tensor, or of its parts where it is virtual."""
    geometry = Geometry(op.weights.shape[2:], op.strides, op.pads[:2], op.dilations)
    out_size = context.size(op.output)
    size = flattened(out_size, [geometry])
    in_size = context.size(op.x) if size == out_size else size
    names, kernels = zip(*_parts(context, op.x, _dense(op)))
    sources = [context.source(name, [geometry], in_size, per_group=False) for name in names]
    return _Main(size, sources, _passes(geometry, kernels, context.config), None)


def _passes(geometry: Geometry, kernels: Iterable[np.ndarray], config: Config) -> list[KernelPass]:
    """Passes of one kernel for each source, split into kernels of int8."""
    return [
        KernelPass(k, geometry, part, zero)
        for k, kernel in enumerate(kernels)
        for part, zero in kernel_parts(kernel, config)
    ]


def _dense(op: Conv) -> np.ndarray:
    """The kernel with groups spread out: (O, C, kh, kw)."""
    if op.group == 1:
        return op.weights
    o, c = op.weights.shape[:2]
    per = o // op.group
    out = np.zeros((o, c * op.group, *op.weights.shape[2:]), op.weights.dtype)
    for g in range(op.group):
        out[g * per : (g + 1) * per, g * c : (g + 1) * c] = op.weights[g * per : (g + 1) * per]
    return out


def _parts(
    context: LoweringContext, name: str, weights: np.ndarray
) -> list[tuple[str, np.ndarray]]:
    """The tensors that a kernel (O, C, kh, kw) over ``name`` reads, with their kernels."""
    parts = context.parts.get(name)
    if parts is None:
        return [(name, weights)]
    out = []
    for part in parts:
        taken = np.flatnonzero(part.channels >= 0)
        channels = part.channels[taken]
        several = len(np.unique(channels)) < len(channels)
        size = (len(weights), context.tensors[part.tensor].shape[1], *weights.shape[2:])
        kernel = np.zeros(size, np.int32 if several else weights.dtype)
        # Channels first: one that is taken several times gets the sum of its weights.
        np.add.at(kernel.swapaxes(0, 1), channels, weights[:, taken].swapaxes(0, 1))
        out.append((part.tensor, kernel))
    return out


# Transposed convolution ---------------------------------------------------------------------------


def lower_transposed(context: LoweringContext, layer: int, op: ConvTranspose) -> Stage:
    """A transposed convolution, as one phase of plain convolution for each output position modulo
    the stride.

    Output rows py + i * s take the kernel rows k = py + p (mod s), in reverse order."""
    x = context.tensors[op.x]
    h, w = out_size = context.size(op.output)
    sh, sw = op.strides
    rows = [_phase_taps(op, 0, py) for py in range(min(sh, h))]
    columns = [_phase_taps(op, 1, px) for px in range(min(sw, w))]
    names, kernels = zip(*_parts(context, op.x, op.weights))
    phases = [
        _transposed_phase(kernels, row, column, context.config)
        for row in enumerate(rows)
        for column in enumerate(columns)
    ]
    biases = [op.bias.astype(np.int64) - x.zero * _phase_sums(phase) for phase in phases]
    lanes = context.config.lanes
    geometries = [phase.passes[0].geometry for phase in phases]
    return array_stage(
        context,
        layer,
        op,
        size=(-(-h // sh), -(-w // sw)),
        out_size=out_size,
        sources=tuple(
            context.source(name, geometries, x.shape[2:], per_group=False) for name in names
        ),
        phases=phases,
        params=np.concatenate([context.params(op, bias, op.scale, lanes) for bias in biases]),
        steps=op.strides,
        requant=context.requant(op, op.activation),
        table=context.table(op.activation),
    )


class _Taps(NamedTuple):
    """A plain convolution along one axis that makes the outputs of one phase."""

    kernel: list[int]
    """Positions in the transposed kernel, in the order that the input comes."""
    pad: int
    dilation: int

    @property
    def size(self) -> int:
        """Kernel size; without a tap, one of zeros."""
        return max(len(self.kernel), 1)


def _phase_taps(op: ConvTranspose, axis: int, p: int) -> _Taps:
    """The convolution that makes outputs p + i * stride along an axis."""
    stride, dilation, pad = op.strides[axis], op.dilations[axis], op.pads[axis]
    taps = [k for k in range(op.weights.shape[2 + axis]) if (p + pad - k * dilation) % stride == 0]
    if not taps:
        return _Taps([], 0, 1)
    # Tap k of output i reads input i + (p + pad - k * dilation) / stride.
    offsets = [(p + pad - k * dilation) // stride for k in taps]
    step = offsets[0] - offsets[1] if len(taps) > 1 else 1
    return _Taps(taps[::-1], -offsets[-1], step)


def _transposed_phase(
    kernels: Iterable[np.ndarray],
    row: tuple[int, _Taps],
    column: tuple[int, _Taps],
    config: Config,
) -> KernelPhase:
    """A phase from its number and taps along either axis; one kernel for each source."""
    (py, y), (px, x) = row, column
    geometry = Geometry((y.size, x.size), (1, 1), (y.pad, x.pad), (y.dilation, x.dilation))
    passes = []
    for k, weights in enumerate(kernels):
        for part, zero in kernel_parts(weights, config):
            kernel = part[:, :, y.kernel][:, :, :, x.kernel]
            if kernel.size == 0:  # no kernel element falls here: bias alone
                kernel = np.zeros((*part.shape[:2], *geometry.kernel), np.int8)
            passes.append(KernelPass(k, geometry, kernel, zero))
    return KernelPhase(py, px, passes)


def _sums(kernel: np.ndarray) -> np.ndarray:
    """Sums of weights by output channel."""
    return kernel.reshape(len(kernel), -1).sum(1, dtype=np.int64)


def _phase_sums(phase: KernelPhase) -> np.ndarray:
    """Sums of the weights of a phase by output channel."""
    kernels = [each.kernel for each in phase.passes if isinstance(each.kernel, np.ndarray)]
    return np.sum([_sums(kernel) for kernel in kernels], axis=0)
