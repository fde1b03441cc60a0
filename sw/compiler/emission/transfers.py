"""Transfers between DRAM and scratchpad."""

from __future__ import annotations

from typing import NamedTuple

from systole.isa import Engine, LoadTarget, Opcode
from systole.sw.compiler.emission import fields
from systole.sw.compiler.emission.context import EmissionContext
from systole.sw.compiler.limits import largest
from systole.sw.compiler.plan import FixedKey
from systole.sw.compiler.regions import cuts
from systole.sw.compiler.stream import Span, StreamMemory

MAX_COUNT = largest(Opcode.LOAD, "count0")
"""Words of one contiguous run."""


class TransferBox(NamedTuple):
    """Words in runs, and runs in groups, in DRAM as well as in the scratchpad."""

    address: int
    """DRAM byte address of the first word."""
    local: int
    """First scratchpad word."""
    counts: tuple[int, int, int]
    """Groups, runs in a group, words in a run."""
    dram_steps: tuple[int, int] = (0, 0)
    """DRAM bytes from one group, and one run, to the next."""
    local_steps: tuple[int, int] = (0, 0)
    """Scratchpad words from one group, and one run, to the next."""

    def simplified(self, vector: int) -> TransferBox:
        """The same with contiguous runs, of words of ``vector`` bytes, as one."""
        box = self._with_runs_merged(vector)
        groups, runs, words = box.counts
        if runs > 1:
            return box
        box = box._replace(
            counts=(1, groups, words),
            dram_steps=(0, box.dram_steps[0]),
            local_steps=(0, box.local_steps[0]),
        )
        return box._with_runs_merged(vector)

    def _with_runs_merged(self, vector: int) -> TransferBox:
        groups, runs, words = self.counts
        follow = self.dram_steps[1] == words * vector and self.local_steps[1] == words
        if runs > 1 and follow and words * runs <= MAX_COUNT:
            return self._replace(counts=(groups, 1, words * runs))
        return self


def transfer(context: EmissionContext, engine: Engine, i: int, box: TransferBox) -> None:
    """Emit LOAD (engine LOAD or WLOAD) or STORE for stage ``i``."""
    stream, vector = context.stream, context.config.vector_bytes
    box = box.simplified(vector)
    groups, runs, words = box.counts
    (dram2, dram1), (local2, local1) = box.dram_steps, box.local_steps
    values = dict(
        dram=box.address,
        count0=words,
        count1=runs,
        count2=groups,
        dram1=dram1 if runs > 1 else 0,
        dram2=dram2 if groups > 1 else 0,
        local=box.local,
        local1=local1 if runs > 1 else 0,
        local2=local2 if groups > 1 else 0,
    )
    unit = stream.dram_unit
    counts = (groups, runs, words * (vector // unit))
    dram = Span(StreamMemory.DRAM, box.address // unit, counts, (dram2 // unit, dram1 // unit))
    local = Span(StreamMemory.SCRATCHPAD, box.local, box.counts, box.local_steps)
    if engine == Engine.STORE:
        stream.emit(Opcode.STORE, fields.store(**values), [local], [dram], stage=i)
    else:
        values = fields.load(target=LoadTarget.SCRATCHPAD, **values)
        stream.emit(Opcode.LOAD, values, [dram], [local], stage=i, engine=engine)


def load_fixed(context: EmissionContext, i: int) -> None:
    """Bring parameters, window weights and table of a stage into the scratchpad."""
    words = context.stages[i].fixed_words
    if not words:
        return
    address, local = context.constants[i].fixed, context.plan.addresses[FixedKey(i)]
    assert address is not None
    for at, count in cuts(words, MAX_COUNT):
        start = address + at * context.config.vector_bytes
        box = TransferBox(address=start, local=local + at, counts=(1, 1, count))
        transfer(context, Engine.WLOAD, i, box)
