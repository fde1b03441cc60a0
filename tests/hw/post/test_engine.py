"""PostEngine against the command's definition in ``isa.commands``, in numpy; rates and latency."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest

from systole.hw.post.combine import PostCombine
from systole.hw.post.engine import PostEngine
from systole.hw.post.table import PostTable
from systole.isa import COMMANDS, Config, Opcode, PostOp, PostSource
from systole.isa.commands import TABLE_BYTES
from systole.isa.numerics import combine, requantise
from systole.isa.timing import POST_DEPTH, POST_RETIRE
from tests.helpers.simulation import Inputs, simulation

PARAM_AREA = 1024
"""Scratchpad words under this hold parameters; tensors lie above, tables behind them."""
AREA = 512
"""Words in which a tensor lies."""
TABLE_AREA = PARAM_AREA + 6 * AREA
WORDS = TABLE_AREA + 512
ACC_WORDS = 256

SHAPES = [
    *[(4, 4), (8, 4), (4, 8), (6, 10), (10, 4)],
    *(pytest.param(shape, marks=pytest.mark.long) for shape in ((12, 20), (20, 8))),
]
KINDS = list(itertools.product(PostSource, PostOp, (0, 1)))
"""Source, op, lut."""


def fields(**values: int) -> dict[str, int]:
    """A whole POST command; fields not named get the value of a plain one-word command."""
    out = {f.name: 0 for f in COMMANDS[Opcode.POST].fields}
    out |= {"groups": 1, "out_w": 1, "out_h": 1, "out": PARAM_AREA, "shift": 1}
    out |= {"out_step": 1, "b_step": 1, "table": TABLE_AREA}
    out |= {"low": -128, "high": 127, "low2": -128, "high2": 127}
    return out | values


class Memories:
    """Scratchpad and accumulators, and the reference that executes a command on them."""

    def __init__(self, config: Config, rng: np.random.Generator):
        self.config = config
        self.words = rng.integers(-128, 128, (WORDS, config.rows)).astype(np.int8)
        self.acc = rng.integers(-(1 << 31), 1 << 31, (ACC_WORDS, config.cols)) >> rng.integers(
            0, 31, (ACC_WORDS, config.cols)
        )
        self.params: dict[int, tuple[np.ndarray, ...]] = {}
        lanes = config.lanes
        for word in range(0, PARAM_AREA, config.param_words):
            bias = rng.integers(-1000, 1000, lanes)
            multiplier = rng.integers(1 << 23, 1 << 24, lanes)
            shift = rng.integers(23, 53, lanes)
            raw = np.zeros(config.param_words * config.rows, np.uint8)
            packed = bias & 0xFFFF_FFFF | multiplier << 32 | shift << 56
            raw[: 8 * lanes] = packed.astype("<u8").view(np.uint8)
            chunk = raw.view(np.int8).reshape(config.param_words, config.rows)
            if word + config.param_words <= PARAM_AREA:
                self.words[word : word + config.param_words] = chunk
                self.params[word] = bias, multiplier, shift

    def execute(self, c: dict[str, int]) -> None:
        lanes, places = self.config.lanes, self.config.rows // self.config.lanes
        for g in range(c["groups"]):
            block, place = divmod(c["lane"] + g, places)
            part = slice(place * lanes, (place + 1) * lanes)
            for oy in range(c["out_h"]):
                for ox in range(c["out_w"]):
                    steps = {"out": c["out_step"], "a": 1, "b": c["b_step"]}
                    word = {
                        n: c[n] + block * c[f"{n}_block"] + oy * c[f"{n}_pitch"] + ox * step
                        for n, step in steps.items()
                    }

                    if c["source"] == PostSource.ACCUMULATOR:
                        params = self.params[c["params"] + g * self.config.param_words]
                        acc = self.acc[c["acc"] + oy * c["out_w"] + ox, g * lanes : (g + 1) * lanes]
                        a = requantise(acc, *params, zero=c["zero"], low=c["low"], high=c["high"])
                    else:
                        a = self.words[word["a"], part]
                    if c["op"] != PostOp.NONE:
                        b = self.words[word["b"], part]
                        names = ("za", "zb", "zo", "ma", "mb", "shift")
                        given = {n: c[n] for n in names} | {"low": c["low2"], "high": c["high2"]}
                        a = combine(PostOp(c["op"]).name.lower(), a, b, **given)
                    if c["lut"]:
                        a = self.words[c["table"] :].ravel()[a.astype(int) + 128]
                    self.words[word["out"], part] = a


def random_command(
    rng: np.random.Generator, config: Config, kind: tuple[int, int, int], earlier: list[dict]
) -> dict:
    """A legal command, often reading or overwriting what an earlier one wrote."""
    source, op, lut = kind
    places = config.rows // config.lanes

    def of(low: int, high: int) -> int:
        return int(rng.integers(low, high))

    w, h = (of(1, 9), of(1, 5)) if rng.random() < 0.7 else (of(1, 3), of(1, 3))
    lane = of(0, places)
    groups = of(1, config.groups + 1)
    if source == PostSource.SCRATCHPAD:
        groups = of(1, 2 * places + 2)
    c = fields(source=source, op=op, out_w=w, out_h=h, groups=groups, lane=lane)
    c["acc"] = of(0, ACC_WORDS - w * h)
    slots = PARAM_AREA // config.param_words - groups
    c["params"] = of(0, slots) * config.param_words
    c["low"], c["high"] = sorted((of(-128, 128), of(-128, 128)))
    c["low2"], c["high2"] = sorted((of(-128, 128), of(-128, 128)))
    if rng.random() < 0.6:
        c |= {"low": -128, "high": 127, "low2": -128, "high2": 127}
    c |= {n: of(-128, 128) for n in ("zero", "za", "zb", "zo")}
    c["shift"] = of(1, 64) if rng.random() < 0.3 else of(16, 28)
    c["lut"], c["table"] = lut, of(TABLE_AREA, WORDS - TABLE_BYTES // 4)
    c["out_step"] = of(2, 5) if rng.random() < 0.4 else 1
    for n in ("ma", "mb"):
        c[n] = of(0, 1 << 24) if rng.random() < 0.5 else 1 << min(c["shift"] - 1, 23)
    areas = rng.permutation(6)
    for n, area in zip(("out", "a", "b"), areas):
        pitch = (w * c["out_step"] if n == "out" else w) + of(0, 3)
        c |= {n: PARAM_AREA + AREA * int(area) + of(0, 8), f"{n}_pitch": pitch}
        c[f"{n}_block"] = h * pitch + of(0, 3)
    if earlier:  # read the last result, or work in place
        last = earlier[-1]
        name = ("a", "b")[of(0, 2)]
        if rng.random() < 0.5 and c["out"] // AREA != last["out"] // AREA:
            c |= {f"{name}{n}": last[f"out{n}"] for n in ("", "_pitch", "_block")}
        elif rng.random() < 0.3:
            c |= {f"out{n}": c[f"{name}{n}"] for n in ("", "_pitch", "_block")}
        for n in ("a", "b"):
            if c[n] // AREA == c["out"] // AREA:  # in place exactly, or not at all
                c |= {f"{n}{k}": c[f"out{k}"] for k in ("", "_pitch", "_block")}
                c["out_step"] = 1
    if rng.random() < 0.4 and c["b"] // AREA != c["out"] // AREA:
        c |= {"b_step": 0, "b_pitch": c["b_pitch"] * of(0, 2)}
    return c


@dataclass
class Run:
    """What a run showed, in cycles since the first command was offered."""

    accepted: list[int] = field(default_factory=list)
    retired: list[int] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    """Cycles with an accumulator read."""
    written: list[int] = field(default_factory=list)
    stalled: int = 0


def run(
    config: Config, commands: list[dict], seed: int, refuse: float = 0.0, hold: float = 0.0
) -> Run:
    """Executes ``commands``; the scratchpad refuses requests, and the shell holds back commands,
    with the given probabilities. Compares the whole scratchpad after every command."""
    rng = np.random.default_rng(seed)
    memories = Memories(config, rng)
    reference = Memories(config, np.random.default_rng(seed))
    design = simulation(PostEngine, config)
    dut = design.dut
    out = Run()

    def pack(values: np.ndarray, bits: int) -> int:
        return int.from_bytes(values.astype(f"<i{bits // 8}").tobytes(), "little")

    async def bench(ctx):
        waiting = list(commands)
        todo = list(commands)
        offered = False
        word, acc = None, None
        cycle = 0
        command, read, write = dut.command, dut.scratchpad_read, dut.scratchpad_write
        accumulators, cmd = dut.accumulators, command.cmd
        lanes, rows = config.lanes, config.rows
        inputs = Inputs(cmd.valid, read.ready, write.ready, read.data, accumulators.data)
        while todo:
            if waiting and not offered and rng.random() >= hold:
                ctx.set(cmd.payload, waiting[0])
                offered = True
            read_ready, write_ready = rng.random() >= refuse, rng.random() >= refuse
            # Data are there in the one cycle only.
            junk = rng.integers(-128, 128, max(rows, 4 * config.cols)).astype(np.int8)
            data = pack(junk[:rows] if word is None else word, 8)
            sums = pack(junk[: 4 * config.cols], 8) if acc is None else pack(acc, 32)
            inputs.set(ctx, offered, read_ready, write_ready, data, sums)
            word = acc = None
            if ctx.get(command.retire):  # all was written before this cycle
                reference.execute(todo[0])
                wrong = np.argwhere(memories.words != reference.words)
                assert not len(wrong), f"after {todo[0]}: {len(wrong)} bytes, first {wrong[0]}"
                todo.pop(0)
                out.retired.append(cycle)
            if read_ready and ctx.get(read.valid):
                word = memories.words[ctx.get(read.addr)].copy()
            if ctx.get(accumulators.en):
                acc = memories.acc[ctx.get(accumulators.addr)]
                out.read.append(cycle)
            if write_ready and ctx.get(write.valid):
                value = np.frombuffer(ctx.get(write.data).to_bytes(rows, "little"), np.int8)
                mask = ctx.get(write.mask)
                for p in range(rows // lanes):
                    if mask >> p & 1:
                        part = slice(p * lanes, (p + 1) * lanes)
                        memories.words[ctx.get(write.addr), part] = value[part]
                out.written.append(cycle)
            if offered and ctx.get(cmd.ready):
                waiting.pop(0)
                offered = False
                out.accepted.append(cycle)
            stalled = ctx.get(command.stalled)
            out.stalled += stalled
            if stalled:
                assert len(out.accepted) > len(out.retired), "stalled with nothing in flight"
            await ctx.tick()
            cycle += 1
            assert cycle < 20_000, "hangs"
        for _ in range(20):
            assert not ctx.get(write.valid) and not ctx.get(command.retire)
            await ctx.tick()

    design.run(bench)
    return out


@pytest.mark.parametrize(
    "refuse, hold",
    [(0.1, 0.7), *(pytest.param(p, 0.0, marks=pytest.mark.long) for p in (0.4, 0.0))],
)
@pytest.mark.parametrize("shape", [*SHAPES, (8, 8, 2)])
def test_random_commands(shape: tuple[int, ...], refuse: float, hold: float):
    """The third number is that of the lanes, if they are fewer than the array would feed."""
    rows, cols, lanes = (*shape, 0)[:3]
    config = Config.sized(rows, cols, post_lanes=lanes)
    rng = np.random.default_rng(sum(shape) + int(10 * refuse))
    commands: list[dict] = []
    for kind in rng.permutation(KINDS * 3).tolist():
        commands.append(random_command(rng, config, kind, commands))
    assert {c["out_step"] for c in commands} == {1, 2, 3, 4}
    assert any(c["op"] and not c["b_step"] and not c["b_pitch"] for c in commands)
    result = run(config, commands, seed=1, refuse=refuse, hold=hold)
    assert (result.stalled > 0) == (refuse > 0)


@pytest.mark.parametrize("kind", ["add", "sub", "mul"])
def test_combine_equals_numpy(kind: str):
    """PostCombine over all shifts and multipliers; many totals are exact ties, or one off a tie."""
    lanes, vectors = 16, 24
    rng = np.random.default_rng(6)
    design = simulation(PostCombine, lanes=lanes)
    dut = design.dut
    latency = dut.LATENCY + (kind == "mul")
    got: list[int] = []
    expected: list[int] = []
    ties = 0

    async def bench(ctx):
        nonlocal ties
        setup, operands = Inputs(dut.setup, dut.shift), Inputs(dut.i_valid, dut.a, dut.b)
        for trial in range(130):
            shift = trial % 63 + 1
            ma, mb = (int(x) for x in rng.integers(0, 1 << 24, 2) >> rng.integers(0, 24, 2))
            if trial % 3:  # ma * odd is a tie; mb moves it by little, and not when b = zb
                ma, mb = 1 << min(shift - 1, 23), trial % 2
            if trial % 7 == 0:
                ma = mb = (1 << 24) - 1
            za, zb, zo, x, y = (int(v) for v in rng.integers(-128, 128, 5))
            low, high = (min(x, y), max(x, y)) if trial % 4 == 0 else (-128, 127)
            c = fields(za=za, zb=zb, zo=zo, ma=ma, mb=mb, shift=shift, low2=low, high2=high)
            c["op"] = PostOp[kind.upper()]
            setup.set(ctx, 1, shift)
            await ctx.tick()
            setup.set(ctx, 0, int(rng.integers(64)))
            ctx.set(dut.cmd, c)
            for i in range(vectors + latency):
                a, b = rng.integers(-128, 128, (2, lanes)).astype(np.int8)
                if i % 2:
                    b[: lanes // 2] = zb
                packed = (int.from_bytes(x.tobytes(), "little") for x in (a, b))
                operands.set(ctx, i < vectors, *packed)
                if ctx.get(dut.o_valid):
                    got.append(ctx.get(dut.o))
                if i < vectors:
                    r = combine(
                        kind,
                        a,
                        b,
                        za=za,
                        zb=zb,
                        zo=zo,
                        ma=ma,
                        mb=mb,
                        shift=shift,
                        low=low,
                        high=high,
                    )
                    expected.append(int.from_bytes(r.tobytes(), "little"))
                    da, db = a.astype(np.int64) - za, b.astype(np.int64) - zb
                    total = da * ma + db * (mb if kind == "add" else -mb)
                    total = da * db * ma if kind == "mul" else total
                    ties += int((total & ((1 << shift) - 1) == 1 << (shift - 1)).sum())
                await ctx.tick()

    design.run(bench)
    assert got == expected and ties > 800


def tensor(name: str, area: int, width: int, height: int) -> dict[str, int]:
    base = PARAM_AREA + AREA * area
    return {name: base, f"{name}_pitch": width, f"{name}_block": width * height}


def test_rates():
    """Words a cycle of every kind, across rows, and cycles before the first word."""
    config = Config.sized(8, 8)
    words = 60
    common = {"out_w": 6, "out_h": 10, "ma": 1 << 20, "mb": 3 << 19, "shift": 21}
    for n, area in (("out", 0), ("a", 1), ("b", 2)):
        common |= tensor(n, area, 6, 10)
    for source, op, lut in KINDS:
        pace = 2 if source == PostSource.SCRATCHPAD and op != PostOp.NONE else 1
        r = run(config, [fields(source=source, op=op, lut=lut, **common)], seed=2)
        assert r.accepted == [0]
        assert len(r.written) == words
        assert r.written[-1] - r.written[0] == pace * (words - 1), (source, op)
        assert r.retired == [r.written[-1] + POST_RETIRE]
        if source == PostSource.ACCUMULATOR:
            table = TABLE_BYTES // 8 if lut else 0
            assert r.read[0] == config.param_words + table + 3
            assert r.written[0] - r.read[0] == POST_DEPTH[op] - POST_RETIRE + (
                PostTable.LATENCY if lut else 0
            )
        assert r.stalled == 0


@pytest.mark.parametrize("op", [PostOp.ADD, PostOp.SUB, PostOp.MUL])
def test_one_operand_for_all(op: PostOp):
    """One ``b`` for the image is read once for every group."""
    config = Config.sized(16, 8)
    common = {"out_w": 6, "out_h": 10, "groups": 4, "ma": 1 << 20, "mb": 3 << 19, "shift": 21}
    for n, area in (("out", 0), ("a", 1), ("b", 2)):
        common |= tensor(n, area, 6, 10)
    common |= {"b_step": 0, "b_pitch": 0}
    r = run(config, [fields(source=PostSource.SCRATCHPAD, op=op, lut=False, **common)], seed=2)
    assert len(r.written) == 240
    assert r.written[-1] - r.written[0] == 4 * 61 - 2


def test_groups_hide_their_parameters():
    """Between groups no cycle is lost when a group has at least ``param_words`` + 2 words."""
    config = Config.sized(8, 32)
    assert config.groups == 4
    c = fields(groups=4, out_w=config.param_words + 2, **tensor("out", 0, 10, 1))
    r = run(config, [c], seed=3)
    assert r.read[-1] - r.read[0] == 4 * (config.param_words + 2) - 1


def test_one_word_groups():
    """Parameters of one word change faster than the requantisation can take them in."""
    config = Config.sized(32, 12)
    assert config.param_words == 1 and config.groups == 3
    commands = [
        fields(groups=3 - i % 3, acc=i, params=5 * i, zero=i, **tensor("out", 0, 1, 1))
        for i in range(12)
    ]
    run(config, commands, seed=8)


def test_next_command_follows():
    """Accumulators to scratchpad: one cycle between commands, parameters included. Every other
    command waits for the writes before it; its parameters are already there."""
    config = Config.sized(8, 8)
    plain = fields(out_w=12, **tensor("out", 0, 12, 1))
    r = run(config, [plain] * 4, seed=4)
    assert r.read[-1] - r.read[0] == 4 * 12 - 1 + 3
    adds = plain | {"op": PostOp.ADD, "ma": 1, "mb": 1} | tensor("b", 0, 12, 1)
    r = run(config, [plain, adds], seed=4)
    assert r.accepted[1] == r.retired[0]
    assert r.read[12] == r.accepted[1] + 2


def test_stalls_cost_what_they_refuse():
    """Random refusals at a quarter of the requests must not cost much more than a third."""
    config = Config.sized(8, 8)
    common = tensor("out", 0, 64, 4) | tensor("b", 1, 64, 4)
    for op in PostOp:
        c = fields(op=op, out_w=64, out_h=4, ma=1 << 10, mb=1 << 10, shift=11, **common)
        r = run(config, [c], seed=5, refuse=0.25)
        assert r.written[-1] - r.written[0] < 256 * 1.45
