"""Joins: tensors that only bring channels of other tensors together are never computed.

A tensor is *virtual* if each of its channels is a channel of another tensor at the same positions,
up to a function of int8 (a table of 256 values), and if all its readers can read the others
instead:

* The results of Select (concatenation, channel slices, splits, shuffles) and of Table may be
  virtual. Functions compose, so a virtual tensor may consist of parts of virtual ones.
* Convolution and Select on the array read the parts: each with its own kernel, or its own picks.
* Windows (Pool, depthwise convolution) run part by part, and their result is virtual.

If a part differs from the tensor it comes from, its function is computed: by the table of the stage
that computes that tensor, if nothing else reads the tensor as it was; otherwise by a stage of its
own (a *conversion*). A tensor stays virtual where that saves cycles by the estimates of
:mod:`~sw.compiler.costs`: parts that are not whole blocks cost the array more."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from systole.isa import Config, WindowOp, numerics
from systole.isa.timing import WindowShape
from systole.sw.compiler.costs import (
    array_cycles,
    post_cycles,
    table_share,
    window_image_cycles,
)
from systole.sw.compiler.zeros import fitting_zero
from systole.sw.ir.graph import (
    Conv,
    ConvTranspose,
    Graph,
    Op,
    Pick,
    Pool,
    Select,
    Table,
    Tensor,
    Transpose,
)

VALUES = np.arange(-128, 128)
"""The values of an int8, in the order of tables."""
IDENTITY = VALUES.astype(np.int8).tobytes()
"""The table that changes nothing."""

STAGE_OVERHEAD = 100
"""Cycles that a stage costs beside its engine's work, by the order of magnitude: its parameters and
first weights come from DRAM (the usual latency is 64 cycles), then pipelines fill and drain. It
keeps small tensors from being computed in many small parts."""


@dataclass(frozen=True)
class Part:
    """Channels of a virtual tensor that lie in another one."""

    tensor: str
    channels: np.ndarray
    """By channel of the virtual tensor, the channel of ``tensor``; -1: it is not in this part."""


@dataclass(frozen=True)
class Replacement:
    """The tensor that an operator's stage writes instead of the operator's output, a function of
    it."""

    tensor: str
    table: np.ndarray
    """int8 (256,): the function."""


@dataclass(frozen=True)
class JoinedGraph:
    """A graph without the operators that compute virtual tensors."""

    graph: Graph
    """The original graph, with the additional tensors of the program."""
    ops: list[tuple[int, Op]]
    """The operators to lower, in order, each behind the number of the graph's operator that it
    belongs to. Only convolutions read virtual tensors."""
    parts: dict[str, tuple[Part, ...]]
    """By virtual tensor, its parts."""
    replacements: dict[str, Replacement]
    """By operator's output, what is written in its place, if not the output itself."""


@dataclass(frozen=True)
class _View:
    """A tensor seen through a function of its values."""

    tensor: str
    table: bytes
    """The function: 256 int8."""
    zero: int
    """Zero point of the function's results."""


def windowed(op: Op, config: Config) -> bool:
    """Whether the operator runs on the window engine, channel by channel. (A function fused into it
    then takes a stage of POST.)"""
    if isinstance(op, Pool):
        return True
    if not isinstance(op, Conv) or op.residual is not None or op.shortcut is not None:
        return False
    return op.depthwise and config.window and fitting_zero(op.weights, config) is not None


@dataclass(frozen=True)
class _Item:
    """An operator to carry out."""

    layer: int
    """Number of the graph's operator that it belongs to."""
    op: Op
    output: str
    reads: tuple[_View, ...]
    channels: np.ndarray | None = None
    """For a window on one part of its input: the part's channels, as in :class:`Part`."""


_Views = dict[_View, np.ndarray]
"""The parts of a tensor, with channels as in :class:`Part`."""
_PartsKey = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class _PartwiseResult:
    """What a virtual result consists of: its parts, and the tensors and items for them alone."""

    parts: _Views
    tensors: dict[str, Tensor] = field(default_factory=dict)
    items: list[_Item] = field(default_factory=list)


@dataclass
class _Rewrite:
    """The graph rewritten for one choice of virtual tensors."""

    tensors: dict[str, Tensor]
    items: list[_Item] = field(default_factory=list)
    parts: dict[str, _Views] = field(default_factory=dict)
    """By virtual tensor, its parts."""
    names: dict[_View, str] = field(default_factory=dict)
    """The tensors that hold the views that are read."""
    replaced: dict[str, _View] = field(default_factory=dict)
    """By operator's output, the view of it that the operator's stage writes instead."""
    conversions: dict[int, list[tuple[_View, _View]]] = field(default_factory=dict)
    """Stages that compute views, by the number of the item they come before: what each reads and
    what it writes."""
    layer: dict[_View, int] = field(default_factory=dict)
    """Number of the graph's operator that a view belongs to."""


def join(graph: Graph, config: Config) -> JoinedGraph:
    """Rewrite a graph with those tensors virtual that save cycles by doing so."""
    return _Joiner(graph, config).best()


class _Joiner:
    """Chooses the virtual tensors of a graph, and rewrites the graph for them."""

    def __init__(self, graph: Graph, config: Config):
        self.graph, self.config = graph, config
        self.outputs = {p.tensor for p in graph.outputs}
        self.layers = {op.output: i for i, op in enumerate(graph.ops)}
        self.readers: dict[str, list[Op]] = {}
        for op in graph.ops:
            for name in op.inputs:
                self.readers.setdefault(name, []).append(op)
        self._plain: dict[str, _Views] = {}
        """By tensor, its only part where it is not virtual: the tensor itself."""
        # Most of a rewrite is as in those before. What follows from an operator and the parts of
        # its inputs is kept by the operator's output and the identity of the parts (which are kept
        # with it, so that none is given twice).
        self._items: dict[_PartsKey, tuple[list[_Views], _Item]] = {}
        self._parts: dict[_PartsKey, tuple[list[_Views], _PartwiseResult]] = {}
        self._item_cycles: dict[tuple[int, bool], float] = {}
        """By the identity of an item, and whether its stage writes a view: :meth:`_cycles`."""

    def best(self) -> JoinedGraph:
        """Start from as many virtual tensors as possible; give up one at a time while that costs
        no cycles."""
        virtual = self._closed({op.output for op in self.graph.ops if self._candidate(op)})
        rewrite = self._rewrite(virtual)
        cost, improved = self._cost(rewrite), True
        while improved:
            improved = False
            for name in sorted(virtual, key=self.layers.__getitem__):
                if name in virtual:
                    fewer = self._closed(virtual - {name})
                    other = self._rewrite(fewer)
                    less = self._cost(other)
                    if less <= cost:
                        virtual, rewrite, cost, improved = fewer, other, less, True
        return self._without_views(rewrite)

    # Which tensors may be virtual ----------------------------------------------------------------

    def _candidate(self, op: Op) -> bool:
        """Whether ``op``'s output could be virtual, as far as ``op`` itself is concerned."""
        if op.output in self.outputs or op.output not in self.readers:
            return False
        if isinstance(op, Select):
            return self._brings_channels(op)
        if isinstance(op, Table):
            return True
        return self.config.window and windowed(op, self.config)

    def _brings_channels(self, op: Select) -> bool:
        """Whether each channel of its output is a whole channel of one input."""
        shape = self.graph.tensors[op.output].shape
        if op.across_images or op.flat or op.steps != (1, 1):
            return False
        (picks,) = op.phases
        for pick in picks:
            n, _, h, w = self.graph.tensors[pick.x].shape
            moved = (pick.strides, pick.offsets, pick.weight) != ((1, 1), (0, 0), 1)
            if moved or (n, h, w) != (shape[0], *shape[2:]):
                return False
            try:
                numerics.split_scale(np.asarray(pick.scale, np.float32))
            except ValueError:
                return False
        return bool((np.sum([pick.channels >= 0 for pick in picks], axis=0) == 1).all())

    def _closed(self, virtual: set[str]) -> set[str]:
        """The tensors among ``virtual`` that can be virtual together."""
        while True:
            kept = {name for name in virtual if self._agreed(name, virtual)}
            if kept == virtual:
                return kept
            virtual = kept

    def _agreed(self, name: str, virtual: set[str]) -> bool:
        """Whether all readers of ``name`` can read parts, and it has parts: it comes from a Select,
        or from an operator on a virtual tensor."""
        op = self.graph.ops[self.layers[name]]
        if isinstance(op, Table | Conv | Pool) and op.x not in virtual:
            return False
        return all(self._reads_parts(reader, name, virtual) for reader in self.readers[name])

    def _reads_parts(self, op: Op, name: str, virtual: set[str]) -> bool:
        if op.output in virtual or isinstance(op, ConvTranspose):
            return True
        if isinstance(op, Select):
            return not op.across_images
        if not isinstance(op, Conv) or windowed(op, self.config):
            return False
        return all(each is None or each.other != name for each in (op.residual, op.shortcut))

    # The graph without them ----------------------------------------------------------------------

    def _rewrite(self, virtual: set[str]) -> _Rewrite:
        """The graph with exactly the tensors ``virtual`` virtual."""
        rewrite = _Rewrite(dict(self.graph.tensors))
        for layer, op in enumerate(self.graph.ops):
            views = [self._views(rewrite, name) for name in op.inputs]
            key: _PartsKey = (op.output, tuple(map(id, views)))
            if op.output not in virtual:
                if key not in self._items:
                    reads = tuple(view for parts in views for view in parts)
                    self._items[key] = views, _Item(layer, op, op.output, reads)
                rewrite.items.append(self._items[key][1])
            else:
                if key not in self._parts:
                    self._parts[key] = views, self._virtual(rewrite, layer, op)
                result = self._parts[key][1]
                rewrite.tensors |= result.tensors
                rewrite.items += result.items
                rewrite.parts[op.output] = result.parts
        self._advance(rewrite)
        self._hold(rewrite)
        return rewrite

    def _virtual(self, rewrite: _Rewrite, layer: int, op: Op) -> _PartwiseResult:
        """What a virtual result of ``op`` consists of."""
        if isinstance(op, Conv | Pool):
            return self._by_part(rewrite, layer, op)
        if isinstance(op, Select):
            return _PartwiseResult(self._picked(rewrite, op))
        assert isinstance(op, Table)
        values = np.clip(op.values, op.low, op.high).astype(np.int8)
        zero = rewrite.tensors[op.output].zero
        return _PartwiseResult(_functions(self._views(rewrite, op.x), values, zero))

    def _views(self, rewrite: _Rewrite, name: str) -> _Views:
        """The parts of a tensor, with channels as in :class:`Part`: of one that is not virtual, the
        tensor itself."""
        if name in rewrite.parts:
            return rewrite.parts[name]
        if name not in self._plain:
            tensor = self.graph.tensors[name]
            own = np.arange(tensor.shape[1])
            self._plain[name] = {_View(name, IDENTITY, tensor.zero): own}
        return self._plain[name]

    def _picked(self, rewrite: _Rewrite, op: Select) -> _Views:
        """The parts of a virtual Select's result."""
        parts: _Views = {}
        zero = rewrite.tensors[op.output].zero
        for pick in op.phases[0]:
            numbers = VALUES.astype(np.int64) - rewrite.tensors[pick.x].zero
            multiplier, shift = numerics.split_scale(np.asarray(pick.scale, np.float32))
            bias = np.zeros_like(numbers)
            values = numerics.requantise(
                numbers, bias, multiplier, shift, zero=zero, low=op.low, high=op.high
            )
            for view, channels in _functions(self._views(rewrite, pick.x), values, zero).items():
                picked = _taken(channels, pick.channels)
                if (picked >= 0).any():
                    parts[view] = np.maximum(picked, parts.get(view, -1))
        return parts

    def _by_part(self, rewrite: _Rewrite, layer: int, op: Conv | Pool) -> _PartwiseResult:
        """A window operator on each part of its input."""
        result, function = rewrite.tensors[op.output], None
        if isinstance(op, Conv) and op.activation is not None:
            function, zero = op.activation.values, result.zero
            result = dataclasses.replace(result, zero=op.activation.zero)
            op = dataclasses.replace(op, activation=None)
        own: _Views = {}
        tensors, items = {}, []
        for value, channels in rewrite.parts[op.x].items():
            count = rewrite.tensors[value.tensor].shape[1]
            shape = (result.shape[0], count, *result.shape[2:])
            for each in _once(channels) if isinstance(op, Conv) else [channels]:
                name = f"{op.output}:{len(own)}"
                tensors[name] = dataclasses.replace(result, name=name, shape=shape)
                items.append(_Item(layer, op, name, (value,), each))
                own[_View(name, IDENTITY, result.zero)] = each
        parts = own if function is None else _functions(own, function, zero)
        return _PartwiseResult(parts, tensors, items)

    def _advance(self, rewrite: _Rewrite) -> None:
        """Move each window on a part to directly behind the part, so that it runs beside whatever
        computes the next part; but not if others read the part too, for then both would take room
        for longer."""
        makers = {item.output: i for i, item in enumerate(rewrite.items)}
        layers: dict[str, set[int]] = {}
        for item in rewrite.items:
            for value in item.reads:
                layers.setdefault(value.tensor, set()).add(item.layer)
        places: list[tuple[int, ...]] = []
        for i, item in enumerate(rewrite.items):
            place: tuple[int, ...] = (i,)
            if item.channels is not None:
                name = item.reads[0].tensor
                if name in makers and len(layers[name]) == 1:
                    place = (*places[makers[name]], i)
            places.append(place)
        order = sorted(range(len(places)), key=places.__getitem__)
        rewrite.items = [rewrite.items[i] for i in order]

    def _hold(self, rewrite: _Rewrite) -> None:
        """Find tensors for all views that are read."""
        readers: dict[_View, list[int]] = {}
        by_tensor: dict[str, list[_View]] = {}
        for i, item in enumerate(rewrite.items):
            for view in item.reads:
                if view not in readers:
                    by_tensor.setdefault(view.tensor, []).append(view)
                readers.setdefault(view, []).append(i)
        makers = {item.output: i for i, item in enumerate(rewrite.items)}
        for tensor, views in by_tensor.items():
            self._hold_views(rewrite, views, makers.get(tensor), readers)

    def _hold_views(
        self,
        rewrite: _Rewrite,
        views: list[_View],
        maker: int | None,
        readers: dict[_View, list[int]],
    ) -> None:
        """Find tensors for all views of one tensor: the *base* is written by the tensor's own stage
        (item ``maker``; None: a graph input), the others are computed from it by conversions.

        The base is the tensor itself, or the first view that all others can be computed from, if
        nothing needs the tensor itself and its stage has a table."""
        tensor = views[0].tensor
        plain = _View(tensor, IDENTITY, rewrite.tensors[tensor].zero)
        rewrite.names[plain] = tensor
        changed = [view for view in views if view != plain]
        for n, view in enumerate(changed):
            rewrite.names[view] = f"{tensor}:as{n}"
            rewrite.layer[view] = self._layer(rewrite, view, rewrite.items[readers[view][0]])
        base = plain
        unread = changed == views and tensor not in self.outputs
        if unread and maker is not None and self._has_table(rewrite.items[maker]):
            for view in views:
                if all(_step(view, other) is not None for other in views):
                    base = view
                    break
        if base != plain:
            rewrite.replaced[tensor] = base
        others = [view for view in changed if view != base]
        for view in others:
            # As soon as nothing else needs the tensor, if that is before its first reader.
            at, last = readers[view][0], max(readers.get(base, [-1]))
            if maker is not None and len(others) == 1 and last < at:
                at = max(maker, last) + 1
            rewrite.conversions.setdefault(at, []).append((base, view))

    def _layer(self, rewrite: _Rewrite, view: _View, item: _Item) -> int:
        """Number of the operator whose virtual output has ``view`` as a part that an item reads."""
        return next(self.layers[n] for n in item.op.inputs if view in rewrite.parts.get(n, ()))

    def _has_table(self, item: _Item) -> bool:
        """Whether POST writes the item's result, and can look it up in a table."""
        if isinstance(item.op, Conv) and item.op.activation is not None:
            return True
        return not windowed(item.op, self.config) and not isinstance(item.op, Transpose)

    def _picks(self, rewrite: _Rewrite, op: Select) -> list[list[tuple[Pick, _View, np.ndarray]]]:
        """By phase: its picks, each from one part of its input, with the channels taken from it."""
        phases = []
        for picks in op.phases:
            by_part = []
            for pick in picks:
                for view, channels in self._views(rewrite, pick.x).items():
                    taken = _taken(channels, pick.channels)
                    if (taken >= 0).any():
                        by_part.append((pick, view, taken))
            phases.append(by_part)
        return phases

    def _without_views(self, rewrite: _Rewrite) -> JoinedGraph:
        """The rewritten graph in terms of tensors, without views."""
        tensors, names = rewrite.tensors, rewrite.names
        for view, layer in rewrite.layer.items():
            like = tensors[self.graph.ops[layer].output]
            tensors[names[view]] = dataclasses.replace(
                tensors[view.tensor], name=names[view], scale=like.scale, zero=view.zero
            )
        ops: list[tuple[int, Op]] = []
        for i, item in enumerate(rewrite.items):
            for base, view in rewrite.conversions.get(i, []):
                layer, step = rewrite.layer[view], _step(base, view)
                assert step is not None
                whole = self.graph.ops[layer]
                ops.append((layer, _conversion(whole, names[view], names[base], step)))
            ops.append((item.layer, self._own(rewrite, item)))
        replacements = {
            tensor: Replacement(names[view], np.frombuffer(view.table, np.int8))
            for tensor, view in rewrite.replaced.items()
        }
        order = {op.output: i for i, (_, op) in enumerate(ops)}
        order |= {m.tensor: order[tensor] for tensor, m in replacements.items()}
        parts = {}
        for name in rewrite.parts.keys() & {n for _, op in ops for n in op.inputs}:
            # Those computed first come first: the array can begin with them.
            unordered = [Part(names[v], channels) for v, channels in rewrite.parts[name].items()]
            parts[name] = tuple(sorted(unordered, key=lambda p: order.get(p.tensor, -1)))
        return JoinedGraph(
            dataclasses.replace(self.graph, tensors=tensors), ops, parts, replacements
        )

    def _own(self, rewrite: _Rewrite, item: _Item) -> Op:
        """An item's operator on the tensors that it reads."""
        op, names = item.op, rewrite.names
        if item.channels is not None:
            assert isinstance(op, Conv | Pool)
            x = names[item.reads[0]]
            if isinstance(op, Conv):
                op = _depthwise_part(op, item.channels, rewrite.tensors[x].shape[1])
            return dataclasses.replace(op, x=x, output=item.output)
        if isinstance(op, Select) and not op.across_images:
            phases = [
                [dataclasses.replace(p, x=names[v], channels=channels) for p, v, channels in picks]
                for picks in self._picks(rewrite, op)
            ]
            return dataclasses.replace(op, phases=phases)
        return op

    # Costs ---------------------------------------------------------------------------------------

    def _cost(self, rewrite: _Rewrite) -> float:
        """Estimated cycles of all items and conversions. Operators that take the same whatever is
        virtual count as nothing."""
        total = 0.0
        for item in rewrite.items:
            key = (id(item), item.output in rewrite.replaced)
            if key not in self._item_cycles:
                self._item_cycles[key] = self._cycles(rewrite, item)
            total += STAGE_OVERHEAD + self._item_cycles[key]
        for conversions in rewrite.conversions.values():
            for _, view in conversions:
                total += STAGE_OVERHEAD + self._post_cycles(rewrite, view.tensor, table=True)
        return total

    def _cycles(self, rewrite: _Rewrite, item: _Item) -> float:
        """Estimated cycles of the engine that an item keeps busiest."""
        op = item.op
        post = self._post_cycles(rewrite, item.output, table=item.output in rewrite.replaced)
        if isinstance(op, Conv | Pool) and windowed(op, self.config):
            return self._window_cycles(rewrite, item, op, post)
        if isinstance(op, Conv | ConvTranspose):
            return max(self._convolution_cycles(rewrite, item, op), post)
        if isinstance(op, Select) and not op.across_images:
            return max(self._select_cycles(rewrite, item, op), post)
        return post if isinstance(op, Table) else 0

    def _post_cycles(self, rewrite: _Rewrite, name: str, *, table: bool) -> float:
        """POST's cycles to write a whole tensor, through a table or not."""
        n, channels, h, w = rewrite.tensors[name].shape
        cycles = post_cycles(n * h * w, channels, self.config)
        return cycles * (1 + table_share(self.config)) if table else cycles

    def _window_cycles(self, rewrite: _Rewrite, item: _Item, op: Conv | Pool, post: float) -> float:
        """WINDOW's cycles, and those of the stage of POST that a fused function needs."""
        n, channels, h, w = rewrite.tensors[item.output].shape
        if isinstance(op, Pool):
            kernel, kind = op.kernel, WindowOp.MAX if op.kind == "max" else WindowOp.SUM
        else:
            kernel, kind = op.weights.shape[2:], WindowOp.DEPTHWISE
        shape = WindowShape(kernel=kernel, stride=op.strides, dilation=op.dilations, out=(h, w))
        cycles = window_image_cycles(shape, kind, channels=channels, batch=n, config=self.config)
        if isinstance(op, Conv) and op.activation is not None:
            return cycles + STAGE_OVERHEAD + post
        return cycles

    def _convolution_cycles(self, rewrite: _Rewrite, item: _Item, op: Conv | ConvTranspose) -> int:
        # A transposed convolution streams its input: each phase has its share of the kernel.
        n, _, h, w = rewrite.tensors[item.output if isinstance(op, Conv) else op.x].shape
        # Weights that no zero point makes int8 are split into two int8 kernels.
        kernels = 1 if fitting_zero(op.weights, self.config) is not None else 2
        taps = kernels * math.prod(op.weights.shape[2:])
        return array_cycles(n * h * w, taps * self._tap_tiles(rewrite, op), self.config)

    def _tap_tiles(self, rewrite: _Rewrite, op: Conv | ConvTranspose) -> int:
        """The weight tiles of one position of the kernel: for each group, the pairs of a block of
        one of the input's parts and a column block of the output."""
        rows, cols = self.config.rows, self.config.cols
        outputs, inputs = len(op.weights) // op.group, rewrite.tensors[op.x].shape[1] // op.group
        parts = list(self._views(rewrite, op.x).values())
        # Groups that share a block and a column block share the tile.
        tiles: set[tuple[int, int, int]] = set()
        for g in range(op.group):
            columns = range(g * outputs // cols, ((g + 1) * outputs - 1) // cols + 1)
            for k, part in enumerate(parts):
                channels = part[g * inputs : (g + 1) * inputs]
                blocks = np.unique(channels[channels >= 0] // rows).tolist()
                tiles.update((k, b, c) for b in blocks for c in columns)
        return len(tiles)

    def _select_cycles(self, rewrite: _Rewrite, item: _Item, op: Select) -> int:
        n, _, h, w = rewrite.tensors[item.output].shape
        tiles = 0
        for picks in self._picks(rewrite, op):
            for _, _, channels in picks:
                taken = np.flatnonzero(channels >= 0)
                columns, blocks = taken // self.config.cols, channels[taken] // self.config.rows
                tiles += len(np.unique(columns * (blocks.max() + 1) + blocks))
        return n * h * w // len(op.phases) * tiles


def _conversion(op: Op, output: str, x: str, table: np.ndarray) -> Table:
    """A table's stage, reported as part of ``op``."""
    return Table(op.name, op.op_type, output, low=-128, high=127, x=x, values=table)


@functools.lru_cache(maxsize=4096)
def _table_step(first: bytes, then: bytes) -> np.ndarray | None:
    inner, outer = (np.frombuffer(table, np.int8) for table in (first, then))
    step = np.zeros(256, np.int8)
    step[inner.astype(int) + 128] = outer
    return step if np.array_equal(numerics.lookup(inner, step), outer) else None


def _step(first: _View, then: _View) -> np.ndarray | None:
    """int8 (256,): the function that computes one view of a tensor from another, if there is
    one."""
    return _table_step(first.table, then.table)


def _taken(channels: np.ndarray, picked: np.ndarray) -> np.ndarray:
    """Channels of a part (-1: in another part) by the numbers in ``picked`` (-1: none)."""
    return np.where(picked >= 0, channels[picked], -1)


def _once(channels: np.ndarray) -> Iterator[np.ndarray]:
    """Divide a part's channels such that no piece takes a channel of the tensor twice."""
    left = channels.copy()
    while (left >= 0).any():
        first = np.full(len(left), -1)
        taken, at = np.unique(left, return_index=True)
        first[at[taken >= 0]] = taken[taken >= 0]
        left[first >= 0] = -1
        yield first


def _functions(parts: _Views, table: np.ndarray, zero: int) -> _Views:
    """A function of each of a tensor's parts. Parts that become the same are one."""
    out: _Views = {}
    for view, channels in parts.items():
        inner = np.frombuffer(view.table, np.int8)
        key = _View(view.tensor, numerics.lookup(inner, table).tobytes(), zero)
        out[key] = np.maximum(channels, out.get(key, -1))
    return out


def _depthwise_part(op: Conv, channels: np.ndarray, count: int) -> Conv:
    """The depthwise convolution of one part, a tensor of ``count`` channels. Channels outside the
    part are undefined."""
    taken = np.flatnonzero(channels >= 0)
    weights = np.zeros((count, *op.weights.shape[1:]), op.weights.dtype)
    bias, scale = np.zeros(count, np.int32), np.ones(count, np.float32)
    weights[channels[taken]] = op.weights[taken]
    bias[channels[taken]] = op.bias[taken]
    scale[channels[taken]] = op.scale[taken]
    return dataclasses.replace(op, weights=weights, bias=bias, scale=scale, group=count)
