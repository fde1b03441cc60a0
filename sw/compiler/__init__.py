"""The compiler: a quantised graph and a configuration to a program.

Passes: lowering (:mod:`~sw.compiler.lowering`), the search for a schedule
(:mod:`~sw.compiler.search`), planning (:mod:`~sw.compiler.plan`), emission
(:mod:`~sw.compiler.emission`) into a command stream that derives its own tokens
(:mod:`~sw.compiler.stream`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from systole.isa import Config
from systole.sw.compiler.emission import EmissionContext, ProgramEmitter, StageConstants
from systole.sw.compiler.lowering import lower
from systole.sw.compiler.packing import Buffer, pack
from systole.sw.compiler.plan import PLAIN, ChoicesKey, Plan, Planner
from systole.sw.compiler.search import Search
from systole.sw.compiler.stageplan import StageChoices
from systole.sw.compiler.stages import ArrayStage, Stage
from systole.sw.compiler.stream import CommandStream
from systole.sw.compiler.stripes import Schedule
from systole.sw.ir import layout
from systole.sw.ir.graph import Graph, ModelError, Op, macs
from systole.sw.progress import Share, unseen
from systole.sw.runtime.driver import MAX_MEMORY
from systole.sw.runtime.program import DramTensor, Layer, Program

Optimise = Literal["fast", "best"]
"""How long to search for a schedule."""

READ_LATENCY = 64
"""Cycles of read latency of the memory that schedules are tried on, unless another is named."""

ALIGN = 4096
"""Alignment of the parts of the DRAM window: one AXI burst never crosses 4 KiB."""

CONSTANT_ALIGN = 64
"""Alignment of each tensor and constant, in bytes."""


def align(n: int, to: int = ALIGN) -> int:
    """``n`` rounded up."""
    return -(-n // to) * to


class Constants:
    """The constant part of the DRAM image."""

    def __init__(self, stages: list[Stage], graph: Graph, config: Config):
        self.data = bytearray()
        self.stages = [self._of_stage(stage, config) for stage in stages]
        """By stage, byte offsets of what it needs."""
        self.tensors: dict[str, int] = {}
        """By name, byte offsets of tensors that nothing computes."""
        for name, array in graph.constants.items():
            words = layout.pack_blocked(array, config.rows)
            self.tensors[name] = self._add(layout.to_dram(words, config.vector_bytes))

    def _of_stage(self, stage: Stage, config: Config) -> StageConstants:
        fixed = weights = None
        if stage.fixed:
            words = np.concatenate([words for _, words in stage.fixed])
            fixed = self._add(layout.to_dram(words, config.vector_bytes))
        if isinstance(stage, ArrayStage):
            weights = self._add(layout.to_dram(stage.weights, config.weight_vector_bytes))
        return StageConstants(fixed, weights)

    def _add(self, content: bytes) -> int:
        """The byte offset of new content."""
        self.data.extend(bytes(-len(self.data) % CONSTANT_ALIGN))
        offset = len(self.data)
        self.data.extend(content)
        return offset


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
        size = align(words * config.vector_bytes, CONSTANT_ALIGN)
        buffers.append(Buffer(name, size, first, end))
    return pack(buffers)


@dataclass(frozen=True)
class _DramWindow:
    """The DRAM window behind the commands, from 0."""

    tensors: dict[str, int]
    """Byte addresses of tensors that are not constant."""
    size: int
    """Bytes of constants and tensors."""


class Compiler:
    """A graph lowered for a configuration, to be compiled by one schedule or another."""

    def __init__(self, graph: Graph, config: Config):
        """Raises :class:`ModelError` for what the configuration's engines cannot do."""
        self.lowering = lower(graph, config)
        self.graph, self.config = graph, config
        self.stages = self.lowering.stages
        self.constants = Constants(self.stages, graph, config)
        self._choices: dict[ChoicesKey, StageChoices] = {}
        self._last: tuple[tuple[Schedule, bool], Program] | None = None

    def planner(self, schedule: Schedule = PLAIN, *, dump: bool = False) -> Planner:
        """A planner; ``dump`` as in :func:`compile_graph`."""
        stored = {p.tensor for p in self.graph.outputs}
        graph = self.lowering.graph
        if dump:
            stored |= {stage.op.output for stage in self.stages} & graph.tensors.keys()
        planner = Planner(
            graph=graph,
            stages=self.stages,
            config=self.config,
            stored=stored,
            schedule=schedule,
            choices=self._choices,
        )
        for name in stored - set(planner.words):
            raise ModelError(f"output {name}: is a graph input, nothing computes it")
        return planner

    def check(self) -> None:
        """Raises :class:`~sw.ir.graph.ModelError` for what does not fit in the scratchpad, whatever
        the schedule."""
        self.planner().plan()

    def search(
        self,
        optimise: Optimise = "fast",
        read_latency: int = READ_LATENCY,
        share: Share = unseen,
    ) -> Schedule:
        """The schedule that :mod:`~sw.compiler.search` chooses for a memory of so many cycles' read
        latency; ``share`` takes how much of the search is done. Raises
        :class:`~sw.ir.graph.ModelError` for what does not fit."""
        search = Search(self.program, read_latency, [stage.layer for stage in self.stages])
        if optimise == "fast":
            return search.fast(self.planner(), share)
        return search.best(search.fast(self.planner()), share)

    def program(self, schedule: Schedule, *, dump: bool = False) -> Program:
        """The program by a schedule. The last one is kept, as it mostly is the one that a search
        chose.

        Raises :class:`~sw.ir.graph.ModelError` for what does not fit."""
        if self._last is None or self._last[0] != (schedule, dump):
            self._last = (schedule, dump), self._compile(schedule, dump)
        return self._last[1]

    def _compile(self, schedule: Schedule, dump: bool) -> Program:
        graph, config = self.lowering.graph, self.config
        planner = self.planner(schedule, dump=dump)
        plan = planner.plan()
        window = self._dram_window(planner, plan, dump)
        # Commands come first, but their number is only known behind emission: emit from 0, then
        # move.
        stream = self._emit(planner, plan, window)
        words = stream.words(lambda n: align(8 * n))
        shift = align(8 * len(words))
        self._check_memory(shift + window.size, "commands, weights and tensors")
        image = bytearray(shift + len(self.constants.data))
        image[: 8 * len(words)] = words.astype("<u8").tobytes()
        image[shift:] = self.constants.data
        return Program(
            model=graph.name,
            config=config,
            image=bytes(image),
            command_offset=0,
            command_words=len(words),
            memory_bytes=align(shift + window.size),
            inputs=graph.inputs,
            outputs=graph.outputs,
            tensors=self._placements(planner, window, shift),
            layers=[self._layer(op) for op in graph.ops],
            command_layers=[planner.stages[c.stage].layer for c in stream.commands],
        )

    def _dram_window(self, planner: Planner, plan: Plan, dump: bool) -> _DramWindow:
        """Addresses of tensors behind the constants."""
        graph = self.lowering.graph
        tensors, tensor_bytes = _place_tensors(planner, plan, graph, self.config, dump)
        first = align(len(self.constants.data))
        self._check_memory(first + tensor_bytes, "weights and tensors")
        return _DramWindow({name: first + at for name, at in tensors.items()}, first + tensor_bytes)

    def _check_memory(self, size: int, content: str) -> None:
        if size >= MAX_MEMORY:
            raise ModelError(
                f"model {self.graph.name}: {content} take {size} bytes of DRAM, over {MAX_MEMORY}"
            )

    def _emit(self, planner: Planner, plan: Plan, window: _DramWindow) -> CommandStream:
        """The commands, their DRAM addresses relative to the window's start."""
        config = self.config
        unit = min(config.vector_bytes, config.weight_vector_bytes)
        stream = CommandStream(unit)
        context = EmissionContext(
            config=config,
            stages=planner.stages,
            plan=plan,
            stream=stream,
            dram=window.tensors | self.constants.tensors,
            constants=self.constants.stages,
            stored=planner.stored,
        )
        ProgramEmitter(context).emit()
        stream.check_tokens()
        return stream

    def _placements(
        self, planner: Planner, window: _DramWindow, shift: int
    ) -> dict[str, DramTensor]:
        """Where inputs, outputs and other stored tensors of the graph lie in DRAM."""
        graph, kept = self.lowering.graph, planner.stored | {p.tensor for p in self.graph.inputs}
        placements = {}
        for name, at in window.tensors.items():
            size = planner.words[name] * self.config.vector_bytes
            kind = "packed" if name in self.lowering.packed else "blocked"
            if name in graph.tensors and name in kept:
                placements[name] = DramTensor(graph.tensors[name], at + shift, size, kind)
        return placements

    def _layer(self, op: Op) -> Layer:
        """What the program says about an operator."""
        shape = self.graph.tensors[op.output].shape
        replacement = self.lowering.joined.replacements.get(op.output)
        stored, table = op.output, None
        if replacement is not None:
            stored, table = replacement.tensor, replacement.table.tolist()
        total = macs(op, self.graph)
        return Layer(
            name=op.name,
            op=op.op_type,
            output=op.output,
            shape=shape,
            macs=total,
            stored=stored,
            table=table,
        )


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
