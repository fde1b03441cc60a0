"""The compiler: a quantised graph and a configuration to a program.

Passes: lowering (:mod:`~sw.compiler.lowering`), the search for a schedule
(:mod:`~sw.compiler.search`), planning (:mod:`~sw.compiler.plan`), emission
(:mod:`~sw.compiler.emit`) into a command stream that derives its own tokens
(:mod:`~sw.compiler.stream`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from systole.isa import Config
from systole.sw.compiler.emit import Emitter
from systole.sw.compiler.lowering import lower
from systole.sw.compiler.plan import PLAIN, Buffer, Plan, Planner, pack
from systole.sw.compiler.search import Search
from systole.sw.compiler.stages import ArrayStage, Stage
from systole.sw.compiler.stream import CommandStream
from systole.sw.compiler.stripes import Schedule
from systole.sw.ir import layout
from systole.sw.ir.graph import Graph, ModelError, Op, macs
from systole.sw.runtime.program import DramTensor, Layer, Program

Optimise = Literal["fast", "best"]
"""How long to search for a schedule."""

READ_LATENCY = 64
"""Cycles, of the memory that schedules are tried on unless another is named."""

ALIGN = 4096
"""Alignment of the parts of the DRAM window: one AXI burst never crosses 4 KiB."""

MAX_MEMORY = 1 << 32
"""DRAM addresses in commands are 32 bits."""


def align(n: int, to: int = ALIGN) -> int:
    """``n`` rounded up."""
    return -(-n // to) * to


@dataclass
class Constants:
    """The constant part of the DRAM image."""

    data: bytearray
    offsets: dict[tuple, int]

    def add(self, key: tuple, content: bytes) -> None:
        self.data.extend(bytes(-len(self.data) % 64))
        self.offsets[key] = len(self.data)
        self.data.extend(content)


def _constants(stages: list[Stage], graph: Graph, config: Config) -> Constants:
    """By (stage, role) what stages need, by (name,) the constant tensors."""
    out = Constants(bytearray(), {})
    for i, stage in enumerate(stages):
        if stage.fixed:
            words = np.concatenate([words for _, words in stage.fixed])
            out.add((i, "fixed"), layout.to_dram(words, config.vector_bytes))
        if isinstance(stage, ArrayStage):
            out.add((i, "weights"), layout.to_dram(stage.weights, config.weight_vector_bytes))
    for name, array in graph.constants.items():
        words = layout.pack_blocked(array, config.rows)
        out.add((name,), layout.to_dram(words, config.vector_bytes))
    return out


def _place_tensors(
    planner: Planner, plan: Plan, graph: Graph, config: Config, dump: bool
) -> tuple[dict[str, int], int]:
    """DRAM offsets of the tensors that need one, from 0, and the bytes taken."""
    last = len(planner.stages)
    inputs = {p.tensor for p in graph.inputs}
    buffers = []
    for name, words in planner.words.items():
        if name in graph.constants:
            continue
        on_chip = name in plan.resident or name in plan.rolls
        if on_chip and name not in planner.stored and name not in inputs:
            continue
        kept = dump or name in inputs or name in planner.stored
        first, end = (-1, last) if kept else planner.life[name]
        buffers.append(Buffer((name,), align(words * config.vector_bytes, 64), first, end))
    addresses, top = pack(buffers)
    return {key[0]: at for key, at in addresses.items()}, top


class Compiler:
    """A graph lowered for a configuration, to be compiled by one schedule or another."""

    def __init__(self, graph: Graph, config: Config):
        """Raises :class:`ModelError` for what the configuration's engines cannot do."""
        self.lowering = lower(graph, config)
        self.graph, self.config = graph, config
        self.stages = self.lowering.stages
        self.constants = _constants(self.stages, graph, config)
        self._made: tuple[tuple[Schedule, bool], Program] | None = None

    def planner(self, schedule: Schedule = PLAIN, *, dump: bool = False) -> Planner:
        """A planner; ``dump`` as in :func:`compile_graph`."""
        stored = {p.tensor for p in self.graph.outputs}
        graph = self.lowering.graph
        if dump:
            stored |= {stage.op.output for stage in self.stages} & graph.tensors.keys()
        planner = Planner(graph, self.stages, self.config, stored, schedule)
        for name in stored - set(planner.words):
            raise ModelError(f"output {name}: is a graph input, nothing computes it")
        return planner

    def search(self, optimise: Optimise = "fast", read_latency: int = READ_LATENCY) -> Schedule:
        """The schedule that :mod:`~sw.compiler.search` finds, for a memory of so many cycles' read
        latency. Raises :class:`~sw.ir.graph.ModelError` for what does not fit."""
        search = Search(self.program, read_latency, [stage.layer for stage in self.stages])
        schedule = search.fast(self.planner())
        return search.best(schedule) if optimise == "best" else schedule

    def program(self, schedule: Schedule, *, dump: bool = False) -> Program:
        """The program; the last one made is kept, as it mostly is the one that a search chose.

        Raises :class:`~sw.ir.graph.ModelError` for what does not fit."""
        if self._made is None or self._made[0] != (schedule, dump):
            self._made = (schedule, dump), self._compile(schedule, dump)
        return self._made[1]

    def _compile(self, schedule: Schedule, dump: bool) -> Program:
        graph, config, constants = self.lowering.graph, self.config, self.constants
        planner = self.planner(schedule, dump=dump)
        plan = planner.plan()
        tensors, tensor_bytes = _place_tensors(planner, plan, graph, config, dump)

        # Commands come first, but their number is only known behind emission: emit from 0, then
        # move.
        constants_bytes = align(len(constants.data))
        total = constants_bytes + tensor_bytes
        if total >= MAX_MEMORY:
            raise ModelError(
                f"model {graph.name}: weights and tensors take {total} bytes of DRAM, over "
                f"{MAX_MEMORY}"
            )
        unit = min(config.vector_bytes, config.weight_vector_bytes)
        stream = CommandStream(config, align(total), unit)
        dram = {name: constants_bytes + at for name, at in tensors.items()}
        fixed = {name: constants.offsets[name,] for name in graph.constants}
        stages, stored = planner.stages, planner.stored
        Emitter(config, stages, plan, stream, dram | fixed, constants.offsets, stored).emit()
        stream.check_tokens()

        words = stream.words(lambda n: align(8 * n))
        shift = align(8 * len(words))
        if shift + total >= MAX_MEMORY:
            raise ModelError(
                f"model {graph.name}: commands, weights and tensors take {shift + total} bytes of "
                f"DRAM, over {MAX_MEMORY}"
            )
        image = bytearray(shift + len(constants.data))
        image[: 8 * len(words)] = np.array(words, "<u8").tobytes()
        image[shift:] = constants.data
        inputs = {p.tensor for p in graph.inputs}
        placements = {}
        for name, at in dram.items():
            size = planner.words[name] * config.vector_bytes
            kind = "packed" if name in self.lowering.packed else "blocked"
            if name in graph.tensors and (name in stored or name in inputs):
                placements[name] = DramTensor(graph.tensors[name], at + shift, size, kind)
        return Program(
            model=graph.name,
            config=config,
            image=bytes(image),
            command_offset=0,
            command_words=len(words),
            memory_bytes=align(shift + total),
            inputs=graph.inputs,
            outputs=graph.outputs,
            tensors=placements,
            layers=[self._layer(op) for op in graph.ops],
            command_layers=[stages[c.layer].layer for c in stream.commands],
        )

    def _layer(self, op: Op) -> Layer:
        shape = self.graph.tensors[op.output].shape
        made = self.lowering.joined.made.get(op.output)
        stored, table = (op.output, None) if made is None else (made.tensor, made.table.tolist())
        total = macs(op, self.graph)
        return Layer(op.name, op.op_type, op.output, shape, total, stored, table)


def compile_graph(
    graph: Graph, config: Config, *, dump: bool = False, schedule: Schedule | None = None
) -> Program:
    """Compile for a configuration.

    ``dump``: also store every intermediate tensor that the program makes in DRAM, so that each
    layer can be compared.
    ``schedule``: None: the one of the fast search.
    Raises :class:`~sw.ir.graph.ModelError` for what does not fit.
    """
    compiler = Compiler(graph, config)
    return compiler.program(compiler.search() if schedule is None else schedule, dump=dump)
