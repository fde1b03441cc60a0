"""The search for a schedule: which stages are fused into chains, in how many stripes, and how large
the regions of the others are.

*fast* estimates: a stage takes as long as its busiest engine, a chain as long as the engine that is
busiest over all its stages, and what stays within it costs no transfer; the cycle model then says
whether the whole program gains. *best* goes on from there:
it tries changes one at a time on the whole program and keeps those for which the cycle model says
fewer cycles (at equal cycles, fewer bytes moved)."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

from systole.isa import Config, Engine, PostOp
from systole.sw.compiler.plan import PLAIN, DoesNotFitError, Planner
from systole.sw.compiler.regions import input_extent, output_extent, tiles
from systole.sw.compiler.stageplan import StagePlan
from systole.sw.compiler.stages import ArrayStage, Stage
from systole.sw.compiler.stripes import Chain, Schedule, depths
from systole.sw.ir.graph import ModelError
from systole.sw.runtime.program import Program
from systole.sw.simulate.cycles import predict_layers

LONGEST = 8
"""Stages in one chain at most."""

STRIPES = (8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 104, 112, 128, 208)
"""Numbers of stripes that are tried: enough of them that filling and draining costs little."""

FINER = (2, 4)
"""Times the fewest stripes that fit, that are tried too."""

GAIN = 0.01
"""Of its cycles, that a chain has to save by the estimate."""

COMMAND = 30
"""Cycles that a WINDOW command costs beside its words."""


def work(stage: Stage, plan: StagePlan, on_chip: set[str], config: Config) -> Counter[Engine]:
    """Cycles that each engine is busy with a stage, about. ``on_chip``: tensors that are not
    moved."""
    out: Counter[Engine] = Counter()
    beats = max(1, config.vector_bytes // config.beat_bytes)
    columns = -(-stage.channels // config.cols)
    for region in plan.regions:
        for source in stage.sources:
            if source.tensor not in on_chip:
                out[Engine.LOAD] += math.prod(input_extent(source, region)[2:]) * source.blocks
        if stage.op.output not in on_chip:
            out[Engine.STORE] += math.prod(output_extent(stage, region)[2:]) * stage.blocks
        if stage.kind == "array":
            for tile in tiles(region, config):
                out[Engine.CONV] += _tiles(stage) * max(tile.pixels, config.rows)
                out[Engine.POST] += len(stage.phases) * columns * tile.pixels
        elif stage.kind == "vector":
            words = region.pixels * stage.groups
            once = stage.combine.op == PostOp.NONE or stage.sources[-1].broadcast
            out[Engine.POST] += words * (1 if once else 2)
        else:
            (g,) = stage.sources[0].geometries
            words = math.prod(
                (n - 1) * s + k for n, s, k in zip((region.h, region.w), g.strides, g.kernel)
            )
            if max(g.kernel) > config.window_kernel:
                words = region.pixels * math.prod(g.kernel)
            else:
                words += region.pixels * sum(k > 3 for k in g.kernel)
            out[Engine.WINDOW] += stage.groups * (words + COMMAND)
    if isinstance(stage, ArrayStage) and stage.fold is not None:
        f = stage.fold
        rows = stage.sources[0].h if f.by_row else stage.h * f.geometry.kernel[0]
        run = (f.run + config.rows - 1) / config.rows
        out[Engine.WINDOW] += int(stage.batch * rows * stage.w * f.runs * run)
    out[Engine.LOAD] *= beats
    out[Engine.STORE] *= beats
    return out


def _tiles(stage: ArrayStage) -> int:
    """Weight tiles of all phases and columns."""
    return sum(
        run.blocks * math.prod(each.geometry.kernel)
        for phase in stage.phases
        for each in phase.passes
        for column in each.runs
        for run in column
    )


def _words(stages: list[Stage]) -> int:
    return sum(len(s.weights) for s in stages if isinstance(s, ArrayStage))


class _FastSearch:
    """Chains by estimate."""

    def __init__(self, planner: Planner):
        """``planner``: without chains."""
        self.planner = planner
        self.stages = planner.stages
        self.config = planner.config
        plan = planner.plan()
        self.resident = plan.resident
        self.alone = [
            work(s, p, self.resident, self.config) for s, p in zip(self.stages, plan.stages)
        ]
        self.split = [p.split is not None for p in plan.stages]
        self.found = list(self._candidates())
        """Chains, what they save, and whether with more stripes than they have to have."""

    def chains(self, finer: bool) -> list[Chain]:
        """The disjoint chains that save most; ``finer``: of all found."""
        best: list[tuple[float, list[Chain]]] = [(0.0, [])]
        for end in range(len(self.stages)):
            options = [best[end]]
            for chain, gain, more in self.found:
                if chain.last == end and more <= finer:
                    before = best[chain.first]
                    options.append((before[0] + gain, [*before[1], chain]))
            best.append(max(options, key=lambda o: o[0]))
        return best[-1][1]

    def _candidates(self) -> Iterator[tuple[Chain, float, bool]]:
        for first in range(len(self.stages)):
            made, moved = {self.stages[first].op.output}, False
            for last in range(first + 1, min(first + LONGEST, len(self.stages))):
                read = {s.tensor for s in self.stages[last].sources} & made
                if not read or self.split[first] or self.split[last]:
                    break
                moved |= not read <= self.resident
                made.add(self.stages[last].op.output)
                if not moved:
                    continue
                resident = self.resident
                chain = self.fitting(first, last, resident)
                if chain is None and self.stages[last].op.output in resident:
                    # Beside the chain there may be no room for its result.
                    resident = resident - {self.stages[last].op.output}
                    chain = self.fitting(first, last, resident)
                if chain is None:
                    break
                before = sum(max(self.alone[i].values()) for i in chain.stages)
                for finer in self._finer(chain, resident):
                    gain = before - self._cost(finer, resident)
                    if gain > GAIN * before:
                        yield finer, gain, finer != chain
                        break

    def _finer(self, chain: Chain, resident: set[str]) -> Iterator[Chain]:
        """The chain, and with more stripes: sooner filled and drained, and otherwise slower."""
        most = min(self.planner.rows(i) for i in chain.stages)
        yield chain
        for times in FINER:
            finer = replace(chain, stripes=times * chain.stripes)
            if finer.stripes <= most and self._fits(finer, resident):
                yield finer

    def _fits(self, chain: Chain, resident: set[str]) -> bool:
        return self.planner.scheduled(Schedule((chain,))).fits(chain, resident)

    def fitting(self, first: int, last: int, resident: set[str]) -> Chain | None:
        """The chain with the fewest stripes that fits beside the resident tensors."""
        most = min(self.planner.rows(i) for i in range(first, last + 1))
        numbers = STRIPES[: bisect_right(STRIPES, most)]

        # The more stripes, the less room they take.
        at = bisect_left(numbers, True, key=lambda n: self._fits(Chain(first, last, n), resident))
        return Chain(first, last, numbers[at]) if at < len(numbers) else None

    def _cost(self, chain: Chain, resident: set[str]) -> float:
        planner = self.planner.scheduled(Schedule((chain,)))
        plans, rolls = planner.stripes(chain, resident)
        total: Counter[Engine] = Counter()
        longest = 0
        for i, plan in zip(chain.stages, plans):
            own = work(planner.stages[i], plan, resident | planner.within, self.config)
            longest = max(longest, *own.values())
            total += own
        total[Engine.POST] += sum(
            (end - first) * r.width * r.blocks for r in rolls.values() for first, end in r.kept
        )
        weights = _words([self.stages[i] for i in chain.stages])
        beats = max(1, self.config.weight_vector_bytes // self.config.beat_bytes)
        if weights > self.config.weight_words:
            total[Engine.LOAD] += weights * beats * (chain.stripes - 1)
        depth = max(depths(planner.stages, chain).values())
        return max(total.values()) + longest * depth / chain.stripes


def _estimated(planner: Planner) -> list[Schedule]:
    """What the fast search finds: without finer chains, and with them. ``planner``: without any."""
    search = _FastSearch(planner)
    return [_together(planner, search.chains(finer)) for finer in (False, True)]


def _together(planner: Planner, chains: list[Chain]) -> Schedule:
    """Those of the chains that fit together."""
    schedule = Schedule(tuple(chains))
    while schedule.chains:
        try:
            planner.scheduled(schedule).plan()
        except DoesNotFitError as e:
            kept = tuple(c for c in schedule.chains if c != e.chain)
            if kept == schedule.chains:
                return PLAIN
            schedule = Schedule(kept)
        else:
            break
    return schedule


REGIONS = (64, 128, 256, 512, 1024, 2048, 1 << 20)
"""Outputs per region that are tried."""

EFFORT = 400_000
"""Commands of all programs tried, together, after which *best* stops."""

REFUSED = 100
"""What a schedule that does not fit counts as."""


class Search:
    """Schedules of one program, compared by the cycle model."""

    def __init__(
        self, compile_by: Callable[[Schedule], Program], read_latency: int, layers: list[int]
    ):
        """``layers``: by stage."""
        self.compile_by, self.read_latency, self.layers = compile_by, read_latency, layers
        self.left = 0
        self.tried: set[Schedule] = set()
        self.order: list[int] = []
        """Stages of the last program that was better, those that lose most first."""
        self.cost: tuple[float, int] = (math.inf, 0)

    def better(self, schedule: Schedule) -> bool:
        """Try a schedule; it takes fewer cycles, or moves fewer bytes in as many."""
        self.tried.add(schedule)
        try:
            program = self.compile_by(schedule)
        except ModelError:
            self.left -= REFUSED
            return False
        self.left -= len(program.command_layers)
        made = predict_layers(program, self.read_latency)
        cost = made.cycles, made.read_bytes + made.write_bytes
        if cost >= self.cost:
            return False
        size = program.config.rows * program.config.cols
        lost = [p.cycles - layer.macs / size for p, layer in zip(made.layers, program.layers)]
        self.cost = cost
        self.order = sorted(range(len(self.layers)), key=lambda i: -lost[self.layers[i]])
        return True

    def fast(self, planner: Planner) -> Schedule:
        """The estimated chains, or none if the program is faster without."""
        found = dict.fromkeys([PLAIN, *_estimated(planner)])
        if len(found) == 1:
            return PLAIN
        chosen = PLAIN
        for schedule in found:
            if self.better(schedule):
                chosen = schedule
        return chosen

    def best(self, schedule: Schedule) -> Schedule:
        """Changes to a schedule, one at a time, where most cycles are lost first, for as long as
        they help and EFFORT lasts."""
        if schedule not in self.tried:
            self.better(schedule)
        self.left = EFFORT
        improved = True
        while improved:
            improved = False
            for i in self.order:
                for change in changes(schedule, i, len(self.order)):
                    if change in self.tried:
                        continue
                    if self.left <= 0:
                        return schedule
                    if self.better(change):
                        schedule, improved = change, True
                        break
                if improved:
                    break
        return schedule


def changes(schedule: Schedule, i: int, count: int) -> Iterator[Schedule]:
    """Schedules that differ at stage ``i`` of ``count``."""
    chain = next((c for c in schedule.chains if i in c.stages), None)
    if chain is None:
        regions = dict(schedule.regions)
        for most in REGIONS:
            if regions.get(i) != most:
                yield replace(schedule, regions=tuple(sorted((regions | {i: most}).items())))
        for stripes in STRIPES[:12:3]:
            yield _with(schedule, Chain(i, min(i + 1, count - 1), stripes))
        return
    if i != chain.first:
        if i < chain.last:
            yield _with(schedule, replace(chain, last=i), replace(chain, first=i + 1))
        return
    at = bisect_left(STRIPES, chain.stripes)
    for stripes in (*STRIPES[max(at - 2, 0) : at], *STRIPES[at + 1 : at + 3]):
        yield _with(schedule, replace(chain, stripes=stripes))
    yield replace(schedule, chains=tuple(c for c in schedule.chains if c != chain))
    yield _with(schedule, replace(chain, first=i + 1))
    yield _with(schedule, replace(chain, last=chain.last - 1))
    if i > 0:
        yield _with(schedule, replace(chain, first=i - 1))
    if chain.last + 1 < count:
        yield _with(schedule, replace(chain, last=chain.last + 1))


def _with(schedule: Schedule, *chains: Chain) -> Schedule:
    """The schedule with new chains in the place of those that they touch."""
    new = [c for c in chains if c.fused]
    stages = {i for c in chains for i in c.stages}
    kept = [c for c in schedule.chains if not stages & set(c.stages)]
    return replace(schedule, chains=tuple(sorted([*kept, *new], key=lambda c: c.first)))
