"""Stages that take turns, region by region, where a row operation stands among them.

Commands are fetched in order, and each engine's queue holds a few. So two stages on different
engines hardly overlap if one's commands come after all of the other's: the array would wait for a
Softmax, and the window engine for the array. Here a region's commands follow as soon as what it
reads has been made. Nothing else changes: every stage keeps its regions, in their order, and
tensors lie where they lay.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence, Set

from systole.isa import Config, Engine
from systole.sw.compiler.costs import array_cycles, work
from systole.sw.compiler.regions import Region
from systole.sw.compiler.stageplan import StagePlan
from systole.sw.compiler.stages import (
    POINTWISE,
    ArrayStage,
    RowStage,
    Source,
    Stage,
    TransposeStage,
)
from systole.sw.compiler.stripes import Chain

MOST = 8
"""Stages of a group."""
TRANSFERS = (Engine.LOAD, Engine.STORE)
"""They run ahead and behind; only what passes through DRAM within a group waits for them."""
REGION, LEAST = 128, 24
"""Outputs of a region: half of an image's, but no more and no fewer than these."""


def groups_of(stages: Sequence[Stage], taken: Collection[int]) -> list[Chain]:
    """The groups that may take turns: what makes a row operation's operand, the row operation, and
    the stages behind it that read its result, or what these make. Stages ``taken`` are in none."""
    groups: list[Chain] = []
    end = -1
    for i, stage in enumerate(stages):
        if not isinstance(stage, RowStage) or i in taken or i <= end:
            continue
        before, read = i - 1, _read(stage)
        joined = before > end and before not in taken and stages[before].op.output in read
        first = before if joined else i
        made, last = {stage.op.output}, i
        while last + 1 < len(stages) and last + 1 not in taken and last - first + 1 < MOST:
            follower = stages[last + 1]
            if isinstance(follower, RowStage) or not made & _read(follower):
                break
            behind = stages[last + 2 : last + 3]
            if any(isinstance(s, RowStage) and follower.op.output in _read(s) for s in behind):
                break  # It is the first of the next group.
            made.add(follower.op.output)
            last += 1
        if last > first:
            most = min(REGION, max(-(-stage.h * stage.w // 2), LEAST))
            groups.append(Chain(first, last, woven=most))
            end = last
    return groups


def woven(
    stages: Sequence[Stage], plans: Sequence[StagePlan], on_chip: Set[str], config: Config
) -> list[tuple[int, int]]:
    """The order in which regions are carried out: stages by their number among ``stages``, and
    regions. Of the regions that are next in their stage and whose operands are made, the one comes
    first that can begin first."""
    needs = [
        [_needed(stages, plans, i, region) for region in plan.regions]
        for i, plan in enumerate(plans)
    ]
    cycles = [_cycles(stage, plan, on_chip, config) for stage, plan in zip(stages, plans)]
    moved = [{e: own.pop(e, 0) for e in TRANSFERS} for own in cycles]
    free: Counter[Engine] = Counter()
    ends: list[list[float]] = [[] for _ in stages]
    out: list[tuple[int, int]] = []
    total = sum(len(plan.regions) for plan in plans)
    while len(out) < total:
        starts = {}
        for i, own in enumerate(ends):
            if len(own) == len(plans[i].regions):
                continue
            needed = needs[i][len(own)]
            if all(len(ends[k]) >= count for k, count in needed.items()):
                made = max((ends[k][count - 1] for k, count in needed.items()), default=0)
                if needed:
                    made += moved[i][Engine.LOAD]
                busy = max((free[e] for e, c in cycles[i].items() if c), default=0)
                starts[i] = max(made, busy)
        chosen = min(starts, key=lambda i: (starts[i], i))
        begin = starts[chosen]
        out.append((chosen, len(ends[chosen])))
        for engine, count in cycles[chosen].items():
            if count:
                free[engine] = math.ceil(max(free[engine], begin) + count)
        own_end = begin + max(cycles[chosen].values(), default=0)
        ends[chosen].append(own_end + moved[chosen][Engine.STORE])
    return out


def _read(stage: Stage) -> set[str]:
    """Tensors that a stage reads."""
    read = {source.tensor for source in stage.sources}
    if isinstance(stage, ArrayStage) and stage.product is not None:
        read |= {*stage.product.tensors}
    return read


def _cycles(
    stage: Stage, plan: StagePlan, on_chip: Set[str], config: Config
) -> dict[Engine, float]:
    """An engine's cycles for a region of a stage, about."""
    total = work(stage, plan, {*on_chip}, config)
    if isinstance(stage, ArrayStage) and stage.product is not None:
        tiles = stage.sources[0].blocks * stage.blocks
        total[Engine.CONV] = sum(array_cycles(r.pixels, tiles, config) for r in plan.regions)
    return {engine: count / len(plan.regions) for engine, count in total.items()}


def _needed(
    stages: Sequence[Stage], plans: Sequence[StagePlan], i: int, region: Region
) -> dict[int, int]:
    """How many regions of other stages must be made for a region of stage ``i``, by stage."""
    out: dict[int, int] = {}
    for k, producer in enumerate(stages[:i]):
        tensor = producer.op.output
        if tensor not in _read(stages[i]):
            continue
        regions = plans[k].regions
        sources = [s for s in stages[i].sources if s.tensor == tensor]
        if not sources or not all(_aligned(producer, stages[i], s) for s in sources):
            out[k] = len(regions)
        else:
            out[k] = 1 + max(r for r, other in enumerate(regions) if _meet(region, other))
    return out


def _aligned(producer: Stage, reader: Stage, source: Source) -> bool:
    """Whether positions and images of a source are those of the producer's output."""
    if isinstance(reader, TransposeStage) or reader.batch != producer.batch:
        return False
    same = (source.h, source.w) == (producer.out_h, producer.out_w) == (reader.h, reader.w)
    plain = all(g == POINTWISE for g in source.geometries) and not (
        source.packed or source.broadcast
    )
    if not same or not plain or (producer.steps, reader.steps) != ((1, 1), (1, 1)):
        return False
    if source.spread is None:
        return producer.image_place(0)[1] == source.h * source.w
    places = [producer.image_place(n) for n in range(reader.batch)]
    return places == [(start, source.spread.step) for start in source.spread.starts]


def _meet(a: Region, b: Region) -> bool:
    """Whether two regions share a position."""
    across = a.x < b.x + b.w and b.x < a.x + a.w
    return a.n == b.n and across and a.y < b.y + b.h and b.y < a.y + a.h
