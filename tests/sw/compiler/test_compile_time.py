"""How much work it takes to load, place and compile published networks, counted: a time would
depend on the machine. What each piece of work costs is in the profile of ``partition``."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest

from systole.isa import Config
from systole.sw.compiler import Compiler
from systole.sw.compiler.partition import AcceleratorSegment, Partition, partition
from systole.sw.compiler.plan import Planner
from systole.sw.compiler.stream import CommandStream
from systole.sw.frontend.passes import moves
from systole.sw.quantisation.pipeline import quantise_model
from tests.helpers import published


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What is counted from here on: movements solved, graphs lowered for the array, plans of whole
    programs, commands emitted."""
    counts: Counter[str] = Counter()

    def count(owner: object, name: str, what: str) -> None:
        original = getattr(owner, name)

        def counting(*args, **kwargs):
            counts[what] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    monkeypatch.setattr(moves, "_FITS", {})
    count(moves, "_fit", "movements")
    count(Compiler, "__init__", "graphs")
    count(Planner, "plan", "plans")
    count(CommandStream, "emit", "commands")
    return counts


def quantised(build: Callable[[], onnx.ModelProto], size: int, folder: Path) -> Path:
    """The network, quantised on noise."""
    path, int8 = folder / "float.onnx", folder / "int8.onnx"
    onnx.save(build(), path)
    x = np.random.default_rng(1).normal(size=(1, 3, size, size)).astype(np.float32)
    onnx.save(quantise_model(path, {"x": x}), int8)
    return int8


def commands_of(plan: Partition) -> int:
    """Commands of all of a model's programs."""
    programs = [s.program for s in plan.segments if isinstance(s, AcceleratorSegment)]
    return sum(len(program.command_layers) for program in programs if program is not None)


NETWORKS = {
    "densenet121": (224, set(), dict(movements=58, graphs=1, plans=5, commands=69_500)),
    "movenet": (
        *(192, {"ArgMax", "GatherND", "Cast"}),
        dict(movements=6, graphs=4, plans=11, commands=18_808),
    ),
    "swin": (
        *(224, {"LayerNormalization", "Softmax"}),
        dict(movements=207, graphs=98, plans=166, commands=151_271),
    ),
}
"""By name, the size of the picture, operators that run on the host, and the work at most."""


@pytest.mark.long
@pytest.mark.parametrize("name", NETWORKS)
def test_published_networks_take_little_work(name, tmp_path, monkeypatch):
    size, on_host, most = NETWORKS[name]
    path = quantised(getattr(published, name), size, tmp_path)
    counts = counted(monkeypatch)
    plan = partition(path, Config())
    hosts = {p.op_type for p in plan.placements if p.host}
    assert on_host <= hosts and bool(on_host) == bool(hosts)
    assert all(counts[what] <= number for what, number in most.items()), counts


def two_convolutions() -> onnx.ModelProto:
    """The second has more parameters than a small scratchpad holds."""
    net = published.Net((1, 3, 6, 6))
    return net.model(net.conv(net("Relu", net.conv("x", 3, 4, kernel=3)), 4, 2048))


def test_who_does_not_fit_is_found_without_programs(tmp_path, monkeypatch):
    path = quantised(two_convolutions, 6, tmp_path)
    counts = counted(monkeypatch)
    plan = partition(path, Config.sized(4, 4, scratchpad_bytes=4096))
    (refused,) = (p for p in plan.placements if p.host and "does not fit" in p.rule)
    assert refused.op_type == "Conv" and refused.name == "Conv_2"
    assert 0 < counts["commands"] == commands_of(plan)


def test_equal_movements_are_solved_once(tmp_path, monkeypatch):
    """Blocks of attention that differ in nothing but their weights."""
    counts = []
    for depth in (1, 2):
        build = partial(published.swin, size=28, width=16, depths=(depth,), heads=1)
        path = quantised(build, 28, tmp_path)
        with monkeypatch.context() as patch:
            work = counted(patch)
            partition(path, Config())
        counts.append(work)
    assert 0 < counts[0]["movements"] == counts[1]["movements"]
    assert counts[0]["graphs"] < counts[1]["graphs"]
