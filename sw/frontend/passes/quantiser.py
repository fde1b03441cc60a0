"""QuantizeLinear on symbolic values: operators that waited for a scale are emitted."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import replace

import numpy as np

from systole.sw.frontend.passes import channels, finish, moves, pieces
from systole.sw.frontend.passes.emitter import Emitter
from systole.sw.frontend.passes.layout import LayoutError
from systole.sw.frontend.passes.mover import Mover
from systole.sw.frontend.passes.tensors import TensorTable
from systole.sw.frontend.passes.values import (
    ADVICE,
    Affine,
    Computed,
    Dequantised,
    Function,
    Node,
    Pending,
    Quant,
    Quantised,
    RealInput,
    Value,
)
from systole.sw.ir.graph import (
    Binary,
    Conv,
    ConvTranspose,
    MatMul,
    Normalise,
    Op,
    Pool,
    Select,
    Softmax,
    Table,
)


class Quantiser:
    """What QuantizeLinear does to each kind of value.

    A pending operator is emitted with the scale and the clamps of its result, once for each
    different quantisation."""

    def __init__(self, tensors: TensorTable, emitter: Emitter, mover: Mover):
        self._tensors = tensors
        self._emitter = emitter
        self._mover = mover
        self._emitted: dict[Hashable, str] = {}
        """Tensors of quantised results, by the value and its quantisation."""
        self._rescaled: dict[tuple[str, Quant], str] = {}
        """Tensors brought to another scale, by tensor and quantisation."""

    def quantise(self, node: Node, value: Value | None, quant: Quant) -> Quantised:
        """``value`` quantised as ``quant``; its tensor is named by the output of ``node``."""
        if isinstance(value, Pending):
            key: Hashable = (value.op, value.low, value.high, quant)
        elif isinstance(value, Function | Affine | Computed):
            key = (value, quant)
        else:
            return self._quantise(node, value, quant)
        if key in self._emitted:
            return Quantised(self._emitted[key], value.view)
        result = self._quantise(node, value, quant)
        if result.view is value.view:
            self._emitted[key] = result.tensor
        return result

    def pointwise(self, node: Node, x: Dequantised) -> Pending:
        """``x`` as the result of an operator that changes nothing, to clamp or requantise it."""
        try:
            view = self._tensors.stored_view(x)
        except LayoutError:  # stored in an order that its view does not go along with
            x = self._mover.plain(node, x)
            view = self._tensors.checked_view(node, x)
        shape = self._tensors.shape(x.tensor)
        return Pending(finish.whole(node, x.tensor, shape, float(x.scale)), shape, view)

    def _quantise(self, node: Node, value: Value | None, quant: Quant) -> Quantised:
        if isinstance(value, RealInput):
            return self._quantise_input(node, value, quant)
        if isinstance(value, Dequantised):
            if replace(self._tensors.quant(value.tensor), scale=value.scale) == quant:
                return Quantised(value.tensor, value.view)
            value = self.pointwise(node, value)
        if isinstance(value, Affine):
            return self._quantise_channels(node, value, quant)
        if isinstance(value, Computed):
            return self._quantise_computed(node, value, quant)
        if isinstance(value, Function):
            value = finish.table(node, value, self._tensors.shape(value.tensor), quant)
        if not isinstance(value, Pending):
            raise node.fail("its operand is neither an activation nor a float input")
        _check_error(node, value, quant)
        op = self._scaled(node, value, quant)
        if op is None:
            (tensor,) = value.op.inputs
            return Quantised(tensor, self._tensors.model_view(node, tensor, value.view))
        name = self._emitter.emit(
            op,
            node.output,
            shape=value.shape,
            quant=quant,
            low=quant.value(value.low),
            high=quant.value(value.high),
        )
        return Quantised(name, value.view)

    def _quantise_input(self, node: Node, value: RealInput, quant: Quant) -> Quantised:
        tensor = self._tensors.input_tensor(value.name)
        if tensor is None:
            tensor = node.output
            self._tensors.add_input(
                value.name, value.shape, tensor=tensor, unsigned=quant.unsigned, quant=quant
            )
        elif self._tensors.quant(tensor) != quant:
            raise node.fail(f"input {value.name!r} is quantised in two ways")
        return Quantised(tensor, value.view)

    def _scaled(self, node: Node, value: Pending, quant: Quant) -> Op | None:
        """The operator with its result quantised as ``quant``; None if it does nothing then."""
        op = value.op
        if isinstance(op, Conv | ConvTranspose):
            return replace(op, scale=finish.checked(node, op.scale / quant.scale))
        if isinstance(op, MatMul):
            return replace(op, scale=finish.checked(node, op.scale / quant.scale))
        if isinstance(op, Binary):
            return finish.scaled_binary(node, op, quant)
        if isinstance(op, Softmax | Normalise):
            return finish.scaled_row(node, op, quant)
        if isinstance(op, Select):
            return self._scaled_select(node, value, op, quant)
        if isinstance(op, Pool) and op.kind == "average":
            window = np.float32(1 if op.counts else math.prod(op.kernel))
            scale = finish.checked(node, op.scale / (quant.scale * window))
            return replace(op, scale=scale)
        if isinstance(op, Pool):
            return self._scaled_maximum(node, value, op, quant)
        return op

    def _scaled_select(
        self, node: Node, value: Pending, op: Select, quant: Quant
    ) -> Select | Pool | None:
        """A Select with the scales and the fill of its result. One that moves nothing is None if
        it does not clamp either, else a maximum of one element, where the scales allow it."""
        op = self._with_common_scales(node, finish.marked(value, op, quant), quant)
        scaled = finish.scaled_select(node, op, value.fill, quant)
        source = op.inputs[0]
        same = moves.is_identity(op, value.shape, self._tensors.shape(source))
        if same and scaled.phases[0][0].scale == 1:
            own = self._tensors.quant(source)
            unclamped = (quant.value(value.low), quant.value(value.high)) == (-128, 127)
            # The view of a graph input counts in the model's array, that of the result does not.
            unchanged = unclamped and not self._tensors.relaid(source)
            if unchanged and (own.zero, own.unsigned) == (quant.zero, quant.unsigned):
                return None
            if own.zero == quant.zero:
                return finish.clamp(op)
        return scaled

    def _with_common_scales(self, node: Node, op: Select, quant: Quant) -> Select:
        """The Select with picks of one scale for every channel: tensors that share a channel and
        have another scale than the result are brought to the result's first."""
        mixed = {name for picks in op.phases for name in finish.of_mixed_scales(picks)}
        rescaled: dict[str, str] = {}
        for tensor in sorted(mixed):
            scale = next(p.scale for picks in op.phases for p in picks if p.x == tensor)
            if scale != float(quant.scale):
                rescaled[tensor] = self._rescale(node, tensor, scale, quant)
        phases = [
            [
                replace(p, x=rescaled[p.x], scale=float(quant.scale)) if p.x in rescaled else p
                for p in picks
            ]
            for picks in op.phases
        ]
        return replace(op, phases=phases)

    def _rescale(self, node: Node, tensor: str, scale: float, quant: Quant) -> str:
        """``tensor``, whose scale counts as ``scale``, quantised as ``quant``."""
        key = (tensor, quant)
        if key not in self._rescaled:
            ratio = float(finish.checked(node, np.float32(scale) / quant.scale))
            shape = self._tensors.shape(tensor)
            self._rescaled[key] = self._emitter.emit(
                finish.whole(node, tensor, shape, ratio),
                f"{tensor}:in the scale of {node.output}",
                shape=shape,
                quant=quant,
            )
        return self._rescaled[key]

    def _scaled_maximum(self, node: Node, value: Pending, op: Pool, quant: Quant) -> Op:
        """A maximum to another scale or zero point: first the maximum in its operand's, then the
        change of scale. (They commute.)"""
        own = self._tensors.quant(op.x)
        source = Quant(op.scale, own.zero, own.unsigned)
        op = replace(op, scale=np.float32(1))
        if (source.scale, source.zero) == (quant.scale, quant.zero):
            return op
        name = f"{op.name}:before requantisation"
        self._emitter.emit(op, name, shape=value.shape, quant=source)
        scale = float(finish.checked(node, source.scale / quant.scale))
        return finish.whole(node, name, value.shape, scale)

    def _quantise_channels(self, node: Node, x: Affine, quant: Quant) -> Quantised:
        """A gain and a shift per channel: one depthwise convolution; of a PRelu with slopes per
        channel two operators and their sum."""
        shape = self._tensors.shape(x.tensor)
        low, high = quant.value(x.low), quant.value(x.high)
        if x.below is None:
            gain, shift = finish.in_units(x, x.gain, quant)
            op: Op = channels.affine(node, x, gain, shift)
        else:
            above = self._above_zero(node, x, quant)
            below = self._below_zero(node, x, x.below, quant)
            fields = node.fields("+".join(x.op_types), name=x.name)
            op = Binary(**fields, kind="add", a=above, b=below, a_ratio=1.0, b_ratio=1.0)
        self._emitter.emit(op, node.output, shape=shape, quant=quant, low=low, high=high)
        return Quantised(node.output, x.view)

    def _quantise_computed(self, node: Node, f: Computed, quant: Quant) -> Quantised:
        """A function of a result: the operator and a table, once for each piece, and their sum."""
        reach = pieces.reach_of(f.x.op, self._tensors)
        found = pieces.pieces_of(f.compute, quant, reach)
        if not found:
            raise node.fail(
                f"its operand is {f.op_types[-1]} of the unquantised result of {f.x.op.op_type} "
                f"{f.x.op.name!r}, which int8 does not represent closely enough: a QuantizeLinear "
                f"and DequantizeLinear are needed between these ({ADVICE})"
            )
        if len(found) == 1:
            self._emit_piece(node, f, found[0], node.output, quant)
            return Quantised(node.output, f.view)
        names = [f"{node.output}:{side} zero" for side in ("below", "above")]
        at_zero = int(np.rint(f.compute(np.zeros(1, np.float32))[0] / quant.scale)) + quant.zero
        zeros = (quant.zero, int(np.clip(at_zero, -128, 127)))
        for piece, name, zero in zip(found, names, zeros, strict=True):
            self._emit_piece(node, f, piece, name, replace(quant, zero=zero))
        below, above = names
        fields = node.fields("Add")
        total = Binary(**fields, kind="add", a=below, b=above, a_ratio=1.0, b_ratio=1.0)
        self._emitter.emit(total, node.output, shape=f.x.shape, quant=quant)
        return Quantised(node.output, f.view)

    def _emit_piece(
        self, node: Node, f: Computed, piece: pieces.GridPiece, name: str, quant: Quant
    ) -> None:
        """A piece of ``f``, quantised as ``quant``, as tensor ``name``."""
        _check_error(node, f.x, piece.quant)
        op = self._scaled(node, f.x, piece.quant)
        assert op is not None, "an operator that computes does something"
        shape, low, high = f.x.shape, piece.low, piece.high
        if piece.values is None:
            op = replace(op, op_type="+".join((op.op_type, *f.op_types)))
            self._emitter.emit(op, name, shape=shape, quant=quant, low=low, high=high)
            return
        own = f"{name}:unquantised"
        self._emitter.emit(op, own, shape=shape, quant=piece.quant, low=low, high=high)
        table = Table(**node.fields("+".join(f.op_types)), x=own, values=piece.values)
        self._emitter.emit(table, name, shape=shape, quant=quant)

    def _above_zero(self, node: Node, x: Affine, quant: Quant) -> str:
        """A PRelu's result where its operand is positive, 0 elsewhere, by a table."""
        shape, own = self._tensors.shape(x.tensor), self._tensors.quant(x.tensor)
        real = np.maximum(np.arange(-128, 128) - own.zero, 0).astype(np.float32) * x.scale
        table = finish.table(node, Function(x.tensor, x.view, real, x.op_types), shape, quant)
        op = replace(table.op, name=x.name)
        return self._emitter.emit(op, f"{node.output}:above zero", shape=shape, quant=quant)

    def _below_zero(self, node: Node, x: Affine, slopes: np.ndarray, quant: Quant) -> str:
        """A PRelu's result where its operand is negative, 0 elsewhere: a gain per channel and a
        clamp, which is that of the operand where slopes have both signs."""
        shape, own = self._tensors.shape(x.tensor), self._tensors.quant(x.tensor)
        low, high = -128, 127
        if (slopes >= 0).all():
            high = quant.zero
        elif (slopes <= 0).all():
            low = quant.zero
        else:
            clamp = finish.clamp(finish.whole(node, x.tensor, shape, 1.0))
            negative = self._emitter.emit(
                replace(clamp, name=x.name),
                f"{node.output}:negative",
                shape=shape,
                quant=own,
                high=own.zero,
            )
            x = replace(x, tensor=negative)
        op = channels.affine(node, x, *finish.in_units(x, slopes, quant))
        name = f"{node.output}:below zero"
        return self._emitter.emit(op, name, shape=shape, quant=quant, low=low, high=high)


def _check_error(node: Node, value: Pending, quant: Quant) -> None:
    """Refuse a result that an operand's int8 codes falsify by more than half a step."""
    if value.off > quant.scale / 2:
        raise node.fail(
            f"int8 cannot represent an operand of {value.op.op_type} {value.op.name!r} closely "
            f"enough: error {value.off / quant.scale:.2g} output steps, at most 0.5 allowed"
        )
