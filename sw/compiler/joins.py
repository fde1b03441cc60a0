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
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from isa import Config
from sw import layout, numerics
from sw.graph import (
    Conv,
    ConvTranspose,
    Graph,
    Op,
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
    """The operator runs on the window engine, channel by channel."""
    if isinstance(op, Pool):
        return True
    if not isinstance(op, Conv) or op.residual is not None or op.activation is not None:
        return False
    return op.depthwise and config.window and op.weights.dtype == np.int8


@dataclass
class _Held:
    """How values are had."""

    names: dict[_Value, str] = field(default_factory=dict)
    made: dict[str, Made] = field(default_factory=dict)
    before: dict[int, list[tuple[int, Op]]] = field(default_factory=dict)
    """Operators that make values, by the operator in front of which they stand."""


def join(graph: Graph, config: Config) -> Joined:
    """The graph with the virtual tensors that save cycles."""
    return _Joiner(graph, config).best()


@dataclass
class _Rewritten:
    """The graph with some tensors virtual."""

    tensors: dict[str, Tensor]
    ops: list[tuple[int, Op, list[_Value]]] = field(default_factory=list)
    """Operators that are carried out, and what they read."""
    parts: dict[str, dict[_Value, np.ndarray]] = field(default_factory=dict)
    """Of virtual tensors, channels as of :class:`Part`."""


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
        joined = self._joined(virtual)
        cost, improved = self._cost(joined), True
        while improved:
            improved = False
            for name in sorted(virtual, key=self.layers.__getitem__):
                if name in virtual:
                    fewer = self._closed(virtual - {name})
                    other = self._joined(fewer)
                    less = self._cost(other)
                    if less <= cost:
                        virtual, joined, cost, improved = fewer, other, less, True
        return joined

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
        if op.joined or op.flat or op.steps != (1, 1):
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
            return not op.joined
        if not isinstance(op, Conv) or windowed(op, self.config):
            return False
        return op.residual is None or op.residual.other != name

    # The graph without them ----------------------------------------------------------------------

    def _rewritten(self, virtual: set[str]) -> _Rewritten:
        out = _Rewritten(dict(self.graph.tensors))
        for layer, op in enumerate(self.graph.ops):
            if op.output not in virtual:
                reads = [v for name in op.inputs for v in self._values(out, name)]
                out.ops.append((layer, op, reads))
            elif isinstance(op, Select):
                out.parts[op.output] = self._picked(out, op)
            elif isinstance(op, Table):
                values = np.clip(op.values, op.low, op.high).astype(np.int8)
                zero = out.tensors[op.output].zero
                out.parts[op.output] = _functions(self._values(out, op.x), values, zero)
            else:
                self._by_part(out, layer, op)
        return out

    def _values(self, out: _Rewritten, name: str) -> dict[_Value, np.ndarray]:
        """What a tensor is made of."""
        tensor = out.tensors[name]
        whole = {_Value(name, IDENTITY, tensor.zero): np.arange(tensor.shape[1])}
        return out.parts.get(name, whole)

    def _picked(self, out: _Rewritten, op: Select) -> dict[_Value, np.ndarray]:
        made: dict[_Value, np.ndarray] = {}
        zero = out.tensors[op.output].zero
        for pick in op.phases[0]:
            numbers = VALUES.astype(np.int64) - out.tensors[pick.x].zero
            multiplier, shift = numerics.split_scale(np.float32(pick.scale))
            values = numerics.requantise(
                numbers, np.int64(0), multiplier, shift, zero, op.low, op.high
            )
            parts = _functions(self._values(out, pick.x), values, zero)
            for value, channels in parts.items():
                picked = _taken(channels, pick.channels)
                if (picked >= 0).any():
                    made[value] = np.maximum(picked, made.get(value, -1))
        return made

    def _by_part(self, out: _Rewritten, layer: int, op: Conv | Pool) -> None:
        """A window operator on each part of its input."""
        result = out.tensors[op.output]
        out.parts[op.output] = {}
        for value, channels in out.parts[op.x].items():
            count = out.tensors[value.tensor].shape[1]
            shape = (result.shape[0], count, *result.shape[2:])
            for each in _once(channels) if isinstance(op, Conv) else [channels]:
                name = f"{op.output}:{len(out.parts[op.output])}"
                out.tensors[name] = dataclasses.replace(result, name=name, shape=shape)
                own = dataclasses.replace(op, output=name)
                if isinstance(op, Conv):
                    own = _depthwise_part(own, each, count)
                out.ops.append((layer, own, [value]))
                out.parts[op.output][_Value(name, IDENTITY, result.zero)] = each

    def _joined(self, virtual: set[str]) -> Joined:
        out = self._rewritten(virtual)
        held = self._held(out)
        ops: list[tuple[int, Op]] = []
        for i, (layer, op, reads) in enumerate(out.ops):
            ops += held.before.get(i, [])
            ops.append((layer, self._named(out, op, reads, held.names)))
        order = {op.output: i for i, (_, op) in enumerate(ops)}
        order |= {m.tensor: order[tensor] for tensor, m in held.made.items()}
        parts = {}
        for name in virtual & {n for _, op in ops for n in op.inputs}:
            # Those that are made first come first: the array can begin with them.
            found = [Part(held.names[v], channels) for v, channels in out.parts[name].items()]
            parts[name] = tuple(sorted(found, key=lambda p: order.get(p.tensor, -1)))
        graph = dataclasses.replace(self.graph, tensors=out.tensors)
        return Joined(graph, ops, parts, held.made)

    def _held(self, out: _Rewritten) -> _Held:
        """Tensors for all functions that are read: a function of an operator's result by its own
        table, where all others that are read can be had from it; the others by stages."""
        held = _Held()
        makers = {op.output: i for i, (_, op, _) in enumerate(out.ops)}
        readers: dict[_Value, list[int]] = {}
        for i, (_, _, reads) in enumerate(out.ops):
            for value in reads:
                readers.setdefault(value, []).append(i)
        wanted: dict[str, list[_Value]] = {}
        for value in readers:
            wanted.setdefault(value.tensor, []).append(value)
        for tensor, values in wanted.items():
            plain = _Value(tensor, IDENTITY, out.tensors[tensor].zero)
            changed = [v for v in values if v != plain]
            maker, base = makers.get(tensor), plain
            free = changed == values and tensor not in self.outputs
            if free and maker is not None and self._has_table(out.ops[maker][1]):
                bases = (b for b in values if all(_step(b, v) is not None for v in values))
                base = next(bases, plain)
            held.names[plain] = tensor
            for n, value in enumerate(changed):
                name = held.names[value] = f"{tensor}:as{n}"
                first = readers[value][0]
                layer = self._layer(out, value, first)
                like = out.tensors[self.graph.ops[layer].output]
                out.tensors[name] = dataclasses.replace(
                    out.tensors[tensor], name=name, scale=like.scale, zero=value.zero
                )
                if value == base:
                    held.made[tensor] = Made(name, np.frombuffer(value.table, np.int8))
            others = [v for v in changed if v != base]
            for value in others:
                first = readers[value][0]
                layer = self._layer(out, value, first)
                op = self.graph.ops[layer]
                own = Table(
                    op.name, op.op_type, held.names[value], -128, 127, held.names[base],
                    _step(base, value),
                )  # fmt: skip
                # As soon as it is made, if nothing else needs it any longer.
                last = max(readers.get(base, [-1]))
                soon = maker is not None and len(others) == 1 and last < first
                held.before.setdefault(maker + 1 if soon else first, []).append((layer, own))
        return held

    def _layer(self, out: _Rewritten, value: _Value, reader: int) -> int:
        """The operator whose virtual output an operator reads ``value`` as part of."""
        layer = out.ops[reader][0]
        names = self.graph.ops[layer].inputs
        return next(self.layers[n] for n in names if value in out.parts.get(n, ()))

    def _has_table(self, op: Op) -> bool:
        """POST makes its result."""
        return not windowed(op, self.config) and not isinstance(op, Transpose)

    def _named(self, out: _Rewritten, op: Op, reads: list[_Value], names: dict[_Value, str]) -> Op:
        """An operator with the tensors that it reads. A Select takes the picks of its inputs'
        parts."""
        if isinstance(op, Select) and not op.joined:
            phases = [
                [
                    dataclasses.replace(pick, x=names[value], channels=picked)
                    for pick in picks
                    for value, channels in self._values(out, pick.x).items()
                    for picked in [_taken(channels, pick.channels)]
                    if (picked >= 0).any()
                ]
                for picks in op.phases
            ]
            return dataclasses.replace(op, phases=phases)
        if op.output not in self.graph.tensors:  # of one part
            return dataclasses.replace(op, x=names[reads[0]])
        return op

    # What it costs -------------------------------------------------------------------------------

    def _cost(self, joined: Joined) -> float:
        """Cycles, about, but for operators that are the same whatever is virtual."""
        return sum(STAGE + self._cycles(joined, op) for _, op in joined.ops)

    def _cycles(self, joined: Joined, op: Op) -> float:
        tensors, config = joined.graph.tensors, self.config
        n, channels, h, w = tensors[op.output].shape
        blocks = layout.blocks_of(channels, config.rows)
        pixels = n * h * w
        if windowed(op, config):
            kernel = op.kernel if isinstance(op, Pool) else op.weights.shape[2:]
            taps = kernel[0] * kernel[1] if max(kernel) > 3 else 1
            return blocks * max(pixels * taps, n * int(np.prod(tensors[op.x].shape[2:])))
        post = pixels * blocks * (1 + TABLE * (op.output in joined.made))
        if isinstance(op, Conv | ConvTranspose):
            size = pixels if isinstance(op, Conv) else n * int(np.prod(tensors[op.x].shape[2:]))
            kernels = 1 if op.weights.dtype == np.int8 else 2
            taps = kernels * op.weights.shape[2] * op.weights.shape[3]
            tiles = len(set(self._tiles(joined, op)))
            return max(max(size, config.rows) * taps * tiles, post)
        if isinstance(op, Select):
            tiles = sum(
                len(set(zip((taken // config.cols).tolist(), blocks_of.tolist())))
                for picks in op.phases
                for pick in picks
                for taken in [np.flatnonzero(pick.channels >= 0)]
                for blocks_of in [pick.channels[taken] // config.rows]
            )
            return max(pixels // len(op.phases) * tiles, post)
        return post if isinstance(op, Table) else 0

    def _tiles(self, joined: Joined, op: Conv | ConvTranspose) -> Iterator[tuple[int, int, int]]:
        """The weight tiles of a tap: column block, part and channel block of it."""
        rows, cols = self.config.rows, self.config.cols
        count = joined.graph.tensors[op.x].shape[1]
        parts = joined.parts.get(op.x, (Part(op.x, np.arange(count)),))
        outputs = len(op.weights) // op.group
        for g in range(op.group):
            columns = range(g * outputs // cols, ((g + 1) * outputs - 1) // cols + 1)
            inputs = slice(g * count // op.group, (g + 1) * count // op.group)
            for k, part in enumerate(parts):
                channels = part.channels[inputs]
                for block in np.unique(channels[channels >= 0] // rows).tolist():
                    yield from ((column, k, block) for column in columns)


def _step(first: _Value, then: _Value) -> np.ndarray | None:
    """The function that makes one value of another one of the same tensor, if there is one."""
    inner, outer = (np.frombuffer(v.table, np.int8) for v in (first, then))
    step = np.zeros(256, np.int8)
    step[inner.astype(int) + 128] = outer
    return step if np.array_equal(numerics.lookup(inner, step), outer) else None


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
