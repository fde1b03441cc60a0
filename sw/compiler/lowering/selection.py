"""Lowering of Select: convolutions by permutation matrices, which move channels on the array."""

from __future__ import annotations

import dataclasses

import numpy as np

from systole.sw.compiler.lowering.array import (
    KernelPass,
    KernelPhase,
    Permutation,
    array_stage,
    kernel_parts,
)
from systole.sw.compiler.lowering.context import LoweringContext, Size, flattened, side_by_side
from systole.sw.compiler.stages import Geometry, Stage
from systole.sw.ir.graph import Pick, Select


def lower_select(context: LoweringContext, layer: int, op: Select) -> Stage:
    """A Select. Its output is a phase for each of its phases, with a pass for each pick."""
    if op.across_images:
        return _across_images(context, layer, op)
    numbers = {name: k for k, name in enumerate(op.inputs)}
    phases, params = [], []
    for k, picks in enumerate(op.phases):
        # A phase of fill alone still has to clear the accumulators.
        passes = picks or [Pick(op.inputs[0], np.full(context.tensors[op.output].shape[1], -1))]
        y, x = divmod(k, op.steps[1])
        phases.append(KernelPhase(y, x, _kernel_passes(context, passes, numbers)))
        params.append(_phase_params(context, op, passes))
    sizes = _Sizes.of(context, op, phases)
    sources = tuple(
        context.source(name, _windows(phases, k), sizes.inputs[k], per_group=False)
        for name, k in numbers.items()
    )
    return array_stage(
        context,
        layer,
        op,
        size=sizes.phase,
        out_size=sizes.output,
        sources=sources,
        phases=phases,
        params=np.concatenate(params),
        steps=op.steps,
        requant=context.requant(op),
        striped=not op.flat,
    )


def _kernel_passes(
    context: LoweringContext, picks: list[Pick], numbers: dict[str, int]
) -> list[KernelPass]:
    """The passes of one phase; ``numbers`` of the inputs."""
    return [
        KernelPass(numbers[pick.x], _geometry(pick), kernel, zero)
        for pick in picks
        for kernel, zero in _permutations(context, pick)
    ]


def _geometry(pick: Pick) -> Geometry:
    return Geometry((1, 1), pick.strides, (-pick.offsets[0], -pick.offsets[1]))


def _permutations(context: LoweringContext, pick: Pick) -> list[tuple[Permutation, int]]:
    """The kernels that together bring a pick's channels to their places, weighted; with their zero
    points."""
    taken = np.flatnonzero(pick.channels >= 0)
    size = (len(pick.channels), context.tensors[pick.x].shape[1])
    parts = kernel_parts(np.asarray(pick.weight if len(taken) else 0), context.config)
    return [
        (Permutation(size, taken, pick.channels[taken], int(part)), zero) for part, zero in parts
    ]


def _phase_params(context: LoweringContext, op: Select, picks: list[Pick]) -> np.ndarray:
    """The parameters of one phase: bias and scale of every channel."""
    out = context.tensors[op.output]
    channels = out.shape[1]
    scale = np.ones(channels, np.float32)
    bias = np.full(channels, op.fill - out.zero, np.int64)
    for pick in picks:
        bias[pick.channels >= 0] = 0
    for pick in picks:
        taken = pick.channels >= 0
        scale[taken] = pick.scale
        bias[taken] -= context.tensors[pick.x].zero * pick.weight
    return context.params(op, bias, scale, context.config.lanes)


def _windows(phases: list[KernelPhase], source: int) -> list[Geometry]:
    """The windows through which a source is read."""
    passes = (each for phase in phases for each in phase.passes)
    return list(dict.fromkeys(each.geometry for each in passes if each.source == source))


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Rows and columns of a Select's images as the array sees them."""

    phase: Size
    """Outputs of the largest phase."""
    output: Size
    inputs: list[Size]

    @staticmethod
    def of(context: LoweringContext, op: Select, phases: list[KernelPhase]) -> _Sizes:
        h, w = context.size(op.output)
        inputs = [context.size(x) for x in op.inputs]
        if op.flat:
            h, w = 1, h * w
            inputs = [(1, rows * columns) for rows, columns in inputs]
        if op.steps == (1, 1) and all(size == (h, w) for size in inputs):
            geometries = [each.geometry for phase in phases for each in phase.passes]
            size = flattened((h, w), geometries)
            return _Sizes(size, size, [size] * len(inputs))
        steps_y, steps_x = op.steps
        return _Sizes((-(-h // steps_y), -(-w // steps_x)), (h, w), inputs)


def _across_images(context: LoweringContext, layer: int, op: Select) -> Stage:
    """A Select that moves elements between images: all tensors are seen as single images."""
    seen, places = {}, {}
    for name in (*op.inputs, op.output):
        tensor = context.tensors[name]
        whole, per_image = side_by_side(tensor.shape, tensor.shape[2:], context.config)
        seen[name] = dataclasses.replace(tensor, shape=whole)
        # Where each channel of each image lies in the single image.
        image, channel = np.divmod(np.arange(tensor.shape[0] * tensor.shape[1]), tensor.shape[1])
        places[name] = image * per_image + channel
    phases = []
    for picks in op.phases:
        moved = []
        for pick in picks:
            channels = np.full(seen[op.output].shape[1], -1)
            taken = np.flatnonzero(pick.channels >= 0)
            channels[places[op.output][taken]] = places[pick.x][pick.channels[taken]]
            moved.append(dataclasses.replace(pick, channels=channels))
        phases.append(moved)
    whole_op = dataclasses.replace(op, phases=phases, across_images=False)
    stage = lower_select(context.seeing(*seen.values()), layer, whole_op)
    return dataclasses.replace(stage, striped=False)
