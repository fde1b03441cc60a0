"""Placement: where each node of a model runs, on the accelerator or on the host.

Between accelerator and host there are only int8 and uint8 tensors, and the model's own inputs and
outputs. So nodes that exchange anything else form a *group*, which is placed as a whole.
Conversions at the border (a DequantizeLinear, the QuantizeLinear of a model input) are *free*: they
belong to whoever needs their result, if need be to several.

Groups on the accelerator, and single nodes on the host, are *units*. They are ordered by *levels*:
even ones run on the accelerator, odd ones on the host, and each unit has the lowest level that its
operands allow. As levels only rise along the graph, no level waits for its own result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from systole.sw.frontend.dataflow import CONVERSIONS, Dataflow
from systole.sw.frontend.macs import node_macs
from systole.sw.frontend.passes.operators import OPERATORS
from systole.sw.frontend.passes.operators.rows import ROW_OPERATORS

FLOAT = "float: quantise first with python -m sw.quantize"
FOR_HOST = "converts a value for the host alone"
NOT_FROM_ACCELERATOR = "converts a value that does not come from the accelerator"
RECURRENT = "operator not supported; python -m sw.quantize writes it out in operators that are"
NO_ROW_OPS = "the machine has no row operations (row_ops = false)"
QUANTISED = ("tensor(int8)", "tensor(uint8)")
"""Types that accelerator and host exchange."""

Unit = tuple[bool, int]
"""What is placed as a whole: on the host (and then its node), or not (and then its group)."""


@dataclass(frozen=True)
class NodePlacement:
    """Where a node runs, and the rule that decided it."""

    name: str
    op_type: str
    value: str
    """Name of its first output."""
    host: bool
    rule: str
    macs: int | None = 0
    """Its multiply-accumulates; None: they are not known."""
    because: str | None = None
    """The node on the host that keeps this one from the accelerator, as ``OPERATOR 'name'``."""

    @property
    def label(self) -> str:
        """Operator and name, as :attr:`because` has them."""
        return f"{self.op_type} {self.name!r}"

    @property
    def converts(self) -> bool:
        """Whether it only converts numbers between the host's types, and has no reason but that."""
        return self.host and self.rule in (FOR_HOST, NOT_FROM_ACCELERATOR)

    def __str__(self) -> str:
        return f"{self.label}: {self.rule}"


class Placement:
    """The placement of a model's nodes, by their index. It changes as nodes are refused."""

    def __init__(self, flow: Dataflow, *, row_ops: bool = True):
        """``row_ops``: the machine has row operations."""
        self.flow = flow
        self._row_ops = row_ops
        self.is_float = not any(
            n.op_type in CONVERSIONS or n.op_type.startswith(("QLinear", "QGemm"))
            for n in flow.nodes
        )
        """No node has to do with quantised numbers."""
        self.reasons: dict[int, str] = {}
        """Why a node runs on the host, for nodes refused themselves."""
        self.host: dict[int, str] = {}
        """Why a node runs on the host, for all nodes there."""
        self.roots: dict[int, int] = {}
        """The node refused itself that keeps another from the accelerator, by that other."""
        self._blocking: dict[int, int] = {}
        """The same for nodes that would wait for themselves."""
        for i, node in enumerate(flow.nodes):
            if (node.domain, node.op_type) not in OPERATORS:
                written_out = node.op_type in ("LSTM", "GRU", "RNN")
                self.reasons[i] = RECURRENT if written_out else "operator not supported"
            elif node.op_type in ROW_OPERATORS and not row_ops:
                self.reasons[i] = NO_ROW_OPS
            elif self.is_float:
                self.reasons[i] = FLOAT
            elif (why := flow.invalid_scale(i)) is not None:
                self.reasons[i] = why
        self.free: list[bool] = []
        """By node: it is a conversion that belongs to whoever reads its result."""

    def by_cause(self, placements: Iterable[NodePlacement]) -> list[NodePlacement]:
        """Placements, those of nodes that were refused themselves first, conversions last."""
        return sorted(
            placements,
            key=lambda p: (p.because is not None or p.converts, p.op_type in CONVERSIONS),
        )

    def main_cause(self, placements: Iterable[NodePlacement]) -> NodePlacement | None:
        """The node refused itself that keeps most multiply-accumulates from the accelerator: its
        own and others'; the first of several."""
        listed = [p for p in placements if p.host]
        kept: Counter[str] = Counter()
        for p in listed:
            kept[p.because or p.label] += p.macs or 0
        return max(self.by_cause(listed), key=lambda p: kept[p.label], default=None)

    def refuse(self, nodes: list[int], why: str, segment: list[int]) -> None:
        """Send nodes to the host; if they are all refused already, the whole segment."""
        if all(i in self.reasons for i in nodes):
            nodes = segment
        for i in nodes:
            self.reasons.setdefault(i, why)

    def levels(self) -> dict[int, int]:
        """The level of every node but free conversions. A group that would wait for itself goes to
        the host, and all nodes are placed anew."""
        while True:
            group = self._groups()
            units = self._units(group)
            members: dict[Unit, list[int]] = {}
            for i, unit in units.items():
                members.setdefault(unit, []).append(i)
            level = self._unit_levels(units, members)
            stuck = [unit for unit in members if unit not in level]
            if not stuck:
                return {i: level[unit] for i, unit in units.items()}
            circle = next(unit for unit in stuck if not unit[0])
            between = self._between(circle, units)
            why = "would form a cycle: depends, via other operators, on its own segment"
            if between is not None:
                why = (
                    f"would form a cycle: depends on its own segment via {self._label(between)}, "
                    "which runs on the host"
                )
            for i in members[circle]:
                self.reasons[i] = why
                if between is not None:
                    self._blocking[i] = between

    def _between(self, circle: Unit, units: Mapping[int, Unit]) -> int | None:
        """The first node on the host that needs a result of the group ``circle``, which in turn
        needs the node's; None if there is none."""
        behind = {i for i, unit in units.items() if unit == circle}
        for i in sorted(units):  # in topological order
            if behind & {*self._sources(i)}:
                behind.add(i)
        own = [i for i, unit in units.items() if unit == circle]
        todo, before = own, set(own)
        while todo:
            found = [s for i in todo for s in self._sources(i) if s not in before]
            before.update(found)
            todo = found
        return min((i for i in behind & before if units[i][0]), default=None)

    def _label(self, i: int) -> str:
        label = self.flow.labels[i]
        return f"{label.op_type} {label.name!r}"

    def _is_free(self, i: int) -> bool:
        node = self.flow.nodes[i]
        if i in self.reasons or node.domain not in ("", "ai.onnx"):
            return False
        if node.op_type == "DequantizeLinear":
            return True
        source = node.inputs[0]
        return node.op_type == "QuantizeLinear" and (
            source is None or source.name not in self.flow.producer
        )

    def _groups(self) -> list[int]:
        """The group of every node, a representative. Fills ``free`` and ``host``."""
        flow = self.flow
        parent = list(range(len(flow.nodes)))

        def find(i: int) -> int:
            while parent[i] != i:
                parent[i] = parent[parent[i]]
                i = parent[i]
            return i

        self.free = [self._is_free(i) for i in range(len(flow.nodes))]
        partners: dict[int, list[int]] = {}
        for i, used in enumerate(flow.uses):
            for name in used:
                source = flow.producer.get(name)
                if source is None or flow.types[name] in QUANTISED:
                    continue
                if self._row_ops and name in flow.masks:  # its sign alone counts, on either side
                    continue
                if not self.free[i] and not self.free[source]:
                    parent[find(i)] = find(source)
                    partners.setdefault(i, []).append(source)
                    partners.setdefault(source, []).append(i)
        self._spread(partners)
        return [find(i) for i in range(len(parent))]

    def _spread(self, partners: Mapping[int, list[int]]) -> None:
        """Fill ``host`` and ``roots``: the nodes refused, and all that exchange unquantised values
        with them (``partners``) or with each other, each on account of the nearest one refused."""
        self.host = {i: self.reasons[i] for i in sorted(self.reasons)}
        self.roots = {}
        todo = list(self.host)
        for i in todo:
            root = self.roots.get(i, self._blocking.get(i, i))
            for other in partners.get(i, ()):
                if other not in self.host:
                    self.host[other] = f"because {self._label(root)} runs on the host"
                    if self.flow.labels[root].op_type in CONVERSIONS and root in self.reasons:
                        # Which no report has a line of.
                        self.host[other] += f": {self.reasons[root]}"
                    self.roots[other] = root
                    todo.append(other)
        self.roots |= self._blocking

    def _units(self, group: list[int]) -> dict[int, Unit]:
        """The unit of every node but free conversions. Of those, the ones that compute an output of
        the model run where their operand comes from."""
        units: dict[int, Unit] = {}
        for i, node in enumerate(self.flow.nodes):
            if not self.free[i]:
                units[i] = (True, i) if i in self.host else (False, group[i])
            elif not self.flow.results.isdisjoint(v.name for v in node.outputs):
                source = next(self._sources(i), None)
                on_host = source is None or source in self.host
                if on_host:
                    self.host[i] = NOT_FROM_ACCELERATOR
                units[i] = (on_host, i)
        return units

    def _sources(self, i: int) -> Iterator[int]:
        """Nodes that a node depends on, directly or through free conversions."""
        for name in self.flow.uses[i]:
            source = self.flow.producer.get(name)
            if source is None:
                continue
            if self.free[source]:
                yield from self._sources(source)
            else:
                yield source

    def _unit_levels(
        self, units: Mapping[int, Unit], members: Mapping[Unit, list[int]]
    ) -> dict[Unit, int]:
        """The level of every unit that does not wait for itself."""
        needs = {
            unit: {units[s] for i in nodes for s in self._sources(i)} - {unit}
            for unit, nodes in members.items()
        }
        readers: dict[Unit, list[Unit]] = {unit: [] for unit in members}
        for unit, others in needs.items():
            for other in others:
                readers[other].append(unit)
        missing = {unit: len(others) for unit, others in needs.items()}
        level: dict[Unit, int] = {}
        ready = [unit for unit in members if not missing[unit]]
        for unit in ready:
            own = int(unit[0])
            least = [level[s] + (level[s] % 2 != own) for s in needs[unit]]
            level[unit] = max([*least, -own])
            for reader in readers[unit]:
                missing[reader] -= 1
                if not missing[reader]:
                    ready.append(reader)
        return level

    def with_conversions(self, own: Iterable[int]) -> list[int]:
        """Nodes, and the free conversions that they read from."""
        nodes, todo = set(own), list(own)
        while todo:
            for name in self.flow.uses[todo.pop()]:
                source = self.flow.producer.get(name)
                if source is not None and self.free[source] and source not in nodes:
                    nodes.add(source)
                    todo.append(source)
        return sorted(nodes)

    def of_nodes(self) -> list[NodePlacement]:
        """The placement of every node, once there are levels."""
        users: dict[int, list[int]] = {}
        for i, used in enumerate(self.flow.uses):
            for name in used:
                if name in self.flow.producer:
                    users.setdefault(self.flow.producer[name], []).append(i)
        rules: dict[int, tuple[bool, str]] = {}
        for i in reversed(range(len(self.flow.nodes))):
            node, readers = self.flow.nodes[i], users.get(i, [])
            if i in self.host:
                rules[i] = (True, self.host[i])
            elif self.free[i] and readers and all(rules[u][0] for u in readers if u != i):
                rules[i] = (True, FOR_HOST)
            else:
                doc = OPERATORS[node.domain, node.op_type].__doc__ or ""
                rules[i] = (False, " ".join(doc.split()))
        return [self._of_node(i, *rules[i]) for i in range(len(self.flow.nodes))]

    def of_host_node(self, i: int) -> NodePlacement:
        """The placement of a node on the host."""
        return self._of_node(i, True, self.host[i])

    def _of_node(self, i: int, host: bool, rule: str) -> NodePlacement:
        label = self.flow.labels[i]
        return NodePlacement(
            name=label.name,
            op_type=label.op_type,
            value=label.output,
            host=host,
            rule=rule,
            macs=node_macs(self.flow.nodes[i]),
            because=self._label(self.roots[i]) if host and i in self.roots else None,
        )
