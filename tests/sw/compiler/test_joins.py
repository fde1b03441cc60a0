"""Tensors that only join others: which are not made, and that what is made is right."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from systole.isa import Config
from systole.sw.compiler import Compiler, plan
from systole.sw.compiler.stripes import Schedule
from systole.sw.ir.graph import ModelError
from systole.sw.session.backends import open_device
from tests.helpers.layer_checks import check_program, compile_by_chance
from tests.helpers.marks import fewer_unless_long
from tests.helpers.random_graphs import GraphBuilder, random_joins

SMALL = Config(rows=8, cols=8, scratchpad_bytes=16384, weight_bytes=4096, accumulator_bytes=8192)
CONFIGS = [Config(), Config.sized(4, 4), Config.sized(12, 20), SMALL]
AROUND = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1))


class Case(GraphBuilder):
    """A graph of images of 16 x 10, with one input of 16 channels."""

    def __init__(self):
        super().__init__(np.random.default_rng(1))
        self.x = self.input((1, 16, 16, 10))

    def _ratio(self) -> np.float32:
        return np.float32(0.7)

    def layer(self, x: str | None = None, outputs: int = 16, **options) -> str:
        return self.conv(x or self.x, outputs, *AROUND, **options)

    def stages(self, *outputs: str) -> list[str]:
        """Compiled by several schedules for several arrays and compared with the golden model, with
        every layer stored and without. The stages at 16x16, each as its kind with the number of its
        operator; ``f`` behind it: it makes a function of what that makes."""
        graph = self.graph(list(outputs))
        inputs = {p.tensor: self.values[p.tensor] for p in graph.inputs}
        rng = np.random.default_rng(0)
        for config in CONFIGS:
            with open_device("commands", config) as device:
                for dump in (True, False):
                    program, _ = compile_by_chance(rng, graph, config, dump=dump)
                    check_program(device, program, inputs, self.values)
        compiler = Compiler(graph, Config())
        replaced = {m.tensor for m in compiler.lowering.joined.replacements.values()}
        return [f"{s.kind}{s.layer}" + "f" * (s.op.output in replaced) for s in compiler.stages]


def test_parts_of_the_same_scale_are_read_where_they_are():
    c = Case()
    parts = [c.layer(zero=3), c.layer(zero=3)]
    out = c.layer(c.concat(*parts, same=True))
    assert c.stages(out) == ["array0", "array1", "array3"]


@pytest.mark.parametrize("function", [False, True])
def test_a_part_is_made_by_its_operators_table(function):
    c = Case()
    out = c.layer(c.concat(c.layer(function=function), c.layer(outputs=32)))
    assert c.stages(out) == ["array0f", "array1f", "array3"]


def test_a_part_behind_an_addition():
    c = Case()
    first = c.layer()
    out = c.layer(c.concat(c.layer(other=first), c.add(first, c.layer())))
    assert c.stages(out) == ["array0", "array1f", "array2", "vector3f", "array5"]


def test_a_part_that_others_read_is_made_again():
    c = Case()
    shared = c.layer()
    out = c.layer(c.concat(shared, c.layer(shared)))
    assert c.stages(out) == ["array0", "array1f", "vector2", "array3"]


def test_a_part_that_is_an_input_or_an_output():
    c = Case()
    parts = c.x, c.layer(), c.layer()
    out = c.layer(c.concat(*parts))
    assert c.stages(parts[1], out) == ["array0", "vector2", "array1f", "vector2", "array3"]


def test_joins_of_joins():
    c = Case()
    pair = c.concat(c.layer(), c.layer())
    last = c.layer(pair)
    out = c.layer(c.concat(pair, last), outputs=8)
    stages = c.stages(out)
    assert "array2" not in stages and "array4" not in stages
    assert stages.count("vector4") == 2 and stages[-1] == "array5"


def test_channels_are_split_and_shuffled():
    c = Case()
    x = c.layer(outputs=64, zero=0)
    halves = [c.select([(x, np.arange(k, k + 32))], same=True) for k in (0, 32)]
    again = c.conv(halves[1], 32, *AROUND, zero=0)
    joined = c.concat(halves[0], again, same=True)
    shuffled = c.select([(joined, np.arange(64).reshape(2, 32).T.reshape(-1))], same=True)
    assert c.stages(c.layer(shuffled)) == ["array0", "array3", "array6"]


def test_channels_that_come_more_than_once():
    """Their weights add up beyond int8."""
    c = Case()
    x = c.layer(outputs=16, zero=0)
    out = c.layer(c.select([(x, np.arange(48) % 16)], same=True))
    assert c.stages(out) == ["array0", "array2"]


def test_parts_that_are_not_whole_blocks():
    """Worth it for a kernel of one element, not for nine."""
    for kernel, expected in ((1, ["array0f", "array1f", "array3"]), (3, 4)):
        c = Case()
        joined = c.concat(c.layer(outputs=40), c.layer(outputs=24))
        pad = kernel // 2
        out = c.conv(joined, 16, (kernel, kernel), (1, 1), (pad,) * 4, (1, 1))
        assert c.stages(out) == expected or len(c.stages(out)) == expected


@pytest.mark.parametrize("kind", ["max", "average"])
def test_pools_by_part(kind):
    c = Case()
    joined = c.concat(c.layer(), c.layer())
    out = c.layer(c.pool(joined, kind, (3, 3), (2, 2), (1, 1, 1, 1)))
    assert c.stages(out) == ["array0f", "window3", "array1f", "window3", "array4"]


def test_depthwise_convolutions_by_part():
    c = Case()
    joined = c.select([(c.layer(), np.arange(16)[::-1])])
    doubled = c.concat(joined, joined, c.layer(), same=True)
    out = c.layer(c.conv(doubled, 48, *AROUND, group=48))
    assert c.stages(out) == [*("array0f", "window4", "window4", "array2f", "window4", "array5")]


def test_depthwise_convolutions_with_functions():
    """Before a join, and behind it."""
    c = Case()
    first = c.conv(c.x, 16, *AROUND, group=16, function=True)
    joined = c.concat(first, c.layer())
    out = c.layer(c.conv(joined, 32, *AROUND, group=32, function=True))
    expected = [
        "window0",
        "vector0f",
        "window3",
        "vector3",
        "array1f",
        "window3",
        "vector3",
        "array4",
    ]
    assert c.stages(out) == expected


def test_functions_of_joins():
    c = Case()
    joined = c.concat(c.layer(), c.layer())
    assert c.stages(c.layer(c.table(joined))) == ["array0f", "array1f", "array4"]


def test_other_readers_on_the_array():
    for make in (Case.upscale, Case.nearest):
        c = Case()
        joined = c.concat(c.layer(), c.layer())
        assert c.stages(make(c, joined)) == ["array0f", "array1f", "array3"]
    c = Case()
    joined = c.concat(c.layer(), c.layer())
    out = c.conv(joined, 64, *AROUND, group=2, other=c.layer(outputs=64), function=True)
    assert c.stages(out) == ["array0f", "array1f", "array3", "array4"]


def test_joins_that_are_made():
    """Outputs, operands of an addition, and what only another join would read."""
    c = Case()
    joined = c.concat(c.layer(), c.layer())
    assert c.stages(joined, c.layer(joined)) == ["array0", "array1", "array2", "array3"]
    c = Case()
    joined = c.concat(c.layer(outputs=8), c.layer(outputs=8))
    assert c.stages(c.layer(joined, other=joined)) == ["array0", "array1", "array2", "array3"]
    c = Case()
    joined = c.concat(c.layer(), c.layer())
    assert c.stages(c.pool(joined, "max", (2, 2), (2, 2), (0, 0, 0, 0)))[2:] == [
        "array2",
        "window3",
    ]


def test_layers_that_are_not_made_cost_nothing():
    c = Case()
    out = c.layer(c.concat(c.layer(), c.layer()))
    compiler = Compiler(c.graph([out]), Config())
    program = compiler.program(compiler.search())
    assert [layer.op for layer in program.layers] == ["Conv", "Conv", "Concat", "Conv"]
    assert set(program.command_layers) == {0, 1, 3}


@pytest.mark.parametrize("seeds", fewer_unless_long([range(75), range(75, 150)], fast=1), ids=str)
def test_random_joins(seeds):
    kinds: Counter[str] = Counter()
    for seed in seeds:
        config = CONFIGS[seed % len(CONFIGS)]
        graph, inputs, expected = random_joins(seed)
        rng = np.random.default_rng(seed)
        compiler = Compiler(graph, config)
        joined = compiler.lowering.joined
        kinds["replaced"] += len(joined.replacements)
        kinds["left out"] += len(graph.ops) - len({layer for layer, _ in joined.ops})
        kinds["parts"] += sum(len(parts) for parts in joined.parts.values())
        for _, op in joined.ops:
            if op.output not in graph.tensors:
                kinds[type(op).__name__] += 1
        with open_device("commands", config) as device:
            try:
                program, _ = compile_by_chance(rng, graph, config, dump=bool(seed % 2))
                check_program(device, program, inputs, expected)
            except ModelError as e:
                assert "scratchpad" in str(e), e
            except BaseException as e:
                e.add_note(f"seed {seed}")
                raise
    print(kinds)
    assert all(kinds[kind] >= 5 for kind in ("left out", "replaced", "Table", "Pool", "Conv"))


def test_a_nearly_full_scratchpad_is_packed_without_gaps():
    """The largest buffers first, with no tensor resident, they would take 1,034 of 1,024 words."""
    config = Config.sized(8, 8, scratchpad_bytes=8192)
    graph, inputs, expected = random_joins(3342)
    with open_device("commands", config) as device:
        check_program(device, Compiler(graph, config).program(Schedule()), inputs, expected)


@pytest.mark.parametrize("seed", range(6))
def test_buffers_packed_in_turns(seed, monkeypatch):
    """As if no other way of packing brought them within the scratchpad."""
    monkeypatch.setattr(plan, "pack", lambda *_: ({}, 1 << 30))
    config = Config.sized(8, 8, scratchpad_bytes=16384)
    graph, inputs, expected = random_joins(seed)
    with open_device("commands", config) as device:
        program, _ = compile_by_chance(np.random.default_rng(seed), graph, config, dump=False)
        check_program(device, program, inputs, expected)
