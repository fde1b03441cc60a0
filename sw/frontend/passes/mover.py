"""Elements in another order: the tensors that lowering adds where an operator cannot read one as it
is stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import overload

import numpy as np

from systole.sw.frontend.passes import moves, separate
from systole.sw.frontend.passes.emitter import Emitter
from systole.sw.frontend.passes.layout import LayoutError, OnnxView, Shape, default_layout, four
from systole.sw.frontend.passes.tensors import Activation, TensorTable
from systole.sw.frontend.passes.values import Dequantised, Node, Pending, Quant, Quantised
from systole.sw.ir.graph import Pick, Select, Transpose


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
        if self.is_plain(x):
            return x
        return self.rearranged(node, x, self._tensors.positions(x))

    def is_plain(self, x: Activation) -> bool:
        """Whether ``x`` is in a tensor stored in its default layout, which it gets if it has none
        yet."""
        try:
            layout = default_layout(self._tensors.stored_view(x, default_layout(x.view)))
        except LayoutError:
            return False
        stored = self._tensors.shape(x.tensor)
        return stored == layout.shape and layout == OnnxView.contiguous(stored)

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
        or one of the transposed tensor, or several."""
        source = Dequantised(x.tensor, x.view, quant.scale)
        moved = self._at_once(node, [source], index, plain=True)
        if moved is None:
            n, c, h, w = self._tensors.shape(x.tensor)
            places = np.arange(n * c * h * w, dtype=np.int32).reshape(n, h * w, c)
            other = np.where(index < 0, -1, places.transpose(0, 2, 1).reshape(-1)[index])
            turned = replace(source, tensor=self.transposed(node, x))
            moved = self._at_once(node, [turned], other, plain=True)
        if moved is None:
            moved = self.moved(node, [source], index, plain=True)
        assert isinstance(moved.op, Select)
        origin = moved.op.inputs[0]
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
        or with ``plain`` the default one. Where it takes several Selects, the others are emitted
        first."""
        if not (index >= 0).any():
            raise node.fail(f"its result {list(index.shape)} has no element of its operands")
        moved = self._at_once(node, parts, index, fill=fill, plain=plain)
        if moved is not None:
            return moved
        nearer = self._nearer(node, parts, index)
        if nearer is not None:
            return self.moved(node, *nearer, fill=fill, plain=plain)
        shapes = (f"{p.tensor!r} {list(self._tensors.shape(p.tensor))}" for p in parts)
        raise node.fail(
            f"its result {list(index.shape)} takes elements of {', '.join(shapes)} in no "
            f"regular order ({moves.MAX_PHASES} phases, {moves.MAX_PICKS} picks are the limit)"
        )

    def channels(self, node: Node, x: Dequantised, index: np.ndarray) -> Pending | None:
        """The elements of the tensor of ``x`` at ``index``, if they are some consecutive channels
        and all of these: stored as they are there, whatever the order they are seen in. None if
        they are not."""
        n, c, h, w = shape = self._tensors.shape(x.tensor)
        count, rest = divmod(index.size, n * h * w)
        if not count or rest or count == c or index.min() < 0:
            return None
        first = int(index.min()) // (h * w) % c
        image, place = np.divmod(index, c * h * w)
        channel = place // (h * w) - first
        if channel.min() < 0 or channel.max() >= count:
            return None
        inside = (image * count + channel) * (h * w) + place % (h * w)
        view = OnnxView.of_indices(inside)
        if view is None or view.repeats or not _is_whole(view):
            return None
        taken = np.arange(first, first + count)
        pick = replace(moves.identity(x.tensor, shape, float(x.scale)), channels=taken)
        op = Select(**node.fields(), phases=[[pick]])
        return Pending(op, (n, count, h, w), view)

    def _at_once(
        self,
        node: Node,
        parts: Sequence[Dequantised],
        index: np.ndarray,
        *,
        fill: float = 0.0,
        plain: bool = False,
    ) -> Pending | None:
        """As :meth:`moved`, by one Select; None if it takes several."""
        sources = [(p.tensor, float(p.scale), self._tensors.shape(p.tensor)) for p in parts]
        whole = OnnxView.contiguous(index.shape)
        candidates: list[tuple[int, OnnxView, moves.Fit]] = []
        gapless = bool((index >= 0).all())
        for layout in _layouts(whole, plain=plain):
            least = moves.least_cost(four(layout.shape)) if gapless else 0
            if candidates and candidates[0][0] <= least:
                continue
            places = index.reshape(-1)[layout.indices()]
            fit = moves.fit(places, sources)
            if fit:
                candidates.append((moves.cost(fit, four(layout.shape)), layout, fit))
        if not candidates:
            return None
        _, layout, fit = min(candidates, key=lambda c: c[0])
        phases, marks = fit.phases, None
        if fill != 0:
            places = index.reshape(-1)[layout.indices()]
            phases, marks = self._marked(node, fit, places, fill)
        op = Select(
            **node.fields(),
            phases=phases,
            steps=fit.steps,
            flat=fit.flat,
            across_images=fit.across_images,
        )
        return Pending(op, four(layout.shape), whole.rebase(layout), fill=fill, marks=marks)

    def _marked(
        self, node: Node, fit: moves.Fit, places: np.ndarray, fill: float
    ) -> tuple[list[list[Pick]], str | None]:
        """The phases of a fit, which leaves zeros where ``places`` are none, with picks of marks
        for these, and the marks; no marks where only whole channels of a phase have none."""
        patterns, numbers = moves.gaps(fit, places)
        if patterns is None:
            return fit.phases, None
        quant = Quant(np.float32(1), 0, False)
        array = np.where(patterns, np.int8(-1 if fill > 0 else 1), np.int8(0))
        name = self._tensors.add_constant(node, array, quant, stored=True)
        return moves.with_marks(fit, name, numbers), name

    def _nearer(
        self, node: Node, parts: Sequence[Dequantised], index: np.ndarray
    ) -> tuple[list[Dequantised], np.ndarray] | None:
        """Other parts, made of the one of ``parts``, and places in these that are ``index`` again:
        a movement along one axis less, or of pieces that are in order. None if there is none."""
        if len(parts) != 1:
            return None
        (x,) = parts
        layout = default_layout(OnnxView.contiguous(index.shape))
        places = index.reshape(-1)[layout.indices()]
        back = np.argsort(layout.indices(), axis=None)
        steps = separate.axis_step(places, self._tensors.shape(x.tensor))
        if steps is not None:
            first, second = steps
            return [self._in_order(node, x, first)], second.reshape(-1)[back].reshape(index.shape)
        cut = separate.pieces(places, self._tensors.shape(x.tensor))
        if cut is None:
            return None
        axis, pieces = cut
        moved: list[Dequantised] = []
        found, start = [], 0
        for piece in pieces:
            own = np.arange(start, start + piece.size, dtype=np.int32).reshape(piece.shape)
            found.append(np.where(piece < 0, -1, own))
            if (piece >= 0).any():
                moved.append(self._in_order(node, x, piece))
                start += piece.size
        return moved, np.concatenate(found, axis).reshape(-1)[back].reshape(index.shape)

    def _in_order(self, node: Node, x: Dequantised, index: np.ndarray) -> Dequantised:
        """As :meth:`rearranged`, in a tensor stored as ``index`` (N, C, H, W) and with the scale of
        ``x``."""
        moved = self.rearranged(node, x, index)
        assert self._tensors.shape(moved.tensor) == index.shape
        return replace(moved, scale=x.scale)


def _is_whole(view: OnnxView) -> bool:
    """Whether every element of the base array is in the view, once."""
    atoms = sorted((stride, size) for dim in view.dims for size, stride in dim)
    reach = 1
    for stride, size in atoms:
        if stride != reach:
            return False
        reach *= size
    return True


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
