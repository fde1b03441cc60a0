"""The tensor table: what lowering knows of every stored tensor, its quantisation and its layout."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace

import numpy as np

from systole.sw.frontend.passes.layout import (
    LayoutError,
    OnnxView,
    Shape,
    default_layout,
    four,
    input_perm,
    merge,
    output_perm,
)
from systole.sw.frontend.passes.values import Dequantised, Node, Quant, Quantised
from systole.sw.ir.graph import Tensor

Activation = Quantised | Dequantised


@dataclass
class _Entry:
    """One tensor. ``shape`` is None until the tensor has a layout, ``quant`` until it has a scale;
    ``layout`` is the stored form as a view of the model's array (graph inputs and constants).
    ``order`` is the order of the axes of a graph input in which it is best stored."""

    unsigned: bool
    quant: Quant | None
    shape: Shape | None
    onnx_shape: tuple[int, ...] | None = None
    perm: tuple[int, ...] | None = None
    layout: OnnxView | None = None
    order: tuple[int, ...] | None = None


class TensorTable:
    """The stored tensors by name: graph inputs, constants and results of operators.

    A result has its layout, the (N, C, H, W) array in which it is stored, from the start. A graph
    input or a constant gets its layout from the first operator that reads it, and an int8 or uint8
    graph input its scale from the first DequantizeLinear.

    Views of a tensor without a layout count in the model's array; :meth:`stored_view` and
    :meth:`positions` give places in the stored array, and fix the layout if need be."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._constants: dict[str, np.ndarray] = {}
        """Arrays of the constant tensors, int8 in the model's own shape."""
        self._inputs: dict[str, str] = {}
        """Tensor of each graph input by the input's name; float inputs once they are quantised."""
        self._orders: dict[str, tuple[int, ...]] = {}
        """Orders of the axes of graph inputs, by the inputs' names."""

    # Tensors -------------------------------------------------------------------------------------

    def add_result(self, name: str, quant: Quant, shape: Shape) -> None:
        """Add an operator's result, stored as (N, C, H, W) ``shape``."""
        self._entries[name] = _Entry(quant.unsigned, quant, shape)

    def add_input(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        tensor: str,
        unsigned: bool,
        quant: Quant | None = None,
    ) -> None:
        """Add graph input ``name`` of the model's ``shape`` as ``tensor``, without a layout."""
        self._inputs[name] = tensor
        order = self._orders.get(name)
        self._entries[tensor] = _Entry(unsigned, quant, None, shape, order=order)

    def set_order(self, name: str, order: tuple[int, ...]) -> None:
        """Note in which order of its axes graph input ``name`` is best stored, where the operator
        that lays it out has no wish."""
        self._orders[name] = order

    def add_constant(
        self, node: Node, array: np.ndarray, quant: Quant, *, stored: bool = False
    ) -> str:
        """Add an int8 constant that ``node`` needs and return its name. ``stored`` says that
        ``array`` is (N, C, H, W) as it is to lie; otherwise it has the model's shape and no layout
        yet."""
        name = f"{node.name}:constant {len(self._constants)}"
        self._constants[name] = array
        self._entries[name] = _Entry(
            unsigned=quant.unsigned,
            quant=quant,
            shape=four(array.shape) if stored else None,
            onnx_shape=array.shape,
            perm=tuple(range(array.ndim)),
        )
        return name

    def input_tensor(self, name: str) -> str | None:
        """The tensor behind graph input ``name``; None for a float input not quantised yet."""
        return self._inputs.get(name)

    def is_input(self, tensor: str) -> bool:
        return tensor in self._inputs.values()

    def is_constant(self, tensor: str) -> bool:
        return tensor in self._constants

    def constant(self, tensor: str) -> np.ndarray:
        """The int8 (N, C, H, W) array of a constant tensor that has a layout."""
        entry = self._entries[tensor]
        return self._constants[tensor].transpose(entry.perm).reshape(self.shape(tensor))

    def free_name(self, name: str) -> str:
        """``name``, lengthened until no tensor has it."""
        while name in self._entries:
            name = f"{name}:quantised"
        return name

    # Quantisation --------------------------------------------------------------------------------

    def is_unsigned(self, tensor: str) -> bool:
        return self._entries[tensor].unsigned

    def quant(self, tensor: str) -> Quant:
        """The quantisation of a tensor, which has one."""
        quant = self._entries[tensor].quant
        assert quant is not None, f"tensor {tensor!r} has no scale yet"
        return quant

    def known_quant(self, node: Node, tensor: str) -> Quant:
        """The quantisation of a tensor that ``node`` reads as int8 or uint8, without a scale of
        its own. Raises :class:`~sw.ir.graph.ModelError` if nothing has given it one."""
        quant = self._entries[tensor].quant
        if quant is None:
            raise node.fail(f"the scale of input {tensor!r} is not known here")
        return quant

    def quantise_as(self, tensor: str, quant: Quant) -> Quant:
        """The tensor's quantisation, which becomes ``quant`` if it had none."""
        entry = self._entries[tensor]
        if entry.quant is None:
            entry.quant = quant
        return entry.quant

    # Layout --------------------------------------------------------------------------------------

    def has_layout(self, tensor: str) -> bool:
        return self._entries[tensor].shape is not None

    def shape(self, tensor: str) -> Shape:
        """The stored (N, C, H, W) shape of a tensor, which has a layout."""
        shape = self._entries[tensor].shape
        assert shape is not None, f"tensor {tensor!r} has no layout yet"
        return shape

    def model_shape(self, tensor: str) -> tuple[int, ...]:
        """The shape of a graph input or constant in the model."""
        shape = self._entries[tensor].onnx_shape
        assert shape is not None, f"tensor {tensor!r} is a result"
        return shape

    def relaid(self, tensor: str) -> bool:
        """Whether views of the tensor count in the model's array instead of the stored one."""
        return self._entries[tensor].layout is not None

    def stored_view(self, x: Activation, layout: OnnxView | None = None) -> OnnxView:
        """``x.view`` over the stored array. A tensor without a layout is laid out as ``layout``,
        an (N, C, H, W) view of the model's array, or by default as :meth:`lay_out` does.
        Raises :class:`LayoutError` where strides cannot express it."""
        entry = self._entries[x.tensor]
        if entry.shape is None:
            if layout is None:
                self.lay_out(x)
            else:
                entry.perm = input_perm(self.model_shape(x.tensor), layout)
                entry.shape, entry.layout = four(layout.shape), layout
        return x.view.rebase(entry.layout) if entry.layout else x.view

    def checked_view(self, node: Node, x: Activation, layout: OnnxView | None = None) -> OnnxView:
        """As :meth:`stored_view`, but raises :class:`~sw.ir.graph.ModelError`."""
        try:
            return self.stored_view(x, layout)
        except LayoutError as e:
            raise node.fail(f"the layout of {x.tensor!r} cannot be stored: {e}") from None

    def lay_out(self, x: Activation) -> None:
        """Give a tensor without a layout the order of its axes that suits its readers, or the
        default layout of ``x``, or its own default layout where strides cannot express that."""
        if self.has_layout(x.tensor):
            return
        order = self._entries[x.tensor].order
        if order is not None:
            ordered = OnnxView.contiguous(self.model_shape(x.tensor)).transpose(order)
            self.stored_view(x, default_layout(ordered))
            return
        if len(x.view.shape) <= 4:
            with contextlib.suppress(LayoutError):
                self.stored_view(x, default_layout(x.view))
                return
        whole = OnnxView.contiguous(self.model_shape(x.tensor))
        self.stored_view(replace(x, view=whole), default_layout(whole))

    def lay_out_like(self, x: Dequantised, like: Dequantised) -> None:
        """Give a constant without a layout the one of ``like``, of the same rank: its axes become
        images, channels and positions as those of ``like`` are, where these are whole."""
        if self.has_layout(x.tensor):
            return
        with contextlib.suppress(LayoutError):
            view = self.stored_view(like)
            _, c, h, w = self.shape(like.tensor)
            groups: list[list[tuple[int, int]]] = [[], [], []]
            for axis, dim in enumerate(view.dims):
                stride = dim[-1][1] if dim else 1
                group = 0 if stride >= c * h * w else 1 if stride >= h * w else 2
                groups[group].append((-stride, axis))
            axes = [[axis for _, axis in sorted(group)] for group in groups]
            n, c, p = (math.prod(x.view.shape[i] for i in group) for group in axes)
            images, channels, positions = (
                merge(*(x.view.dims[i] for i in group)) for group in axes
            )
            self.stored_view(x, OnnxView((n, c, 1, p), (images, channels, (), positions)))

    def positions(self, x: Activation) -> np.ndarray:
        """For each element of ``x``, in its shape, the place in the stored array (int32)."""
        self.lay_out(x)
        layout = self._entries[x.tensor].layout
        if layout is None:
            return x.view.indices()
        places = np.argsort(layout.indices(), axis=None).astype(np.int32)
        return places[x.view.indices()]

    def model_view(self, node: Node, tensor: str, view: OnnxView) -> OnnxView:
        """A view over the stored array as views of ``tensor`` count: the inverse of
        :meth:`stored_view`."""
        layout = self._entries[tensor].layout
        if layout is None:
            return view
        try:
            return view.rebase(OnnxView.contiguous(self.model_shape(tensor)).rebase(layout))
        except LayoutError as e:
            raise node.fail(f"the layout of {tensor!r} cannot be traced: {e}") from None

    def set_model_form(
        self, tensor: str, onnx_shape: tuple[int, ...], perm: tuple[int, ...]
    ) -> bool:
        """Set how an output of the graph stands in the model; False if it stands otherwise
        already."""
        entry = self._entries[tensor]
        if entry.onnx_shape is not None and (entry.onnx_shape, entry.perm) != (onnx_shape, perm):
            return False
        entry.onnx_shape, entry.perm = onnx_shape, perm
        return True

    # The graph's ---------------------------------------------------------------------------------

    def graph_tensors(self, used: set[str]) -> dict[str, Tensor]:
        """The graph's tensors, those ``used`` alone, by name."""
        return {name: self._tensor(name) for name in self._entries if name in used}

    def graph_constants(self, used: set[str]) -> dict[str, np.ndarray]:
        """The graph's constants, those ``used`` alone: int8 (N, C, H, W) by name."""
        return {
            name: np.ascontiguousarray(self.constant(name))
            for name in self._constants
            if name in used
        }

    def _tensor(self, name: str) -> Tensor:
        entry, quant, shape = self._entries[name], self.quant(name), self.shape(name)
        onnx_shape, perm = entry.onnx_shape, entry.perm
        if onnx_shape is None or perm is None:
            onnx_shape, perm = shape, output_perm(OnnxView.contiguous(shape))
        return Tensor(
            name=name,
            shape=shape,
            scale=quant.scale,
            zero=quant.zero,
            unsigned=quant.unsigned,
            onnx_shape=onnx_shape,
            perm=perm,
        )
