"""Schedules: sliding buffers, stripes, and what the searches find."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from systole.isa import Config
from systole.sw.cli.bench import load_network
from systole.sw.compiler import Compiler
from systole.sw.compiler.plan import PLAIN, DoesNotFitError
from systole.sw.compiler.search import changes
from systole.sw.compiler.stripes import Chain, Schedule, _slide, depths, order, row_ends
from systole.sw.simulate.cycles import predict_layers
from tests.helpers.marks import fewer_unless_long
from tests.helpers.random_graphs import GraphBuilder


@given(st.data())
@settings(max_examples=300)
def test_a_sliding_buffer_holds_every_row_until_it_has_been_read(data):
    stripes = data.draw(st.integers(1, 12))
    made = data.draw(st.lists(st.integers(1, 6), min_size=stripes, max_size=stripes))
    ends = [sum(made[: s + 1]) for s in range(stripes)]
    lows = []
    for before, end in zip([0, *ends], ends):
        low = data.draw(st.integers(max([0, *lows[-1:]]), end))
        lows.append(max(low, min(before - 3, end)))
    rows = data.draw(st.integers(1, ends[-1]))
    placed = _slide(ends, lows, rows)
    assert placed is not None or rows < ends[-1]
    if placed is None:
        return
    held: dict[int, int] = {}  # place in the buffer: row
    before = 0
    for origin, (first, last), end, low in zip(*placed, ends, lows):
        if first < last:
            copied = {y: held[place] for place, y in held.items() if first <= y < last}
            assert sorted(copied) == list(range(first, last))
            sources = {place for place, y in held.items() if first <= y < last}
            assert not sources & {y - origin for y in copied}
            held |= {y - origin: y for y in copied}
        held |= {y - origin: y for y in range(before, end)}
        assert all(0 <= y - origin < rows for y in range(before, end))
        for y in range(low, end):
            assert held.get(y - origin) == y
        before = end


def test_stripes_make_every_row_once_and_in_time():
    compiler = Compiler(load_network("mobilenetv2", size=64), Config())
    chain = Chain(1, 8, 8)
    stages = compiler.planner(Schedule((chain,))).stages
    ends, depth = row_ends(stages, chain), depths(stages, chain)
    made = {stages[i].op.output: i for i in chain.stages}
    done = dict.fromkeys(chain.stages, 0)
    for i, s in order(stages, chain):
        before, done[i] = done[i], ends[i][s]
        assert before == (ends[i][s - 1] if s else 0) < done[i]
        for source in stages[i].sources:
            k = made.get(source.tensor, i)
            if k < i:
                assert source.span(0, before, done[i] - before)[1] <= done[k] * stages[k].steps[0]
                assert depth[k] < depth[i]
    assert all(done[i] == stages[i].h for i in chain.stages)


def _cost(compiler: Compiler, schedule: Schedule) -> tuple[int, int]:
    made = predict_layers(compiler.program(schedule), 64)
    return made.cycles, made.read_bytes + made.write_bytes


@pytest.mark.parametrize(
    "name", fewer_unless_long(["mobilenetv2", "mobilenetv1", "squeezenet"], fast=1)
)
def test_chains_save_cycles_and_traffic(name):
    config = Config(scratchpad_bytes=64 * 1024)
    compiler = Compiler(load_network(name, size=128), config)
    schedule = compiler.search()
    plain, fast = _cost(compiler, PLAIN), _cost(compiler, schedule)
    assert schedule.chains
    assert fast[0] < plain[0] and fast[1] < plain[1]


def test_the_best_schedule_is_better_and_the_same_every_time(monkeypatch):
    compiler = Compiler(load_network("dscnn-kws"), Config())
    monkeypatch.setattr("systole.sw.compiler.search.EFFORT", 10_000)
    fast, best = compiler.search(), compiler.search("best")
    assert _cost(compiler, best) < _cost(compiler, fast)
    assert best == compiler.search("best")


def test_changes_are_legal_schedules():
    start = Schedule((Chain(2, 4, 8), Chain(5, 6, 14)), ((0, 128),))
    seen = set()
    for i in range(8):
        for change in changes(start, i, 8):
            stages = [i for c in change.chains for i in c.stages]
            assert len(stages) == len(set(stages)) and all(c.fused for c in change.chains)
            assert all(0 <= i < 8 for i in stages)
            seen.add(change)
    assert {len(c.chains) for c in seen} >= {1, 2, 3}


def test_a_chain_that_does_not_fit_is_named():
    compiler = Compiler(load_network("mobilenetv1", size=64), Config())
    huge = Chain(0, 20, 2)
    with pytest.raises(DoesNotFitError) as refused:
        compiler.program(Schedule((huge,)))
    assert refused.value.chain == huge


@pytest.mark.parametrize("batches", [(1, 2), (2, 1)])
def test_stages_of_other_batches_are_not_chained(batches):
    b = GraphBuilder(np.random.default_rng(0))
    for n in batches:
        b.conv(b.input((n, 4, 6, 6)), 4, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    compiler = Compiler(b.graph(["t0", "t1"]), Config.sized(4, 4))
    with pytest.raises(DoesNotFitError, match="images"):
        compiler.program(Schedule((Chain(0, 1, 2),)))
    compiler.program(compiler.search("best"))
