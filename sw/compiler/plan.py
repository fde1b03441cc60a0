"""Planning: which activations stay in the scratchpad, how stages are cut into regions, and
addresses.

A tensor is *resident* (whole in the scratchpad from its making to its last use) when that leaves
every stage in its life a decent region to work on; otherwise it lives in DRAM and stages load and
store it region by region. Addresses, in the scratchpad and in DRAM, are packed by size over
lifetimes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from systole.isa import Config
from systole.sw.compiler.stages import ArrayStage, Geometry, Product, Source, Stage
from systole.sw.compiler.stripes import Chain, Roll, Schedule, in_rows, order, roll, row_ends
from systole.sw.ir.graph import Graph, ModelError

DECENT_REGION = 256
"""Outputs per channel that a region should hold: enough to hide weight loads and halos."""

TILE = 256
"""Outputs of one CONV command: long enough to hide the next tile's weights, short enough that the
last POST of a layer is soon over."""

EARLY_REGION = {"array": 128, "vector": 128, "window": 256}
"""Outputs per region, by kind of stage, where regions cost no transfers: small ones let the next
stage begin early; a window stage reads the rows between two regions twice."""

FOLD_REGION = 128
"""Outputs per region of a folded stage: small, so that im2col overlaps with the array."""


PLAIN = Schedule()


@dataclass(frozen=True)
class Region:
    """A rectangle of output pixels of one image of the batch."""

    n: int
    y: int
    x: int
    h: int
    w: int

    @property
    def pixels(self) -> int:
        return self.h * self.w


@dataclass(frozen=True)
class Buffer:
    """Scratchpad words in use during stages ``first``..``last``."""

    key: tuple
    words: int
    first: int
    last: int


@dataclass
class StagePlan:
    """How one stage is carried out."""

    regions: list[Region]
    buffers: dict[str | int, tuple[int, int]]
    """Per role (source index, ``out``, ``im2col``): words of one copy, number of copies."""
    split: tuple[int, int] | None = None
    """The reduction does not fit: channel blocks and kernel rows whose input is loaded at a time,
    anew for every column block; regions are single tiles."""


@dataclass
class Plan:
    """The whole plan; addresses of scratchpad buffers by key."""

    resident: set[str]
    stages: list[StagePlan]
    order: list[tuple[int, int]]
    """Stage and region, as they are carried out."""
    chain: list[Chain]
    """By stage."""
    rolls: dict[str, Roll]
    """Tensors that pass through the scratchpad row by row."""
    addresses: dict[tuple, int] = field(default_factory=dict)


def input_extent(source: Source, region: Region) -> tuple[int, int, int, int]:
    """The part (y, x, h, w) of ``source`` that a region needs; packed rows are taken whole."""
    if source.broadcast:
        return 0, 0, 1, 1
    y0, y1 = source.span(0, region.y, region.h)
    x0, x1 = (0, source.w) if source.packed else source.span(1, region.x, region.w)
    return y0, x0, y1 - y0, x1 - x0


def output_extent(stage: Stage, region: Region) -> tuple[int, int, int, int]:
    """The rectangle (y, x, h, w) of the output that a region makes, all phases together."""
    (fh, fw), y, x = stage.steps, region.y * stage.steps[0], region.x * stage.steps[1]
    return y, x, min(region.h * fh, stage.out_h - y), min(region.w * fw, stage.out_w - x)


def part_of(source: Source, g: Geometry, ky: int, rows: int) -> Source:
    """The source as read by one pass, ``rows`` kernel rows from row ``ky`` alone."""
    rows = min(rows, g.kernel[0] - ky)
    pads = (g.pads[0] - ky * g.dilations[0], g.pads[1])
    part = dataclasses.replace(g, kernel=(rows, g.kernel[1]), pads=pads)
    return dataclasses.replace(source, geometries=(part,))


def pack(buffers: list[Buffer]) -> tuple[dict[tuple, int], int]:
    """Addresses by key such that buffers alive together do not overlap, and the words needed."""
    placed: list[tuple[Buffer, int]] = []
    addresses: dict[tuple, int] = {}
    top = 0
    for b in sorted(buffers, key=lambda b: (-b.words, b.first)):
        taken = sorted(
            (at, at + p.words) for p, at in placed if p.first <= b.last and b.first <= p.last
        )
        at = 0
        for start, end in taken:
            if start - at >= b.words:
                break
            at = max(at, end)
        placed.append((b, at))
        addresses[b.key] = at
        top = max(top, at + b.words)
    return addresses, top


def _in(i: int, life: tuple[int, int]) -> bool:
    return life[0] <= i <= life[1]


def cuts(size: int, step: int) -> list[tuple[int, int]]:
    """``size`` in equal pieces of at most ``step``: (start, length)."""
    pieces = -(-size // step)
    edges = [size * i // pieces for i in range(pieces + 1)]
    return [(a, b - a) for a, b in zip(edges, edges[1:])]


def tiles(region: Region, config: Config) -> Iterator[Region]:
    """The region in pieces of about TILE outputs that an accumulator half holds."""
    limit = min(TILE, config.acc_half)
    if region.w > limit:
        rows, columns = 1, limit
    else:
        rows, columns = max(1, limit // region.w), region.w
    for y, h in cuts(region.h, rows):
        for x, w in cuts(region.w, columns):
            yield Region(region.n, region.y + y, region.x + x, h, w)


def grid(stage: Stage, h: int, w: int) -> list[Region]:
    """The stage's output in regions of at most ``h`` x ``w``."""
    return [
        Region(n, y, x, rh, rw)
        for n in range(stage.batch)
        for y, rh in cuts(stage.h, h)
        for x, rw in cuts(stage.w, w)
    ]


def _shapes(stage: Stage, most: int) -> Iterator[tuple[int, int]]:
    """Region shapes of at most about ``most`` outputs, largest first: whole rows, then parts of a
    row."""
    pieces = -(-stage.h // max(1, min(stage.h, most // stage.w)))
    last = 0
    while pieces <= stage.h and (stage.h > 1 or stage.w <= most):
        rows = -(-stage.h // pieces)
        if rows != last:
            yield rows, stage.w
            last = rows
        pieces += max(1, pieces // 4)
    if last > 1:
        yield 1, stage.w
    pieces = max(2, -(-stage.w // most))
    while pieces < 2 * stage.w:
        yield 1, -(-stage.w // pieces)
        pieces += max(1, pieces // 4)


def _total(plans: list[StagePlan], rolls: dict[str, Roll]) -> int:
    """Words of all buffers of a chain."""
    buffers = sum(words * copies for p in plans for words, copies in p.buffers.values())
    return buffers + sum(r.words for r in rolls.values())


def _product_of(stage: Stage) -> Product | None:
    """The product of activations that a stage computes, if it does."""
    return stage.product if isinstance(stage, ArrayStage) else None


class DoesNotFitError(ModelError):
    """A chain that does not fit in the scratchpad, or cannot be carried out in stripes."""

    def __init__(self, chain: Chain, sentence: str):
        super().__init__(sentence)
        self.chain = chain


class Planner:
    """Plans the stages of a graph."""

    def __init__(
        self,
        graph: Graph,
        stages: list[Stage],
        config: Config,
        stored: set[str],
        schedule: Schedule = PLAIN,
    ):
        """``stored``: tensors that must be in DRAM at the end (they may be resident as well)."""
        self.graph = graph
        self._alone = stages
        self.stages = list(stages)
        self.config = config
        weights = {t for s in stages for p in [_product_of(s)] if p for t in p.tensors}
        self.stored = stored | weights
        self.chain = [Chain(i, i) for i in range(len(stages))]
        self.regions = dict(schedule.regions)
        for chain in schedule.chains:
            for i in chain.stages:
                if not stages[i].striped:
                    raise DoesNotFitError(chain, f"node {stages[i].op.name}: not in stripes")
                if stages[i].batch != stages[chain.first].batch:
                    raise DoesNotFitError(
                        chain,
                        f"nodes {stages[chain.first].op.name}, {stages[i].op.name}: not in stripes "
                        f"together, of {stages[chain.first].batch} and {stages[i].batch} images",
                    )
                self.chain[i] = chain
                self.stages[i] = in_rows(stages[i], graph)
        self.life: dict[str, tuple[int, int]] = {}
        self.words: dict[str, int] = {}
        readers: dict[str, set[Chain]] = {}
        for stage, chain in zip(self.stages, self.chain):
            out = stage.op.output
            self.life[out] = (chain.first, chain.last)
            self.words[out] = stage.out_words
            for s in stage.sources:
                first = self.life.get(s.tensor, (chain.first, 0))[0]
                self.life[s.tensor] = (first, chain.last)
                self.words.setdefault(s.tensor, s.tensor_words(stage.batch))
                readers.setdefault(s.tensor, set()).add(chain)
        self.streamed = self._streamed(set(readers))
        self.within = {
            stage.op.output
            for stage, chain in zip(self.stages, self.chain)
            if chain.fused and readers.get(stage.op.output) == {chain}
        }
        """Tensors that pass from stage to stage of one chain and are read nowhere else."""

    def scheduled(self, schedule: Schedule) -> Planner:
        """The same with another schedule."""
        return Planner(self.graph, self._alone, self.config, self.stored, schedule)

    def rows(self, i: int) -> int:
        """Rows of a stage's output in one phase, that may become stripes."""
        stage = self._alone[i]
        if not stage.striped:
            return 1
        return in_rows(stage, self.graph).h

    def _streamed(self, read: set[str]) -> set[str]:
        """Tensors that only go from DRAM to the weight buffer: never resident."""
        streamed = set()
        for stage, chain in zip(self.stages, self.chain):
            product = _product_of(stage)
            for name in product.tensors if product else ():
                self.life.setdefault(name, (chain.first, chain.last))
                self.words.setdefault(name, product.spread.words)
                streamed.add(name)
        return streamed - read

    def plan(self) -> Plan:
        """Raises :class:`ModelError` naming a stage that does not fit in the scratchpad at all."""
        capacity = self.config.scratchpad_words
        resident = {t for t, words in self.words.items() if words <= capacity}
        resident -= self.within | self.streamed
        while True:
            plan, culprit = self._try(resident)
            if plan is not None:
                return plan
            resident = resident - {culprit}

    def _try(self, resident: set[str]) -> tuple[Plan | None, str | None]:
        """A plan, or the resident tensor to give up."""
        capacity = self.config.scratchpad_words
        buffers = [Buffer(("tensor", t), self.words[t], *self.life[t]) for t in sorted(resident)]
        for i, stage in enumerate(self.stages):
            if stage.fixed_words:
                # Loaded while the stage before works.
                first, last = self.chain[i].first, self.chain[i].last
                buffers.append(Buffer(("fixed", i), stage.fixed_words, max(first - 1, 0), last))
        plans: list[StagePlan] = []
        rolls: dict[str, Roll] = {}
        while len(plans) < len(self.stages):
            chain = self.chain[len(plans)]
            used = max(
                sum(b.words for b in buffers if b.first <= i <= b.last) for i in chain.stages
            )
            alive = [t for t in resident if any(_in(i, self.life[t]) for i in chain.stages)]
            chosen = None
            for decent in (True, False):
                chosen = self._choose(chain, resident, capacity - used, decent)
                if chosen is not None:
                    break
                if alive:
                    return None, max(alive, key=self._cost)
            if chosen is None:
                raise DoesNotFitError(chain, self._refusal(chain.first))
            plans += chosen[0]
            rolls |= chosen[1]
            buffers += [Buffer(("tensor", t), r.words, *self.life[t]) for t, r in chosen[1].items()]
        for i, p in enumerate(plans):
            chain = self.chain[i]
            for role, (words, copies) in p.buffers.items():
                buffers += [
                    Buffer((role, i, c), words, chain.first, chain.last) for c in range(copies)
                ]
        # A buffer that is reused at once makes its new user wait for the old one: leave a pause of
        # some stages where there is room.
        for pause in (3, 2, 1, 0):
            spaced = [dataclasses.replace(b, last=b.last + pause) for b in buffers]
            addresses, top = pack(spaced)
            if top <= capacity:
                break
        else:
            # Fragmentation: give up the costliest tensor of the fullest moment.
            load = [
                sum(b.words for b in buffers if b.first <= i <= b.last)
                for i in range(len(self.stages))
            ]
            i = max(range(len(load)), key=load.__getitem__)
            alive = [t for t in resident if self.life[t][0] <= i <= self.life[t][1]]
            if not alive and not resident:
                raise DoesNotFitError(self.chain[i], self._refusal(i))
            return None, max(alive or sorted(resident), key=self._cost)
        return Plan(resident, plans, self._order(plans), self.chain, rolls, addresses), None

    def _refusal(self, i: int) -> str:
        return (
            f"node {self.stages[i].op.name}: its smallest piece does not fit in the scratchpad of "
            f"{self.config.scratchpad_words} words of {self.config.rows} bytes"
        )

    def _order(self, plans: list[StagePlan]) -> list[tuple[int, int]]:
        out = []
        for chain in dict.fromkeys(self.chain):
            if chain.fused:
                steps = order(self.stages, chain)
                for n in range(self.stages[chain.first].batch):
                    out += [(i, n * chain.stripes + s) for i, s in steps]
            else:
                out += [(chain.first, r) for r in range(len(plans[chain.first].regions))]
        return out

    def _cost(self, tensor: str) -> tuple[int, str]:
        """How much scratchpad, over time, keeping the tensor takes."""
        first, last = self.life[tensor]
        return self.words[tensor] * (last - first + 1), tensor

    def _choose(
        self, chain: Chain, resident: set[str], budget: int, decent: bool
    ) -> tuple[list[StagePlan], dict[str, Roll]] | None:
        """Plans of a chain's stages whose buffers fit in ``budget`` words."""
        if chain.fused:
            made = self.stripes(chain, resident)
            return made if made and _total(*made) <= budget else None
        plan = self._choose_regions(chain.first, resident, budget, decent)
        return plan and ([plan], {})

    def stripes(
        self, chain: Chain, resident: set[str]
    ) -> tuple[list[StagePlan], dict[str, Roll]] | None:
        """Plans of a fused chain's stages; None: a stripe would be empty."""
        ends = row_ends(self.stages, chain)
        if any(a == b for rows in ends.values() for a, b in zip([0, *rows], rows)):
            return None
        plans, rolls = [], {}
        for i in chain.stages:
            stage = self.stages[i]
            regions = [
                Region(n, a, 0, b - a, stage.w)
                for n in range(stage.batch)
                for a, b in zip([0, *ends[i]], ends[i])
            ]
            plans.append(StagePlan(regions, self._buffers(stage, resident, regions, 2)))
            if stage.op.output in self.within:
                rolls[stage.op.output] = roll(self.stages, chain, i, ends)
        return plans, rolls

    def fits(self, chain: Chain, resident: set[str]) -> bool:
        """A fused chain fits beside the resident tensors."""
        made = self.stripes(chain, resident)
        if made is None:
            return False
        used = sum(self.stages[i].fixed_words for i in chain.stages)
        used += sum(
            self.words[t]
            for t in resident
            if self.life[t][0] <= chain.last and chain.first <= self.life[t][1]
        )
        return used + _total(*made) <= self.config.scratchpad_words

    def _choose_regions(
        self, i: int, resident: set[str], budget: int, decent: bool
    ) -> StagePlan | None:
        """The largest regions whose buffers fit in ``budget`` words: doubled, so that loads and
        stores overlap; else single; else with the reduction split."""
        stage = self.stages[i]
        most = min(self.regions.get(i) or self._most(stage, resident), stage.h * stage.w)
        enough = min(stage.h * stage.w, DECENT_REGION, most) // 2

        def fits(plan: StagePlan) -> bool:
            return sum(words * copies for words, copies in plan.buffers.values()) <= budget

        for copies in (2,) if decent else (2, 1):
            for h, w in _shapes(stage, most):
                if decent and h * w < enough:
                    return None
                regions = grid(stage, h, w)
                plan = StagePlan(regions, self._buffers(stage, resident, regions, copies))
                if fits(plan):
                    return plan
        if isinstance(stage, ArrayStage) and stage.fold is None and stage.product is None:
            return next(filter(fits, self._splits(stage, resident)), None)
        return None

    def _most(self, stage: Stage, resident: set[str]) -> int:
        """Outputs per region beyond which nothing is gained."""
        if isinstance(stage, ArrayStage) and stage.fold is not None:
            return FOLD_REGION
        names = {stage.op.output, *(s.tensor for s in stage.sources)}
        early = stage.kind in EARLY_REGION and names <= resident
        if early and stage.weight_words <= self.config.weight_words // 2:
            return EARLY_REGION[stage.kind]
        return stage.h * stage.w

    def _splits(self, stage: ArrayStage, resident: set[str]) -> Iterator[StagePlan]:
        """Plans with the reduction split, largest regions and pieces first."""
        passes = {(p.source, p.geometry) for phase in stage.phases for p in phase.passes}
        blocks = max(stage.sources[k].blocks for k, _ in passes)
        kernel = max(g.kernel[0] for _, g in passes)
        limit = min(TILE, self.config.acc_half)
        pieces = [(blocks >> i, kernel) for i in range(blocks.bit_length())]
        pieces += [(1, n) for n in range(kernel - 1, 0, -1)]
        for h, w in _shapes(stage, limit):
            regions = grid(stage, h, w)
            buffers = self._buffers(stage, resident, regions, 2)
            for most, rows in pieces:
                parts: dict[str | int, tuple[int, int]] = {}
                for k, g in passes:
                    source = stage.sources[k]
                    area = max(
                        math.prod(input_extent(part_of(source, g, ky, rows), r)[2:])
                        for r in regions
                        for ky in range(0, g.kernel[0], rows)
                    )
                    words = min(most, source.blocks) * area
                    if source.tensor not in resident:
                        parts[k] = (max(words, parts.get(k, (0, 2))[0]), 2)
                yield StagePlan(regions, buffers | parts, (most, rows))

    def _buffers(
        self, stage: Stage, resident: set[str], regions: list[Region], copies: int
    ) -> dict[str | int, tuple[int, int]]:
        pixels = max(r.pixels for r in regions)
        twice = copies if len(regions) > 1 else 1
        slots = copies if len(regions) * stage.groups > 1 else 1
        out: dict[str | int, tuple[int, int]] = {}
        for k, source in enumerate(stage.sources):
            if source.tensor in resident or source.tensor in self.within:
                continue
            area = max(math.prod(input_extent(source, r)[2:]) for r in regions)
            if stage.kind == "transpose":
                # Of every channel block that a region meets, a group's positions.
                rows = self.config.rows
                most = max((r.x + r.w - 1) // rows - r.x // rows + 1 for r in regions)
                out[k] = (most * rows * stage.group_words, slots)
            elif source.per_group:
                out[k] = (area * stage.group_words, slots)
            else:
                out[k] = (area * source.blocks, twice)
        if isinstance(stage, ArrayStage) and stage.fold is not None:
            if stage.fold.by_row:
                # The whole image, so that gathering never waits; or the rows of some regions,
                # gathered for one while others are still being read.
                source, width = stage.sources[0], stage.w * stage.fold.words
                rows = source.h
                if rows * width > self.config.scratchpad_words // 3:
                    most = max(input_extent(source, r)[2] for r in regions)
                    rows = min(rows, 2 * copies * most)
                out["im2col"] = (rows * width, 1)
            else:
                out["im2col"] = (pixels * stage.fold.words, twice)
        if stage.op.output not in resident and stage.op.output not in self.within:
            area = max(math.prod(output_extent(stage, r)[2:]) for r in regions)
            out["out"] = (area * stage.group_words, slots)
        return out
