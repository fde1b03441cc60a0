"""Stages that take turns around row operations."""

from __future__ import annotations

import onnx
import pytest

from systole.isa import Config
from systole.sw import zoo
from systole.sw.compiler import Compiler
from systole.sw.compiler.partition import AcceleratorSegment, partition
from systole.sw.compiler.stages import RowStage
from systole.sw.compiler.stripes import Schedule
from systole.sw.compiler.weave import groups_of
from systole.sw.simulate.cycles import predict_layers

CONFIG = Config(row_ops=True, zero_points=True, scratchpad_bytes=524288)
LATENCY = 64


@pytest.fixture(scope="module")
def compiler(tmp_path_factory) -> Compiler:
    """Of BERT-tiny."""
    path = tmp_path_factory.mktemp("zoo") / "bert.onnx"
    onnx.save(zoo.build("bert-tiny", tokens=96, layers=1), path)
    (segment,) = (s for s in partition(path, CONFIG).segments if isinstance(s, AcceleratorSegment))
    return Compiler(segment.graph, CONFIG)


def test_groups_are_what_makes_and_reads_rows(compiler):
    stages = compiler.stages
    groups = groups_of(stages, ())
    assert all(a.last < b.first for a, b in zip(groups, groups[1:]))
    kinds = [[stages[i].op.op_type for i in group.stages] for group in groups]
    assert ["MatMul", "Add+Softmax", "MatMul"] in kinds
    assert ["MatMul+Add", "LayerNormalization", "MatMul+Gelu"] in kinds
    softmax = next(i for i, s in enumerate(stages) if "Softmax" in s.op.op_type)
    assert softmax not in {i for group in groups_of(stages, (softmax,)) for i in group.stages}


def test_what_is_made_comes_before_what_reads_it(compiler):
    groups = tuple(groups_of(compiler.stages, ()))
    plan = compiler.planner(Schedule(groups)).plan()
    assert sorted(plan.order) == [
        (i, r) for i, own in enumerate(plan.stages) for r in range(len(own.regions))
    ]
    made: dict[str, list] = {}
    turns = 0
    for (i, r), (other, _) in zip(plan.order, [*plan.order[1:], (-1, 0)]):
        stage, region = compiler.stages[i], plan.stages[i].regions[r]
        turns += other < i
        reads_rows = "Softmax" in compiler.stages[i - 1].op.op_type
        if isinstance(stage, RowStage) or reads_rows:
            parts = [p for p in made.get(stage.sources[0].tensor, []) if p.n == region.n]
            covered = {x for p in parts for x in range(p.x, p.x + p.w)}
            first = i == 0  # it reads the input
            assert first or covered >= set(range(region.x, region.x + region.w))
        made.setdefault(stage.op.output, []).append(region)
    assert turns > len(groups)


def test_turns_are_quicker(compiler):
    """And the search takes them."""
    apart = predict_layers(compiler.program(Schedule()), LATENCY).cycles
    schedule = compiler.search()
    assert any(chain.woven for chain in schedule.chains)
    assert predict_layers(compiler.program(schedule), LATENCY).cycles < 0.9 * apart
