"""Planning: which activations stay in the scratchpad, how stages are cut into regions, and
addresses.

A tensor is *resident* (whole in the scratchpad from its making to its last use) when that leaves
every stage in its life a decent region to work on; otherwise it lives in DRAM and stages load and
store it region by region. Addresses, in the scratchpad and in DRAM, are packed by size over
lifetimes."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from systole.isa import Config
from systole.sw.compiler.packing import Buffer, pack, words_in_use
from systole.sw.compiler.regions import Region
from systole.sw.compiler.stageplan import Role, StageChoices, StagePlan, StagePlanner
from systole.sw.compiler.stages import ArrayStage, Product, Stage
from systole.sw.compiler.stripes import Chain, Roll, Schedule, in_rows, order, roll, row_ends
from systole.sw.compiler.weave import LEAST, woven
from systole.sw.ir.graph import Graph, ModelError

PLAIN = Schedule()

MAX_PAUSE = 3
"""Stages for which a buffer is left alone before it is reused, where there is room. One that is
reused at once makes its new user wait for the old one."""


class TensorKey(NamedTuple):
    """Key of the buffer of a tensor: whole, or the rows of it that pass through."""

    tensor: str


class FixedKey(NamedTuple):
    """Key of the buffer of what a stage needs besides activations."""

    stage: int


class CopyKey(NamedTuple):
    """Key of one copy of a stage's buffer."""

    role: Role
    stage: int
    copy: int


BufferKey = TensorKey | FixedKey | CopyKey

ChoicesKey = tuple[Stage, frozenset[str], int | None, bool]
"""What the plans of a stage in no chain depend on: the stage, its tensors on chip, the limit to its
regions, and whether they must be decent."""


class ChainPlan(NamedTuple):
    """How the stages of one chain are carried out."""

    stages: list[StagePlan]
    rolls: dict[str, Roll]
    """Tensors that pass through the scratchpad row by row."""

    @property
    def words(self) -> int:
        """Scratchpad words of all buffers."""
        return sum(p.words for p in self.stages) + sum(r.words for r in self.rolls.values())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The whole plan, with addresses of scratchpad buffers by key."""

    resident: set[str]
    stages: list[StagePlan]
    order: list[tuple[int, int]]
    """Stage and region, as they are carried out."""
    chain: list[Chain]
    """By stage."""
    rolls: dict[str, Roll]
    """Tensors that pass through the scratchpad row by row."""
    addresses: dict[BufferKey, int]


class DoesNotFitError(ModelError):
    """A chain that does not fit in the scratchpad, or cannot be carried out in stripes."""

    def __init__(self, chain: Chain, sentence: str):
        super().__init__(sentence)
        self.chain = chain


class _NoRoomError(Exception):
    """A stage finds no decent room beside the resident tensors."""

    def __init__(self, tensor: str):
        super().__init__(tensor)
        self.tensor = tensor
        """The resident tensor to give up."""


class Planner:
    """Plans the stages of a graph."""

    def __init__(
        self,
        graph: Graph,
        stages: list[Stage],
        config: Config,
        stored: set[str],
        schedule: Schedule = PLAIN,
        choices: dict[ChoicesKey, StageChoices] | None = None,
    ):
        """``stored``: tensors that must be in DRAM at the end (they may be resident as well).
        ``choices``: plans of single stages that are known.

        Raises :class:`DoesNotFitError` for a chain of stages that cannot be striped together."""
        self.graph = graph
        self._alone = stages
        self.stages = list(stages)
        self.config = config
        weights = {t for s in stages for p in [_product_of(s)] if p for t in p.tensors}
        self.stored = stored | weights
        self.chain = [Chain(i, i) for i in range(len(stages))]
        self.regions = dict(schedule.regions)
        self._choices = {} if choices is None else choices
        for chain in schedule.chains:
            if chain.woven:
                self.chain[chain.first : chain.last + 1] = [chain] * len(chain.stages)
            else:
                self._fuse(chain)
        self.life: dict[str, tuple[int, int]] = {}
        """By tensor, the first and the last stage of its life."""
        self.words: dict[str, int] = {}
        """By tensor, its scratchpad words."""
        readers = self._lifetimes()
        self.streamed = self._streamed() - readers.keys()
        """Tensors that only go from DRAM to the weight buffer: never resident."""
        self.within = {
            stage.op.output
            for stage, chain in zip(self.stages, self.chain)
            if chain.fused and readers.get(stage.op.output) == {chain}
        }
        """Tensors that pass from stage to stage of one chain and are read nowhere else."""

    def _fuse(self, chain: Chain) -> None:
        """Carry a chain's stages out together."""
        first = self._alone[chain.first]
        for i in chain.stages:
            stage = self._alone[i]
            if not stage.striped:
                raise DoesNotFitError(
                    chain, f"node {stage.op.name}: cannot be carried out in stripes"
                )
            if stage.batch != first.batch:
                raise DoesNotFitError(
                    chain,
                    f"nodes {first.op.name}, {stage.op.name}: cannot be carried out in stripes "
                    f"together, with {first.batch} and {stage.batch} images",
                )
            self.chain[i] = chain
            self.stages[i] = in_rows(stage, self.graph)

    def _lifetimes(self) -> dict[str, set[Chain]]:
        """Find life and size of all tensors; by tensor, the chains that read it."""
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
        return readers

    def _streamed(self) -> set[str]:
        """Tensors that go from DRAM to the weight buffer; find life and size of those that go
        nowhere else."""
        streamed = set()
        for stage, chain in zip(self.stages, self.chain):
            product = _product_of(stage)
            if product is None:
                continue
            for name in product.tensors:
                self.life.setdefault(name, (chain.first, chain.last))
                self.words.setdefault(name, product.spread.words)
                streamed.add(name)
        return streamed

    def scheduled(self, schedule: Schedule) -> Planner:
        """The same with another schedule."""
        return Planner(
            graph=self.graph,
            stages=self._alone,
            config=self.config,
            stored=self.stored,
            schedule=schedule,
            choices=self._choices,
        )

    def rows(self, i: int) -> int:
        """Rows of a stage's output in one phase, that may become stripes."""
        stage = self._alone[i]
        if not stage.striped:
            return 1
        return in_rows(stage, self.graph).h

    # Plans ---------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """The plan with as many tensors resident as leave decent room for every stage. Raises
        :class:`DoesNotFitError` for a stage that does not fit in the scratchpad at all."""
        capacity = self.config.scratchpad_words
        resident = {t for t, words in self.words.items() if words <= capacity}
        resident -= self.within | self.streamed
        used = words_in_use(self._lasting_buffers(resident), len(self.stages))
        known: dict[Chain, ChainPlan] = {}
        while True:
            try:
                return self._plan_beside(resident, used, known)
            except _NoRoomError as e:
                resident = resident - {e.tensor}
                first, last = self.life[e.tensor]
                used[first : last + 1] -= self.words[e.tensor]
                # A tensor matters to no chain outside its life.
                known = {c: p for c, p in known.items() if c.last < first or last < c.first}

    def _plan_beside(
        self, resident: set[str], used: np.ndarray, known: dict[Chain, ChainPlan]
    ) -> Plan:
        """The plan with these tensors resident; ``used``: by stage, the words of
        :meth:`_lasting_buffers`; ``known``: plans of chains made beside these tensors; new
        ones are added. Raises :class:`_NoRoomError`."""
        plans: list[StagePlan] = []
        rolls: dict[str, Roll] = {}
        while len(plans) < len(self.stages):
            chain = self.chain[len(plans)]
            if chain not in known:
                known[chain] = self._plan_chain(chain, resident, used)
            plans += known[chain].stages
            rolls |= known[chain].rolls
        buffers = self._lasting_buffers(resident)
        for tensor, each in rolls.items():
            buffers.append(Buffer(TensorKey(tensor), each.words, *self.life[tensor]))
        for i, p in enumerate(plans):
            first, last = self.chain[i].first, self.chain[i].last
            for role, (words, copies) in p.buffers.items():
                for copy in range(copies):
                    buffers.append(Buffer(CopyKey(role, i, copy), words, first, last))
        addresses = self._addresses(resident, buffers)
        return Plan(
            resident=resident,
            stages=plans,
            order=self._order(plans, resident),
            chain=self.chain,
            rolls=rolls,
            addresses=addresses,
        )

    def _lasting_buffers(self, resident: set[str]) -> list[Buffer[BufferKey]]:
        """The buffers of resident tensors, and of what stages need besides activations."""
        buffers: list[Buffer[BufferKey]] = [
            Buffer(TensorKey(t), self.words[t], *self.life[t]) for t in sorted(resident)
        ]
        return buffers + self._fixed_buffers

    @functools.cached_property
    def _fixed_buffers(self) -> list[Buffer[BufferKey]]:
        """The buffers of what stages need besides activations."""
        buffers: list[Buffer[BufferKey]] = []
        for i, stage in enumerate(self.stages):
            if stage.fixed_words:
                # Loaded while the stage before works.
                first, last = self.chain[i].first, self.chain[i].last
                buffers.append(Buffer(FixedKey(i), stage.fixed_words, max(first - 1, 0), last))
        return buffers

    def _plan_chain(self, chain: Chain, resident: set[str], used: np.ndarray) -> ChainPlan:
        """The plan of a chain beside ``used`` words by stage, decent if that is possible."""
        budget = self.config.scratchpad_words - int(used[chain.first : chain.last + 1].max())
        chosen = self._choose(chain, resident, budget, decent=True)
        if chosen is not None:
            return chosen
        alive = [t for t in resident if any(self._alive(t, i) for i in chain.stages)]
        if alive:
            raise _NoRoomError(max(alive, key=self._cost))
        chosen = self._choose(chain, resident, budget, decent=False)
        if chosen is None:
            raise DoesNotFitError(chain, self._refusal(chain.first))
        return chosen

    def _addresses(
        self, resident: set[str], buffers: list[Buffer[BufferKey]]
    ) -> dict[BufferKey, int]:
        """Addresses of all buffers."""
        for pause in range(MAX_PAUSE, -1, -1):
            addresses, top = pack(buffers, pause, self.config.scratchpad_words)
            if top <= self.config.scratchpad_words:
                return addresses
        if not resident:
            return self._addresses_in_turns(buffers)
        # Fragmentation: give up the costliest tensor of the fullest moment.
        i = int(np.argmax(words_in_use(buffers, len(self.stages))))
        alive = [t for t in resident if self._alive(t, i)]
        raise _NoRoomError(max(alive or sorted(resident), key=self._cost))

    def _addresses_in_turns(self, buffers: list[Buffer[BufferKey]]) -> dict[BufferKey, int]:
        """Addresses of all buffers, without gaps, where no tensor is resident.

        Only what a chain needs besides activations is alive during two chains, its own and the one
        before. It lies at the bottom for one chain, at the top for the next, and so on in turns;
        all else lies between."""
        at_top = {chain: n % 2 == 1 for n, chain in enumerate(dict.fromkeys(self.chain))}
        bottom = np.zeros(len(self.stages), np.int64)
        top = np.full(len(self.stages), self.config.scratchpad_words)
        addresses: dict[BufferKey, int] = {}
        for b in sorted(buffers, key=lambda b: not isinstance(b.key, FixedKey)):
            life = slice(b.first, b.last + 1)
            if isinstance(b.key, FixedKey) and at_top[self.chain[b.last]]:
                top[life] -= b.words
                addresses[b.key] = int(top[b.last])
            else:
                addresses[b.key] = int(bottom[b.last])
                bottom[life] += b.words
        return addresses

    def _alive(self, tensor: str, i: int) -> bool:
        """Stage ``i`` lies within the tensor's life."""
        first, last = self.life[tensor]
        return first <= i <= last

    def _refusal(self, i: int) -> str:
        return (
            f"node {self.stages[i].op.name}: its smallest piece does not fit in the scratchpad of "
            f"{self.config.scratchpad_words} words of {self.config.rows} bytes"
        )

    def _order(self, plans: list[StagePlan], resident: set[str]) -> list[tuple[int, int]]:
        """Stage and region, as they are carried out."""
        out = []
        for chain in dict.fromkeys(self.chain):
            if chain.fused:
                steps = order(self.stages, chain)
                for n in range(self.stages[chain.first].batch):
                    out += [(i, n * chain.stripes + s) for i, s in steps]
            elif chain.woven:
                stages = self.stages[chain.first : chain.last + 1]
                own = plans[chain.first : chain.last + 1]
                steps = woven(stages, own, resident, self.config)
                out += [(chain.first + i, r) for i, r in steps]
            else:
                out += [(chain.first, r) for r in range(len(plans[chain.first].regions))]
        return out

    def _cost(self, tensor: str) -> tuple[int, str]:
        """How much scratchpad, over time, keeping the tensor takes."""
        first, last = self.life[tensor]
        return self.words[tensor] * (last - first + 1), tensor

    def _choose(
        self, chain: Chain, resident: set[str], budget: int, *, decent: bool
    ) -> ChainPlan | None:
        """The plan of a chain whose buffers fit in ``budget`` words; None: there is none."""
        if chain.fused:
            striped = self.stripes(chain, resident)
            return striped if striped and striped.words <= budget else None
        if chain.woven:
            return self._woven(chain, resident, budget)
        plan = self._choices_of(chain.first, resident, decent=decent).within(budget)
        return None if plan is None else ChainPlan([plan], {})

    def _woven(self, chain: Chain, resident: set[str], budget: int) -> ChainPlan | None:
        """The plans of stages that take turns: with regions as large as fit, buffers doubled."""
        most = chain.woven
        while most >= LEAST:
            own = [self._choices_of(i, resident, decent=False, limit=most) for i in chain.stages]
            plans = [plan for choices in own if (plan := choices.within(budget)) is not None]
            if len(plans) == len(own) and sum(plan.words for plan in plans) <= budget:
                return ChainPlan(plans, {})
            most = most * 3 // 4
        return None

    def _choices_of(
        self, i: int, resident: set[str], *, decent: bool, limit: int | None = None
    ) -> StageChoices:
        """The plans of a stage that is in no chain of stripes; ``limit``: outputs of its regions at
        most, if it is not the schedule that says so."""
        stage, limit = self.stages[i], limit or self.regions.get(i)
        own = (stage.op.output, *(s.tensor for s in stage.sources))
        on_chip = frozenset(t for t in own if t in resident or t in self.within)
        key = (stage, on_chip, limit, decent)
        if key not in self._choices:
            planner = StagePlanner(stage, self.config, on_chip)
            self._choices[key] = StageChoices(planner.choices(limit=limit, decent=decent))
        return self._choices[key]

    def stripes(self, chain: Chain, resident: set[str]) -> ChainPlan | None:
        """The plan of a fused chain; None: a stripe would be empty."""
        ends = row_ends(self.stages, chain)
        if any(a == b for rows in ends.values() for a, b in zip([0, *rows], rows)):
            return None
        on_chip = resident | self.within
        plans, rolls = [], {}
        for i in chain.stages:
            stage = self.stages[i]
            regions = [
                Region(n, a, 0, b - a, stage.w)
                for n in range(stage.batch)
                for a, b in zip([0, *ends[i]], ends[i])
            ]
            plans.append(StagePlanner(stage, self.config, on_chip).plan(regions))
            if stage.op.output in self.within:
                rolls[stage.op.output] = roll(self.stages, chain, i, ends)
        return ChainPlan(plans, rolls)

    def fits(self, chain: Chain, resident: set[str]) -> bool:
        """A fused chain fits beside the resident tensors."""
        striped = self.stripes(chain, resident)
        if striped is None:
            return False
        used = sum(self.stages[i].fixed_words for i in chain.stages)
        used += sum(
            self.words[t]
            for t in resident
            if self.life[t][0] <= chain.last and chain.first <= self.life[t][1]
        )
        return used + striped.words <= self.config.scratchpad_words


def _product_of(stage: Stage) -> Product | None:
    """The product of activations that a stage computes, if it does."""
    return stage.product if isinstance(stage, ArrayStage) else None
