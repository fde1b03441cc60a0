"""The search for a schedule: which stages are fused into chains, in how many stripes, and how large
the regions of the others are.

*fast* goes by estimates (:mod:`~sw.compiler.costs`). A stage takes as long as its busiest engine. A
chain takes as long as the engine that is busiest over all its stages, and tensors within the chain
cost no transfers. The cycle model then decides whether the whole program gains.

*best* goes on from there. It tries changes to the schedule one at a time on the whole program, and
keeps those that take fewer cycles by the cycle model (at equal cycles: that move fewer bytes)."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from systole.isa import Engine
from systole.sw.compiler.costs import work
from systole.sw.compiler.plan import PLAIN, DoesNotFitError, Planner
from systole.sw.compiler.stages import RowStage, Stage
from systole.sw.compiler.stripes import Chain, Schedule, depths
from systole.sw.compiler.weave import groups_of
from systole.sw.ir.graph import ModelError
from systole.sw.progress import Share, unseen
from systole.sw.runtime.program import Program
from systole.sw.simulate.cycles import predict_layers

LONGEST = 8
"""Most stages of a chain that are tried."""

STRIPES = (8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 104, 112, 128, 208)
"""Numbers of stripes that are tried: large enough for filling and draining a chain to cost little,
and in steps of a fifth or so."""

FINER = (2, 4)
"""Multiples of the fewest stripes that fit that are tried as well."""

MIN_GAIN = 0.01
"""Fraction of its cycles a chain must save, by the estimate, to be fused."""


@dataclass(frozen=True)
class _Candidate:
    """A chain that saves cycles by the estimate."""

    chain: Chain
    gain: float
    """Estimated cycles saved."""
    finer: bool
    """It has more stripes than are needed for it to fit."""


@dataclass(frozen=True)
class _Fitting:
    """A chain that fits in the scratchpad."""

    chain: Chain
    planner: Planner
    """The planner of a schedule whose only chain these stages are; it plans it in any number of
    stripes."""
    resident: set[str]
    """The tensors resident beside the chain."""


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
            max(work(stage, stage_plan, self.resident, self.config).values())
            for stage, stage_plan in zip(self.stages, plan.stages, strict=True)
        ]
        """By stage, its estimated cycles outside chains."""
        self.split = [p.split is not None for p in plan.stages]
        self.candidates = [
            candidate
            for fitting in self._chains()
            if (candidate := self._candidate(fitting)) is not None
        ]

    def chains(self, *, finer: bool) -> list[Chain]:
        """The disjoint chains that save most together. Without ``finer``: none with more stripes
        than it needs to fit."""
        # By number of stages from the first: what their best chains save, and these chains.
        best: list[tuple[float, list[Chain]]] = [(0.0, [])]
        for end in range(len(self.stages)):
            options = [best[end]]
            for candidate in self.candidates:
                if candidate.chain.last == end and candidate.finer <= finer:
                    gain, chains = best[candidate.chain.first]
                    options.append((gain + candidate.gain, [*chains, candidate.chain]))
            best.append(max(options, key=lambda option: option[0]))
        return best[-1][1]

    def _chains(self) -> Iterator[_Fitting]:
        """The chains that fit and save transfers."""
        for first in range(len(self.stages)):
            outputs, moved = {self.stages[first].op.output}, False
            for last in range(first + 1, min(first + LONGEST, len(self.stages))):
                read = {s.tensor for s in self.stages[last].sources} & outputs
                if not read or self.split[first] or self.split[last]:
                    break
                moved |= not read <= self.resident
                output = self.stages[last].op.output
                outputs.add(output)
                if not moved:
                    continue
                fitting = self._fitting(first, last, output)
                if fitting is None:
                    break
                yield fitting

    def _fitting(self, first: int, last: int, output: str) -> _Fitting | None:
        """The chain with the fewest stripes that fits beside the resident tensors; if none does,
        beside them without its ``output``."""
        most = min(self.planner.rows(i) for i in range(first, last + 1))
        numbers = STRIPES[: bisect_right(STRIPES, most)]
        if not numbers:
            return None
        planner = self.planner.scheduled(Schedule((Chain(first, last),)))
        beside = [self.resident]
        if output in self.resident:
            beside.append(self.resident - {output})
        for resident in beside:
            # The more stripes, the less room they take.
            at = bisect_left(
                numbers, True, key=lambda n: planner.fits(Chain(first, last, n), resident)
            )
            if at < len(numbers):
                return _Fitting(Chain(first, last, numbers[at]), planner, resident)
        return None

    def _candidate(self, fitting: _Fitting) -> _Candidate | None:
        """The chain, or else the same with as few more stripes as make it gain."""
        chain = fitting.chain
        cycles = sum(self.alone[i] for i in chain.stages)
        for finer in self._finer(fitting):
            gain = cycles - self._cycles(finer, fitting)
            if gain > MIN_GAIN * cycles:
                return _Candidate(finer, gain, finer != chain)
        return None

    def _finer(self, fitting: _Fitting) -> Iterator[Chain]:
        """The chain, and with more stripes: sooner filled and drained, and otherwise slower."""
        chain = fitting.chain
        most = min(self.planner.rows(i) for i in chain.stages)
        yield chain
        for times in FINER:
            finer = replace(chain, stripes=times * chain.stripes)
            if finer.stripes <= most and fitting.planner.fits(finer, fitting.resident):
                yield finer

    def _cycles(self, chain: Chain, fitting: _Fitting) -> float:
        """Estimated cycles of a chain, in as many stripes, that fits."""
        planner, resident = fitting.planner, fitting.resident
        striped = planner.stripes(chain, resident)
        assert striped is not None
        plans, rolls = striped
        total: Counter[Engine] = Counter()
        longest = 0
        for i, plan in zip(chain.stages, plans, strict=True):
            own = work(planner.stages[i], plan, resident | planner.within, self.config)
            longest = max(longest, *own.values())
            total += own
        # POST copies rows that stay when a buffer starts anew.
        total[Engine.POST] += sum(
            (end - first) * r.width * r.blocks for r in rolls.values() for first, end in r.kept
        )
        weights = sum(_constant_weights(self.stages[i]) for i in chain.stages)
        if weights > self.config.weight_words:
            # Every stripe loads them anew.
            beats = max(1, self.config.weight_vector_bytes // self.config.beat_bytes)
            total[Engine.LOAD] += weights * beats * (chain.stripes - 1)
        # While the chain fills and drains, one stripe of one stage is at work.
        depth = max(depths(planner.stages, chain).values())
        return max(total.values()) + longest * depth / chain.stripes


def _constant_weights(stage: Stage) -> int:
    """Weight words of a stage that are constants of the program."""
    return len(stage.weights) if stage.kind == "array" and stage.weights is not None else 0


def _estimated(planner: Planner) -> list[Schedule]:
    """The fast search's schedules: without finer chains, and with them. ``planner``: without
    chains."""
    search = _FastSearch(planner)
    return [_together(planner, search.chains(finer=finer)) for finer in (False, True)]


def _together(
    planner: Planner, chains: list[Chain], regions: tuple[tuple[int, int], ...] = ()
) -> Schedule:
    """The schedule of those of the chains that fit together."""
    schedule = Schedule(tuple(sorted(chains, key=lambda c: c.first)), regions)
    while schedule.chains:
        try:
            planner.scheduled(schedule).plan()
        except DoesNotFitError as e:
            kept = tuple(c for c in schedule.chains if c != e.chain)
            if kept == schedule.chains:
                return PLAIN
            schedule = Schedule(kept, regions)
        else:
            break
    return schedule


REGIONS = (64, 128, 256, 512, 1024, 2048, 1 << 20)
"""Numbers of outputs per region that *best* tries."""

EFFORT = 400_000
"""Commands of all the programs that *best* tries, together, after which it stops."""

REFUSED = 100
"""Commands that a schedule counts as if it does not fit: what finding that out costs, about."""


ROW_REGION = 128
"""Outputs of a region beside a row operation: its rows must be whole, so that in larger ones the
array waits for all of them."""


def _beside_rows(stages: list[Stage]) -> list[int]:
    """Stages that make what a row operation reads, or read what it makes, and these themselves."""
    rows = [stage for stage in stages if isinstance(stage, RowStage)]
    made = {stage.op.output for stage in rows}
    read = {source.tensor for stage in rows for source in stage.sources}
    return [
        i
        for i, stage in enumerate(stages)
        if stage.kind != "transpose"
        and (stage.op.output in made | read or any(s.tensor in made for s in stage.sources))
    ]


class Search:
    """Schedules of one program, compared by the cycle model."""

    def __init__(
        self, compile_by: Callable[[Schedule], Program], read_latency: int, layers: list[int]
    ):
        """``layers``: by stage, the number of its layer."""
        self.compile_by, self.read_latency, self.layers = compile_by, read_latency, layers
        self.left = 0
        """What is left of ``EFFORT``."""
        self.tried: set[Schedule] = set()
        self.order: list[int] = []
        """Stages of the last program that was better; those whose layers lose most cycles come
        first."""
        self.cycles: dict[Schedule, list[int]] = {}
        """By schedule tried, and layer."""
        self.cost: tuple[float, int] = (math.inf, 0)
        """Cycles, and bytes moved, of the best program so far."""

    def better(self, schedule: Schedule) -> bool:
        """Try a schedule. Whether it takes fewer cycles than all before, or as many and moves fewer
        bytes."""
        self.tried.add(schedule)
        try:
            program = self.compile_by(schedule)
        except ModelError:
            self.left -= REFUSED
            return False
        self.left -= len(program.command_layers)
        prediction = predict_layers(program, self.read_latency)
        self.cycles[schedule] = [layer.cycles for layer in prediction.layers]
        cost = prediction.cycles, prediction.read_bytes + prediction.write_bytes
        if cost >= self.cost:
            return False
        size = program.config.rows * program.config.cols
        lost = [
            predicted.cycles - layer.macs / size
            for predicted, layer in zip(prediction.layers, program.layers, strict=True)
        ]
        self.cost = cost
        self.order = sorted(range(len(self.layers)), key=lambda i: -lost[self.layers[i]])
        return True

    def fast(self, planner: Planner, share: Share = unseen) -> Schedule:
        """The best of the estimated schedules, or none of them if the program is faster without
        chains; then with the stages beside row operations taking turns, or in smaller regions, if
        that is better."""
        schedules = dict.fromkeys([PLAIN, *_estimated(planner)])
        beside = _beside_rows(planner.stages)
        count = len(schedules) + 3 * bool(beside)
        if count == 1:
            return PLAIN
        chosen = PLAIN
        for number, schedule in enumerate(schedules):
            share(number / count)
            if self.better(schedule):
                chosen = schedule
        chained = {i for chain in chosen.chains for i in chain.stages}
        regions = tuple((i, ROW_REGION) for i in beside if i not in chained)
        if not regions:
            return chosen
        beside_rows = replace(chosen, regions=regions)
        apart = beside_rows if self.better(beside_rows) else chosen
        share((count - 1) / count)
        groups = groups_of(planner.stages, chained)
        woven = self._woven(planner, chosen, regions, groups)
        best = woven if self.better(woven) else apart
        if not {woven, apart} <= self.cycles.keys():
            return best
        # What it was for single groups, about: the best of each together.
        gained = [g for g in groups if self._took(g, woven) < self._took(g, apart)]
        if len(gained) < len(groups):
            some = self._woven(planner, chosen, regions, gained)
            best = some if self.better(some) else best
        return best

    def _took(self, chain: Chain, schedule: Schedule) -> int:
        """The cycles of a chain's layers by a schedule that was tried."""
        return sum(self.cycles[schedule][k] for k in {self.layers[i] for i in chain.stages})

    @staticmethod
    def _woven(
        planner: Planner,
        schedule: Schedule,
        regions: tuple[tuple[int, int], ...],
        groups: list[Chain],
    ) -> Schedule:
        """``schedule`` with groups that take turns, and ``regions`` of stages in none."""
        among = {i for chain in groups for i in chain.stages}
        others = tuple((i, most) for i, most in regions if i not in among)
        return _together(planner, [*schedule.chains, *groups], others)

    def best(self, schedule: Schedule, share: Share = unseen) -> Schedule:
        """Change a schedule, one step at a time, first where most cycles are lost, for as long as
        that helps and ``EFFORT`` lasts."""
        if schedule not in self.tried:
            self.better(schedule)
        self.left = EFFORT
        while (changed := self._step(schedule, share)) is not None:
            schedule = changed
        return schedule

    def _step(self, schedule: Schedule, share: Share) -> Schedule | None:
        """The first change that is better; None: there is none, or ``EFFORT`` is used up."""
        for i in self.order:
            for change in changes(schedule, i, len(self.order)):
                if change in self.tried:
                    continue
                if self.left <= 0:
                    return None
                share(1 - self.left / EFFORT)
                if self.better(change):
                    return change
        return None


def changes(schedule: Schedule, i: int, count: int) -> Iterator[Schedule]:
    """Schedules that differ from ``schedule`` at stage ``i`` of ``count``."""
    chain = next((c for c in schedule.chains if i in c.stages), None)
    if chain is None:
        yield from _changes_alone(schedule, i, count)
    elif i == chain.first:
        yield from _changes_of_chain(schedule, chain, count)
    elif i < chain.last:
        yield _with(schedule, replace(chain, last=i), replace(chain, first=i + 1))


def _changes_alone(schedule: Schedule, i: int, count: int) -> Iterator[Schedule]:
    """Other regions for a stage outside chains, and chains of it and the next stage."""
    regions = dict(schedule.regions)
    for most in REGIONS:
        if regions.get(i) != most:
            yield replace(schedule, regions=tuple(sorted((regions | {i: most}).items())))
    for stripes in STRIPES[:12:3]:
        yield _with(schedule, Chain(i, min(i + 1, count - 1), stripes))


def _changes_of_chain(schedule: Schedule, chain: Chain, count: int) -> Iterator[Schedule]:
    """The chain with other stripes, dissolved, shorter and longer."""
    if chain.woven:
        yield replace(schedule, chains=tuple(c for c in schedule.chains if c != chain))
        return
    at = bisect_left(STRIPES, chain.stripes)
    for stripes in (*STRIPES[max(at - 2, 0) : at], *STRIPES[at + 1 : at + 3]):
        yield _with(schedule, replace(chain, stripes=stripes))
    yield replace(schedule, chains=tuple(c for c in schedule.chains if c != chain))
    yield _with(schedule, replace(chain, first=chain.first + 1))
    yield _with(schedule, replace(chain, last=chain.last - 1))
    if chain.first > 0:
        yield _with(schedule, replace(chain, first=chain.first - 1))
    if chain.last + 1 < count:
        yield _with(schedule, replace(chain, last=chain.last + 1))


def _with(schedule: Schedule, *chains: Chain) -> Schedule:
    """The schedule with ``chains`` in place of those that share stages with them."""
    new = [c for c in chains if c.fused]
    stages = {i for c in chains for i in c.stages}
    kept = [c for c in schedule.chains if not stages & set(c.stages)]
    return replace(schedule, chains=tuple(sorted([*kept, *new], key=lambda c: c.first)))
