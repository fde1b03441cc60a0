"""Depth-first execution: a chain of stages carried out in stripes of rows, so that what passes
between them needs a few rows of scratchpad, not a whole tensor and not DRAM.

Stripe s of a stage makes the rows that stripe s of its consumers needs beyond those made already;
nothing is computed twice. Between two stages lie the rows still needed, in a buffer that slides
down the image: rows follow each other until the buffer is full, then those still needed are copied
to its start. Every stage runs one stripe behind its producers, so that no engine waits for what it
has just been given to do."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from systole.sw.compiler.stages import Source, Stage
from systole.sw.ir.graph import Graph


@dataclass(frozen=True)
class Chain:
    """Consecutive stages ``first``..``last`` carried out together in stripes; or a single stage,
    which is not striped."""

    first: int
    last: int
    stripes: int = 1
    woven: int = 0
    """Not 0: the stages are not striped, but take turns region by region (:mod:`.weave`), these of
    so many outputs at most."""

    @property
    def stages(self) -> range:
        return range(self.first, self.last + 1)

    @property
    def fused(self) -> bool:
        """It is carried out in stripes."""
        return self.last > self.first and not self.woven


@dataclass(frozen=True)
class Schedule:
    """What the search decides."""

    chains: tuple[Chain, ...] = ()
    """The fused chains, disjoint and in order."""
    regions: tuple[tuple[int, int], ...] = ()
    """For single stages (stage, outputs per region at most) where that is not the usual number."""


@dataclass(frozen=True)
class Roll:
    """The buffer of a tensor that passes through the scratchpad row by row."""

    rows: int
    """Rows that the buffer holds."""
    width: int
    blocks: int
    origins: tuple[int, ...]
    """By stripe, the row at the buffer's start while and after the stripe is made."""
    kept: tuple[tuple[int, int], ...]
    """By stripe, the rows (first, end) that are copied to the start before it is made."""

    @property
    def words(self) -> int:
        return self.rows * self.width * self.blocks


def in_rows(stage: Stage, graph: Graph) -> Stage:
    """The stage with the rows of the graph's tensors, if it sees its images as one row."""
    h, w = graph.tensors[stage.op.output].shape[2:]
    if (stage.out_h, stage.out_w) == (h, w):
        return stage
    sources = tuple(
        s if s.broadcast or s.packed else dataclasses.replace(s, h=shape[2], w=shape[3])
        for s in stage.sources
        for shape in [graph.tensors[s.tensor].shape]
    )
    return dataclasses.replace(stage, h=h, w=w, out_h=h, out_w=w, sources=sources)


def depths(stages: list[Stage], chain: Chain) -> dict[int, int]:
    """By stage, the stripes that it runs behind the first."""
    producers = {stages[i].op.output: i for i in chain.stages}
    out: dict[int, int] = {}
    for i in chain.stages:
        names = [s.tensor for s in stages[i].sources]
        before = [producers[name] for name in names if producers.get(name, i) < i]
        out[i] = max((out[k] + 1 for k in before), default=0)
    return out


def row_ends(stages: list[Stage], chain: Chain) -> dict[int, list[int]]:
    """By stage and stripe, the row (of a phase) up to which its output has been made."""
    ends: dict[int, list[int]] = {}
    needed: dict[str, list[int]] = {}
    for i in reversed(chain.stages):
        stage = stages[i]
        step = stage.steps[0]
        wanted = needed.get(stage.op.output)
        if wanted is None:  # nobody in the chain reads it: it is made in even stripes
            own = [stage.h * (s + 1) // chain.stripes for s in range(chain.stripes)]
        else:
            own = [min(-(-row // step), stage.h) for row in wanted]
            own[-1] = stage.h
        ends[i] = own
        for source in stage.sources:
            rows = needed.setdefault(source.tensor, [0] * chain.stripes)
            before = 0
            for s, end in enumerate(own):
                if end > before:
                    high = 1 if source.broadcast else source.span(0, before, end - before)[1]
                    rows[s] = max(rows[s], high)
                rows[s] = max(rows[s], rows[s - 1] if s else 0)
                before = end
    return ends


def roll(stages: list[Stage], chain: Chain, producer: int, ends: dict[int, list[int]]) -> Roll:
    """The smallest buffer for the output of a stage of the chain in which it can be made while the
    stripe before is still being read. No stripe may be empty."""
    stage = stages[producer]
    depth = depths(stages, chain)
    own_ends = [min(end * stage.steps[0], stage.out_h) for end in ends[producer]]
    # By reader: how many stripes it is behind, and the first row that each of its stripes reads.
    readers = [
        (depth[i] - depth[producer], _starts(source, ends[i]))
        for i in chain.stages
        for source in stages[i].sources
        if source.tensor == stage.op.output
    ]

    def unread(t: int, ahead: int) -> int:
        """The first row still to be read when stripe ``t`` is made, every reader ``ahead`` stripes
        further on than it has to be."""
        left = [
            starts[max(t - lag + ahead, 0)]
            for lag, starts in readers
            if t - lag + ahead < len(own_ends)
        ]
        return min([own_ends[t], *left])

    lows = [unread(t, 1) for t in range(chain.stripes)]
    rows = max(end - unread(t, 0) for t, end in enumerate(own_ends))
    while True:
        rows = min(rows, stage.out_h)
        placed = _slide(own_ends, lows, rows)
        if placed is not None:
            return Roll(rows, stage.out_w, stage.blocks, *placed)
        rows += 1


def _starts(source: Source, ends: list[int]) -> list[int]:
    """The first row that each stripe of a reader reads."""
    if source.broadcast:
        return [0] * len(ends)
    return [source.span(0, a, b - a)[0] for a, b in zip([0, *ends], ends)]


def _slide(
    ends: list[int], lows: list[int], rows: int
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]] | None:
    """Origins and copies of a buffer of so many rows (as of :class:`Roll`); None: too small.

    By stripe, ``ends`` are the rows up to which the tensor has been made, ``lows`` the first rows
    that are still to be read."""
    origin = end = 0
    origins, kept = [], []
    for high, low in zip(ends, lows):
        low, keep = min(low, end), (0, 0)  # rows that nobody reads are made as well
        if high - origin > rows:
            if high - low > rows or end - low > low - origin:
                return None
            origin, keep = low, (low, end)
        origins.append(origin)
        kept.append(keep)
        end = high
    return tuple(origins), tuple(kept)


def order(stages: list[Stage], chain: Chain) -> list[tuple[int, int]]:
    """The (stage, stripe) of a fused chain for one image, as they are carried out."""
    depth = depths(stages, chain)
    out = []
    for t in range(chain.stripes + max(depth.values())):
        for i in reversed(chain.stages):
            if 0 <= t - depth[i] < chain.stripes:
                out.append((i, t - depth[i]))
    return out
