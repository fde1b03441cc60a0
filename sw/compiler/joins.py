"""Joins: tensors that only bring channels of others together are not made.

A tensor is *virtual* where every channel of it is a channel of another tensor at the same places,
up to a function of its 256 values, and all that reads it can read the others instead:

* Select (concatenation, channel slices, splits, shuffles) and Table make virtual tensors. Their
  functions compose, so that virtual tensors may be made of virtual ones.
* Convolution and Select on the array read the parts: a kernel, or picks, for each.
* Windows (Pool, depthwise convolution) are carried out part by part, and their result is virtual.

A part that is not what the tensor it comes from holds is made by the table of that one's own stage,
where nothing else reads it, or by a stage of its own. Tensors stay virtual where that is estimated
to save cycles: parts that are not whole blocks cost the array more."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from systole.isa import Config, numerics
from systole.sw.ir import layout
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
"""Of an int8, in the order of tables."""
IDENTITY = VALUES.astype(np.int8).tobytes()

STAGE = 100
"""Cycles that a stage costs beside its words, about."""
TABLE = 1 / 16
"""Of POST's cycles, that a table costs."""


@dataclass(frozen=True)
class Part:
    """Channels of a virtual tensor that lie in another one."""

    tensor: str
    channels: np.ndarray
    """By channel of the virtual tensor, the channel of this one; -1: none."""


@dataclass(frozen=True)
class Made:
    """What the stage of an operator makes instead of the operator's output."""

    tensor: str
    table: np.ndarray
    """int8 (256,), of the operator's output."""


@dataclass(frozen=True)
class Joined:
    """A graph without its virtual tensors' operators."""

    graph: Graph
    """The graph, with the tensors that the program makes in addition."""
    ops: list[tuple[int, Op]]
    """What is to be done: number of the graph's operator that it belongs to, and the operator. Of
    virtual tensors only convolutions read."""
    parts: dict[str, tuple[Part, ...]]
    """Of virtual tensors."""
    made: dict[str, Made]
    """By operators' outputs."""


@dataclass(frozen=True)
class _Value:
    """A function of a tensor: ``table`` in 256 bytes, and the zero point of the result."""

    tensor: str
    table: bytes
    zero: int


def windowed(op: Op, config: Config) -> bool:
    """The operator runs on the window engine, channel by channel; a function behind it on POST."""
    if isinstance(op, Pool):
        return True
    if not isinstance(op, Conv) or op.residual is not None or op.shortcut is not None:
        return False
    return op.depthwise and config.window and op.weights.dtype == np.int8


@dataclass(frozen=True)
class _Item:
    """An operator that is carried out."""

    layer: int
    op: Op
    output: str
    reads: tuple[_Value, ...]
    channels: np.ndarray | None = None
    """A window on one part of its input: the part's, as of :class:`Part`."""


@dataclass
class _Plan:
    """The graph with some tensors virtual."""

    tensors: dict[str, Tensor]
    items: list[_Item] = field(default_factory=list)
    parts: dict[str, dict[_Value, np.ndarray]] = field(default_factory=dict)
    """Of virtual tensors, channels as of :class:`Part`."""
    names: dict[_Value, str] = field(default_factory=dict)
    """The tensors that hold what is read."""
    made: dict[str, _Value] = field(default_factory=dict)
    """By operators' outputs, what is made of them by their own tables."""
    before: dict[int, list[tuple[_Value, _Value]]] = field(default_factory=dict)
    """By items in front of which it happens: values, and those that stages of their own make of
    them."""
    layer: dict[_Value, int] = field(default_factory=dict)
    """The operator that such a stage belongs to."""


def join(graph: Graph, config: Config) -> Joined:
    """The graph with the virtual tensors that save cycles."""
    return _Joiner(graph, config).best()


class _Joiner:
    def __init__(self, graph: Graph, config: Config):
        self.graph, self.config = graph, config
        self.outputs = {p.tensor for p in graph.outputs}
        self.layers = {op.output: i for i, op in enumerate(graph.ops)}
        self.readers: dict[str, list[Op]] = {}
        for op in graph.ops:
            for name in op.inputs:
                self.readers.setdefault(name, []).append(op)

    def best(self) -> Joined:
        """Virtual tensors are given up, one by one, while that saves cycles."""
        virtual = self._closed({op.output for op in self.graph.ops if self._candidate(op)})
        plan = self._plan(virtual)
        cost, improved = self._cost(plan), True
        while improved:
            improved = False
            for name in sorted(virtual, key=self.layers.__getitem__):
                if name in virtual:
                    fewer = self._closed(virtual - {name})
                    other = self._plan(fewer)
                    less = self._cost(other)
                    if less <= cost:
                        virtual, plan, cost, improved = fewer, other, less, True
        return self._joined(plan)

    # Which tensors may be virtual ----------------------------------------------------------------

    def _candidate(self, op: Op) -> bool:
        """``op``'s output could be virtual, if the operators around it agree."""
        if op.output in self.outputs or op.output not in self.readers:
            return False
        if isinstance(op, Select):
            return self._brings_channels(op)
        if isinstance(op, Table):
            return True
        return self.config.window and windowed(op, self.config)

    def _brings_channels(self, op: Select) -> bool:
        """Every channel of its output is a whole channel of an input."""
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
                numerics.split_scale(np.float32(pick.scale))
            except ValueError:
                return False
        return bool((np.sum([pick.channels >= 0 for pick in picks], axis=0) == 1).all())

    def _closed(self, virtual: set[str]) -> set[str]:
        """Those that can be virtual together."""
        while True:
            kept = {name for name in virtual if self._agreed(name, virtual)}
            if kept == virtual:
                return kept
            virtual = kept

    def _agreed(self, name: str, virtual: set[str]) -> bool:
        """All readers can do with a virtual ``name``, and what makes it has something to join."""
        op = self.graph.ops[self.layers[name]]
        if not isinstance(op, Select) and op.x not in virtual:
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

    def _plan(self, virtual: set[str]) -> _Plan:
        plan = _Plan(dict(self.graph.tensors))
        for layer, op in enumerate(self.graph.ops):
            if op.output not in virtual:
                reads = tuple(v for name in op.inputs for v in self._values(plan, name))
                plan.items.append(_Item(layer, op, op.output, reads))
            elif isinstance(op, Select):
                plan.parts[op.output] = self._picked(plan, op)
            elif isinstance(op, Table):
                values = np.clip(op.values, op.low, op.high).astype(np.int8)
                zero = plan.tensors[op.output].zero
                plan.parts[op.output] = _functions(self._values(plan, op.x), values, zero)
            else:
                self._by_part(plan, layer, op)
        self._advance(plan)
        self._hold(plan)
        return plan

    def _values(self, plan: _Plan, name: str) -> dict[_Value, np.ndarray]:
        """What a tensor is made of."""
        if name in plan.parts:
            return plan.parts[name]
        tensor = plan.tensors[name]
        return {_Value(name, IDENTITY, tensor.zero): np.arange(tensor.shape[1])}

    def _picked(self, plan: _Plan, op: Select) -> dict[_Value, np.ndarray]:
        made: dict[_Value, np.ndarray] = {}
        zero = plan.tensors[op.output].zero
        for pick in op.phases[0]:
            numbers = VALUES.astype(np.int64) - plan.tensors[pick.x].zero
            multiplier, shift = numerics.split_scale(np.float32(pick.scale))
            values = numerics.requantise(
                numbers, np.int64(0), multiplier, shift, zero, op.low, op.high
            )
            parts = _functions(self._values(plan, pick.x), values, zero)
            for value, channels in parts.items():
                picked = _taken(channels, pick.channels)
                if (picked >= 0).any():
                    made[value] = np.maximum(picked, made.get(value, -1))
        return made

    def _by_part(self, plan: _Plan, layer: int, op: Conv | Pool) -> None:
        """A window operator on each part of its input."""
        result, function = plan.tensors[op.output], None
        if isinstance(op, Conv) and op.activation is not None:
            function, zero = op.activation.values, result.zero
            result = dataclasses.replace(result, zero=op.activation.zero)
            op = dataclasses.replace(op, activation=None)
        own: dict[_Value, np.ndarray] = {}
        for value, channels in plan.parts[op.x].items():
            count = plan.tensors[value.tensor].shape[1]
            shape = (result.shape[0], count, *result.shape[2:])
            for each in _once(channels) if isinstance(op, Conv) else [channels]:
                name = f"{op.output}:{len(own)}"
                plan.tensors[name] = dataclasses.replace(result, name=name, shape=shape)
                plan.items.append(_Item(layer, op, name, (value,), each))
                own[_Value(name, IDENTITY, result.zero)] = each
        plan.parts[op.output] = own if function is None else _functions(own, function, zero)

    def _advance(self, plan: _Plan) -> None:
        """Carry out a window on a part as soon as the part is made, beside what makes the next one;
        unless others read the part too, for then both would be held."""
        makers = {item.output: i for i, item in enumerate(plan.items)}
        layers: dict[str, set[int]] = {}
        for item in plan.items:
            for value in item.reads:
                layers.setdefault(value.tensor, set()).add(item.layer)
        places: list[tuple[int, ...]] = []
        for i, item in enumerate(plan.items):
            place = (i,)
            if item.channels is not None:
                name = item.reads[0].tensor
                if name in makers and len(layers[name]) == 1:
                    place = (*places[makers[name]], i)
            places.append(place)
        order = sorted(range(len(places)), key=places.__getitem__)
        plan.items = [plan.items[i] for i in order]

    def _hold(self, plan: _Plan) -> None:
        """Find tensors for all values that are read: a function of an operator's result by its own
        table, where all others that are read can be had from it; the others by stages."""
        makers = {item.output: i for i, item in enumerate(plan.items)}
        readers: dict[_Value, list[int]] = {}
        for i, item in enumerate(plan.items):
            for value in item.reads:
                readers.setdefault(value, []).append(i)
        wanted: dict[str, list[_Value]] = {}
        for value in readers:
            wanted.setdefault(value.tensor, []).append(value)
        for tensor, values in wanted.items():
            plain = _Value(tensor, IDENTITY, plan.tensors[tensor].zero)
            plan.names[plain] = tensor
            changed = [v for v in values if v != plain]
            for n, value in enumerate(changed):
                plan.names[value] = f"{tensor}:as{n}"
                plan.layer[value] = self._layer(plan, value, plan.items[readers[value][0]])
            maker, base = makers.get(tensor), plain
            free = changed == values and tensor not in self.outputs
            if free and maker is not None and self._has_table(plan.items[maker]):
                bases = (b for b in values if all(_step(b, v) is not None for v in values))
                base = next(bases, plain)
            if base != plain:
                plan.made[tensor] = base
            others = [v for v in changed if v != base]
            for value in others:
                # As soon as nothing else needs the tensor, if that is before.
                at, last = readers[value][0], max(readers.get(base, [-1]))
                if maker is not None and len(others) == 1 and last < at:
                    at = max(maker, last) + 1
                plan.before.setdefault(at, []).append((base, value))

    def _layer(self, plan: _Plan, value: _Value, item: _Item) -> int:
        """The operator whose virtual output an item reads ``value`` as part of."""
        return next(self.layers[n] for n in item.op.inputs if value in plan.parts.get(n, ()))

    def _has_table(self, item: _Item) -> bool:
        """POST makes its result."""
        if isinstance(item.op, Conv) and item.op.activation is not None:
            return True
        return not windowed(item.op, self.config) and not isinstance(item.op, Transpose)

    def _picks(self, plan: _Plan, op: Select) -> list[list[tuple[Pick, _Value, np.ndarray]]]:
        """By phase its picks of all parts, with the channels of these."""
        return [
            [
                (pick, value, picked)
                for pick in picks
                for value, channels in self._values(plan, pick.x).items()
                for picked in [_taken(channels, pick.channels)]
                if (picked >= 0).any()
            ]
            for picks in op.phases
        ]

    def _joined(self, plan: _Plan) -> Joined:
        tensors, ops = plan.tensors, []
        for value, layer in plan.layer.items():
            name, like = plan.names[value], tensors[self.graph.ops[layer].output]
            tensors[name] = dataclasses.replace(
                tensors[value.tensor], name=name, scale=like.scale, zero=value.zero
            )
        for i, item in enumerate(plan.items):
            for base, value in plan.before.get(i, []):
                layer = plan.layer[value]
                whole, names = self.graph.ops[layer], (plan.names[value], plan.names[base])
                ops.append((layer, _conversion(whole, *names, _step(base, value))))
            ops.append((item.layer, self._own(plan, item)))
        made = {
            tensor: Made(plan.names[value], np.frombuffer(value.table, np.int8))
            for tensor, value in plan.made.items()
        }
        order = {op.output: i for i, (_, op) in enumerate(ops)}
        order |= {m.tensor: order[tensor] for tensor, m in made.items()}
        parts = {}
        for name in plan.parts.keys() & {n for _, op in ops for n in op.inputs}:
            # Those that are made first come first: the array can begin with them.
            found = [Part(plan.names[v], channels) for v, channels in plan.parts[name].items()]
            parts[name] = tuple(sorted(found, key=lambda p: order.get(p.tensor, -1)))
        return Joined(dataclasses.replace(self.graph, tensors=tensors), ops, parts, made)

    def _own(self, plan: _Plan, item: _Item) -> Op:
        """The operator with the tensors that it reads."""
        op = item.op
        if item.channels is not None:
            op = dataclasses.replace(op, x=plan.names[item.reads[0]], output=item.output)
            if isinstance(op, Conv):
                op = _depthwise_part(op, item.channels, plan.tensors[op.x].shape[1])
        elif isinstance(op, Select) and not op.across_images:
            phases = [
                [dataclasses.replace(p, x=plan.names[v], channels=picked) for p, v, picked in picks]
                for picks in self._picks(plan, op)
            ]
            op = dataclasses.replace(op, phases=phases)
        return op

    # What it costs -------------------------------------------------------------------------------

    def _cost(self, plan: _Plan) -> float:
        """Cycles, about, but for operators that are the same whatever is virtual."""
        total = sum(STAGE + self._cycles(plan, item) for item in plan.items)
        for made in plan.before.values():
            for _, value in made:
                n, channels, h, w = plan.tensors[value.tensor].shape
                words = n * h * w * layout.blocks_of(channels, self.config.rows)
                total += STAGE + words * (1 + TABLE)
        return total

    def _cycles(self, plan: _Plan, item: _Item) -> float:
        op, config = item.op, self.config
        n, channels, h, w = plan.tensors[item.output].shape
        blocks = layout.blocks_of(channels, config.rows)
        pixels = n * h * w
        if isinstance(op, Conv | ConvTranspose | Pool):
            size = n * math.prod(plan.tensors[op.x].shape[2:])
        post = pixels * blocks * (1 + TABLE * (item.output in plan.made))
        if windowed(op, config):
            cycles = STAGE + post if isinstance(op, Conv) and op.activation is not None else 0
            kernel = op.kernel if isinstance(op, Pool) else op.weights.shape[2:]
            if max(kernel) > config.window_kernel:
                return cycles + blocks * pixels * kernel[0] * kernel[1]
            return cycles + blocks * (max(pixels, size) + pixels * sum(k > 3 for k in kernel))
        if isinstance(op, Conv | ConvTranspose):
            streamed = max(pixels if isinstance(op, Conv) else size, config.rows)
            kernels = 1 if op.weights.dtype == np.int8 else 2
            taps = kernels * op.weights.shape[2] * op.weights.shape[3]
            return max(streamed * taps * self._tiles(plan, op), post)
        if isinstance(op, Select) and not op.across_images:
            tiles = sum(
                len(set(zip((taken // config.cols).tolist(), blocks_of.tolist())))
                for picks in self._picks(plan, op)
                for _, _, picked in picks
                for taken in [np.flatnonzero(picked >= 0)]
                for blocks_of in [picked[taken] // config.rows]
            )
            return max(pixels // len(op.phases) * tiles, post)
        return post if isinstance(op, Table) else 0

    def _tiles(self, plan: _Plan, op: Conv | ConvTranspose) -> int:
        """The weight tiles of a tap."""
        rows, cols = self.config.rows, self.config.cols
        outputs, inputs = len(op.weights) // op.group, plan.tensors[op.x].shape[1] // op.group
        parts = list(self._values(plan, op.x).values())
        found: set[tuple[int, int, int]] = set()
        for g in range(op.group):
            columns = range(g * outputs // cols, ((g + 1) * outputs - 1) // cols + 1)
            own = [part[g * inputs : (g + 1) * inputs] for part in parts]
            blocks = [set((part[part >= 0] // rows).tolist()) for part in own]
            if op.group == 1:
                return len(columns) * sum(map(len, blocks))
            found |= {(c, k, b) for k, some in enumerate(blocks) for b in some for c in columns}
        return len(found)


def _conversion(op: Op, output: str, x: str, table: np.ndarray) -> Table:
    """A stage that belongs to ``op``."""
    return Table(op.name, op.op_type, output, -128, 127, x, table)


@functools.lru_cache(maxsize=4096)
def _table_step(first: bytes, then: bytes) -> np.ndarray | None:
    inner, outer = (np.frombuffer(table, np.int8) for table in (first, then))
    step = np.zeros(256, np.int8)
    step[inner.astype(int) + 128] = outer
    return step if np.array_equal(numerics.lookup(inner, step), outer) else None


def _step(first: _Value, then: _Value) -> np.ndarray | None:
    """The function that makes one value of another one of the same tensor, if there is one."""
    return _table_step(first.table, then.table)


def _taken(channels: np.ndarray, picked: np.ndarray) -> np.ndarray:
    """Channels of a part (-1: of another one), picked (-1: none)."""
    return np.where(picked >= 0, channels[picked], -1)


def _once(channels: np.ndarray) -> Iterator[np.ndarray]:
    """The same channels in maps that take none of them twice."""
    left = channels.copy()
    while (left >= 0).any():
        first = np.full(len(left), -1)
        taken, at = np.unique(left, return_index=True)
        first[at[taken >= 0]] = taken[taken >= 0]
        left[first >= 0] = -1
        yield first


def _functions(
    values: dict[_Value, np.ndarray], table: np.ndarray, zero: int
) -> dict[_Value, np.ndarray]:
    """A function of what a tensor is made of. Parts that become the same are one."""
    out: dict[_Value, np.ndarray] = {}
    for value, channels in values.items():
        inner = np.frombuffer(value.table, np.int8)
        key = _Value(value.tensor, numerics.lookup(inner, table).tobytes(), zero)
        out[key] = np.maximum(channels, out.get(key, -1))
    return out


def _depthwise_part(op: Conv, channels: np.ndarray, count: int) -> Conv:
    """The depthwise convolution of one part, of ``count`` channels. What is not of the tensor comes
    out as anything."""
    taken = np.flatnonzero(channels >= 0)
    weights = np.zeros((count, *op.weights.shape[1:]), np.int8)
    bias, scale = np.zeros(count, np.int32), np.ones(count, np.float32)
    weights[channels[taken]] = op.weights[taken]
    bias[channels[taken]] = op.bias[taken]
    scale[channels[taken]] = op.scale[taken]
    return dataclasses.replace(op, weights=weights, bias=bias, scale=scale, group=count)
