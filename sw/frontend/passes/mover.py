"""Elements in another order: the tensors that lowering adds where an operator cannot read one as it
is stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import overload

import numpy as np

from systole.sw.frontend.passes import moves
from systole.sw.frontend.passes.emitter import Emitter
from systole.sw.frontend.passes.layout import LayoutError, OnnxView, Shape, default_layout, four
from systole.sw.frontend.passes.tensors import Activation, TensorTable
from systole.sw.frontend.passes.values import Dequantised, Node, Pending, Quant, Quantised
from systole.sw.ir.graph import ModelError, Select, Transpose


class Mover:
    """Tensors with the elements of others in another order, each built once.

    An order is an array ``index`` of places in the stored array, in the shape of the value that is
    wanted. All methods raise :class:`~sw.ir.graph.ModelError` for an order that no Select
    expresses."""

    def __init__(self, tensors: TensorTable, emitter: Emitter):
        self._tensors = tensors
        self._emitter = emitter
        self._rearranged: dict[tuple[str, tuple[int, ...], bytes], Dequantised] = {}
        """By tensor and order (shape and bytes)."""
        self._transposed: dict[str, str] = {}

    @overload
    def image(self, node: Node, x: Dequantised) -> tuple[Dequantised, Shape]: ...
    @overload
    def image(self, node: Node, x: Quantised) -> tuple[Quantised, Shape]: ...
    def image(self, node: Node, x: Activation) -> tuple[Activation, Shape]:
        """``x``, an image (N, C, H, W) or (N, C, W), in a tensor of that layout, and the tensor's
        shape."""
        if len(x.view.shape) not in (3, 4):
            raise node.fail(f"operand of rank {len(x.view.shape)}; 3 or 4 is needed")
        x = self.plain(node, x)
        return x, self._tensors.shape(x.tensor)

    @overload
    def plain(self, node: Node, x: Dequantised) -> Dequantised: ...
    @overload
    def plain(self, node: Node, x: Quantised) -> Quantised: ...
    def plain(self, node: Node, x: Activation) -> Activation:
        """``x`` in a tensor stored in the default layout of ``x``: its own, or one that its
        elements are moved to."""
        try:
            view = self._tensors.stored_view(x, default_layout(x.view))
            layout = default_layout(view)
            stored = self._tensors.shape(x.tensor)
            if stored == layout.shape and layout == OnnxView.contiguous(stored):
                return x
        except LayoutError:
            pass
        return self.rearranged(node, x, self._tensors.positions(x))

    @overload
    def rearranged(self, node: Node, x: Dequantised, index: np.ndarray) -> Dequantised: ...
    @overload
    def rearranged(self, node: Node, x: Quantised, index: np.ndarray) -> Quantised: ...
    def rearranged(self, node: Node, x: Activation, index: np.ndarray) -> Activation:
        """The elements of ``x``'s tensor at ``index``, in a tensor in default layout."""
        key = (x.tensor, index.shape, index.tobytes())
        if key not in self._rearranged:
            quant = self._tensors.known_quant(node, x.tensor)
            if self._tensors.is_constant(x.tensor):
                constant = self.chosen(node, x.tensor, index)
                self._tensors.stored_view(constant, default_layout(constant.view))
                self._rearranged[key] = constant
            else:
                self._rearranged[key] = self._carried(node, x, quant, index)
        moved = self._rearranged[key]
        return moved if isinstance(x, Dequantised) else Quantised(moved.tensor, moved.view)

    def chosen(self, node: Node, tensor: str, index: np.ndarray) -> Dequantised:
        """The elements at ``index`` of a constant tensor that has a layout, as another constant,
        which has none yet."""
        quant = self._tensors.quant(tensor)
        array = self._tensors.constant(tensor).reshape(-1)[index]
        name = self._tensors.add_constant(node, array, quant)
        return Dequantised(name, OnnxView.contiguous(array.shape), quant.scale)

    def _carried(self, node: Node, x: Activation, quant: Quant, index: np.ndarray) -> Dequantised:
        """The elements at ``index`` of the tensor of ``x``, brought there by operators: a Select,
        or one of the transposed tensor."""
        source = Dequantised(x.tensor, x.view, quant.scale)
        try:
            moved = self.moved(node, [source], index, plain=True)
        except ModelError:
            n, c, h, w = self._tensors.shape(x.tensor)
            places = np.arange(n * c * h * w, dtype=np.int32).reshape(n, h * w, c)
            other = places.transpose(0, 2, 1).reshape(-1)[index]
            source = replace(source, tensor=self.transposed(node, x))
            moved = self.moved(node, [source], other, plain=True)
        assert isinstance(moved.op, Select)
        (origin,) = moved.op.inputs
        if moves.is_identity(moved.op, moved.shape, self._tensors.shape(origin)):
            return Dequantised(origin, moved.view, quant.scale)
        settled = self._emitter.settle(moved)
        assert settled is not None, "a Select of one tensor keeps its quantisation"
        return settled

    def transposed(self, node: Node, x: Activation) -> str:
        """The tensor of ``x`` with channels and positions in each other's place."""
        if x.tensor not in self._transposed:
            quant = self._tensors.known_quant(node, x.tensor)
            n, c, h, w = self._tensors.shape(x.tensor)
            if self._tensors.is_constant(x.tensor):
                array = self._tensors.constant(x.tensor).reshape(n, c, h * w).transpose(0, 2, 1)
                laid_out = np.ascontiguousarray(array).reshape(n, h * w, 1, c)
                name = self._tensors.add_constant(node, laid_out, quant, stored=True)
            else:
                op = Transpose(**node.fields("Transpose"), x=x.tensor)
                name, shape = f"{x.tensor}:transposed", (n, h * w, 1, c)
                self._emitter.emit(op, name, shape=shape, quant=quant)
                self._emitter.move_last_behind(x.tensor)
            self._transposed[x.tensor] = name
        return self._transposed[x.tensor]

    def moved(
        self,
        node: Node,
        parts: Sequence[Dequantised],
        index: np.ndarray,
        *,
        fill: float = 0.0,
        plain: bool = False,
    ) -> Pending:
        """The elements at ``index`` of the tensors of ``parts`` put end to end, as the result of a
        Select; index -1 stands for the real number ``fill``. The result's layout is the cheapest,
        or with ``plain`` the default one."""
        if not (index >= 0).any():
            raise node.fail(f"its result {list(index.shape)} has no element of its operands")
        sources = [(p.tensor, float(p.scale), self._tensors.shape(p.tensor)) for p in parts]
        whole = OnnxView.contiguous(index.shape)
        candidates = []
        for layout in _layouts(whole, plain=plain):
            fit = moves.fit(index.reshape(-1)[layout.indices()], sources, fill == 0)
            if fit:
                candidates.append((moves.cost(fit, four(layout.shape)), layout, fit))
        if not candidates:
            raise node.fail(
                f"its result {list(index.shape)} takes elements of "
                f"{', '.join(f'{name!r} {list(shape)}' for name, _, shape in sources)} in no "
                f"regular order ({moves.MAX_PHASES} phases, {moves.MAX_PICKS} picks are the limit)"
            )
        _, layout, fit = min(candidates, key=lambda c: c[0])
        op = Select(
            **node.fields(),
            phases=fit.phases,
            steps=fit.steps,
            flat=fit.flat,
            across_images=fit.across_images,
        )
        return Pending(op, four(layout.shape), whole.rebase(layout), fill=fill)


def _layouts(whole: OnnxView, *, plain: bool) -> list[OnnxView]:
    """The (N, C, H, W) layouts to try for a result; ``plain``: of these the default alone, and for
    a matrix its rows as images."""
    layouts, shape = [default_layout(whole)], whole.shape
    if len(shape) == 2:
        layouts.append(whole.reshape((*shape, 1, 1)))
    elif len(shape) == 4 and not plain:
        layouts.append(whole.transpose((0, 3, 1, 2)))
    elif len(shape) == 3 and not plain:
        layouts.append(default_layout(whole.reshape((math.prod(shape[:2]), shape[2]))))
    return layouts
