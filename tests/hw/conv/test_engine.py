"""The CONV engine against a numpy reading of the command set, and its promised cycle counts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from systole.hw.conv.engine import ConvEngine
from systole.isa import COMMANDS, Config, Opcode
from systole.isa.timing import array_lead, conv_lead
from tests.helpers.simulation import Inputs, put, simulation

FIELDS = {f.name: f for f in COMMANDS[Opcode.CONV].fields}


def small(rows: int, cols: int, cell: int, inner_product: str = "plain", **fields: bool) -> Config:
    """A configuration with memories small enough to collide often, none a power of two."""
    return Config(
        rows=rows,
        cols=cols,
        cell=cell,
        scratchpad_bytes=rows * 4 * 75,
        weight_bytes=rows * cols * 13,
        accumulator_bytes=2 * 44 * 4 * cols,
        inner_product=inner_product,
        **fields,
    )


CONFIGS = [small(4, 4, 1), small(4, 4, 4), small(8, 4, 2), small(12, 20, 4), small(7, 5, 8)]
CONFIGS += [small(*shape, "fast") for shape in ((4, 4, 1), (8, 4, 2), (12, 20, 4))]
CONFIGS += [small(8, 4, 2, product, zero_points=True) for product in ("plain", "fast")]
CONFIGS += [small(4, 4, 4, product, zero_points=True) for product in ("plain", "fast")]
IDS = [
    f"{c.rows}x{c.cols}c{c.cell}{c.fast * ' fast'}{c.zero_points * ' zero points'}" for c in CONFIGS
]


def conv(**values: int) -> dict[str, int]:
    """A command: one tile, one output, unless told otherwise."""
    ones = ("blocks", "out_w", "out_h", "kernel_w", "kernel_h")
    ones += ("stride_x", "stride_y", "dilation_x", "dilation_y", "in_w", "in_h")
    return dict.fromkeys(FIELDS, 0) | dict.fromkeys(ones, 1) | values


def outputs(cmd: dict[str, int]) -> int:
    return cmd["out_w"] * cmd["out_h"]


def tiles(cmd: dict[str, int]) -> int:
    return cmd["blocks"] * cmd["kernel_w"] * cmd["kernel_h"]


class Model:
    """The memories, and CONV as ``isa.commands`` words it."""

    def __init__(self, config: Config, rng: np.random.Generator):
        self.config = config
        self.scratchpad = rng.integers(-128, 128, (config.scratchpad_words, config.rows))
        self.weights = rng.integers(-128, 128, (config.weight_words, config.cols))
        self.acc = np.zeros((config.acc_words, config.cols), np.int64)
        self.padded = 0

    def x(self, cmd: dict[str, int], b: int, y: int, x: int) -> np.ndarray:
        if 0 <= x < cmd["in_w"] and 0 <= y < cmd["in_h"]:
            word = cmd["src"] + b * cmd["src_block"] + y * cmd["src_pitch"] + x
            return self.scratchpad[word]
        self.padded += 1
        return np.full(self.config.rows, cmd["pad"])

    def run(self, cmd: dict[str, int]) -> np.ndarray:
        """Execute; returns the accumulator words the command wrote, as uint32."""
        rows = self.config.rows
        target = self.acc[cmd["acc"] : cmd["acc"] + outputs(cmd)]
        if not cmd["accumulate"]:
            target[:] = 0
        tile = 0
        for b in range(cmd["blocks"]):
            for ky in range(cmd["kernel_h"]):
                for kx in range(cmd["kernel_w"]):
                    first = cmd["weights"] + tile * rows
                    w = self.weights[first : first + rows] - cmd["weight_zero"]
                    tile += 1
                    for oy in range(cmd["out_h"]):
                        for ox in range(cmd["out_w"]):
                            y = cmd["y0"] + oy * cmd["stride_y"] + ky * cmd["dilation_y"]
                            x = cmd["x0"] + ox * cmd["stride_x"] + kx * cmd["dilation_x"]
                            value = self.x(cmd, b, y, x) - cmd["input_zero"]
                            target[oy * cmd["out_w"] + ox] += value @ w
        return (target & 0xFFFF_FFFF).copy()


def random_command(config: Config, rng: np.random.Generator, half: int | None) -> dict[str, int]:
    """A legal command of up to 9 tiles; its accumulators lie in ``half`` if given."""

    def pick(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    cmd = conv(
        accumulate=pick(0, 1),
        blocks=pick(1, 3),
        kernel_w=pick(1, 3),
        kernel_h=pick(1, 2),
        out_w=pick(1, 6),
        out_h=pick(1, 4),
        stride_x=pick(1, 3),
        stride_y=pick(1, 3),
        dilation_x=pick(1, 3),
        dilation_y=pick(1, 3),
        in_w=pick(1, 8),
        in_h=pick(1, 8),
        x0=pick(-4, 3),
        y0=pick(-4, 3),
        pad=pick(-128, 127),
    )
    if config.zero_points:
        cmd["input_zero"], cmd["weight_zero"] = rng.choice([-128, 0, 127, pick(-128, 127)], 2)
    if tiles(cmd) > 9 or outputs(cmd) > config.acc_half:
        return random_command(config, rng, half)
    cmd["weights"] = pick(0, config.weight_words - tiles(cmd) * config.rows)
    cmd["src_pitch"] = cmd["in_w"] + pick(0, 3)
    used = (cmd["in_h"] - 1) * cmd["src_pitch"] + cmd["in_w"]
    cmd["src_block"] = used + pick(0, 5)
    cmd["src"] = pick(0, config.scratchpad_words - 2 * cmd["src_block"] - used)
    low, words = (
        (0, config.acc_words) if half is None else (half * config.acc_half, config.acc_half)
    )
    cmd["acc"] = low + pick(0, words - outputs(cmd))
    return cmd


class Bench:
    """Drives the engine: weights preloaded through ``weight_write``, then the commands, with
    random bubbles before commands (``gaps``) and refused scratchpad reads (``refuse``).

    ``drain``: commands use alternate halves, and each one's result is read in the cycles from its
    ``retire`` on, while the next command runs; the next one but one waits for that.
    Otherwise commands are sent as fast as they are taken, and all accumulators are read at the end.
    """

    def __init__(self, config: Config, *, seed: int = 0, gaps=0.0, refuse=0.0, drain=False):
        self.rng = np.random.default_rng(seed)
        self.config = config
        self._design = simulation(ConvEngine, config)
        self.dut = self._design.dut
        self.model = Model(config, self.rng)
        self.gaps, self.refuse, self.drain = gaps, refuse, drain
        self.accepted: list[int] = []
        self.retired: list[int] = []
        self.drained = 0
        self.refused = self.stalled = 0
        self.cycle = 0

    def run(self, commands: list[dict[str, int]], timeout: int = 40000) -> None:
        dut, model, rng = self.dut, self.model, self.rng
        expected = [model.run(cmd) for cmd in commands]
        cols = self.config.cols

        accumulator = Inputs(dut.accumulators.en, dut.accumulators.addr)
        weight = Inputs(dut.weight_write.valid, dut.weight_write.addr, dut.weight_write.data)
        answer = Inputs(dut.scratchpad.ready, dut.scratchpad.data)

        async def read(ctx, addr: int) -> np.ndarray:
            accumulator.set(ctx, 1, addr)
            await ctx.tick()
            accumulator.set(ctx, 0, addr)
            raw = ctx.get(dut.accumulators.data).to_bytes(4 * cols, "little")
            return np.frombuffer(raw, "<u4")

        async def issue(ctx):
            for addr, word in enumerate(model.weights):
                data = int.from_bytes(word.astype(np.int8).tobytes(), "little")
                weight.set(ctx, 1, addr, data)
                assert ctx.get(dut.weight_write.ready)
                await ctx.tick()
            weight.set(ctx, 0, 0, 0)
            for index, cmd in enumerate(commands):
                while rng.random() < self.gaps or (self.drain and self.drained < index - 1):
                    await ctx.tick()
                await put(ctx, dut.command.cmd, cmd)
                self.accepted.append(self.cycle - 1)

        async def scratchpad(ctx):
            data = 0
            port, command = dut.scratchpad, dut.command
            edge = ctx.tick().sample(port.valid, port.addr, command.stalled)
            refused: int | None = None
            while True:
                ready = rng.random() >= self.refuse
                answer.set(ctx, ready, data)
                _, _, valid, addr, stalled = await edge
                if refused is not None:
                    assert valid and addr == refused, "a refused read must be kept up"
                refused = addr if valid and not ready else None
                self.refused += refused is not None
                self.stalled += stalled
                word = rng.integers(-128, 128, self.config.rows)
                if valid and ready:
                    word = model.scratchpad[addr]
                data = int.from_bytes(word.astype(np.int8).tobytes(), "little")

        async def monitor(ctx):
            while self.drained < len(commands):
                if ctx.get(dut.command.retire):
                    self.retired.append(self.cycle)
                await ctx.tick()
                self.cycle += 1
                assert self.cycle < timeout, f"{len(self.retired)} of {len(commands)} retired"

        async def check(ctx):
            for index, (cmd, want) in enumerate(zip(commands, expected, strict=True)):
                while len(self.retired) <= index or self.retired[index] == self.cycle:
                    await ctx.tick()
                if self.drain:
                    for word in range(outputs(cmd)):
                        got = await read(ctx, cmd["acc"] + word)
                        assert (got == want[word]).all(), (index, word, cmd)
                self.drained += 1
            for word, want in enumerate(model.acc & 0xFFFF_FFFF):
                if want.any():
                    assert (await read(ctx, word) == want).all(), word

        self._design.run(monitor, issue, check, background=(scratchpad,))
        assert len(self.retired) == len(commands)
        assert self.stalled == self.refused


@pytest.mark.parametrize("drain", [False, True])
@pytest.mark.parametrize("refuse", [0.0, 0.4])
@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_random_commands(config: Config, refuse: float, drain: bool):
    rng = np.random.default_rng([config.rows, config.cell, int(refuse * 10), drain])
    bench = Bench(
        config, seed=int(rng.integers(1 << 30)), gaps=0.3 * drain, refuse=refuse, drain=drain
    )
    commands = [random_command(config, rng, i % 2 if drain else None) for i in range(12)]
    for half in (0, 1):
        # Define every word first, so that commands that accumulate have something to add to.
        start = conv(acc=half * config.acc_half, out_w=config.acc_half, pad=half, in_w=3)
        commands.insert(half, start)
    bench.run(commands)
    assert bench.model.padded > 0
    assert {cmd["accumulate"] for cmd in commands} == {0, 1}
    assert (bench.refused > 0) == (refuse > 0)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_next_command_adds_to_last_word(config: Config):
    """A command that starts on the word its predecessor ends on sees its sum."""
    bench = Bench(config)
    first = conv(out_w=5, in_w=5, src_pitch=5)
    last_word = conv(accumulate=1, acc=4, src=7, weights=config.rows)
    commands = [first, last_word | {"out_w": 3, "in_w": 3}, last_word | {"acc": 6}]
    commands += [last_word | {"acc": 6, "src": 9 + i, "blocks": 2} for i in range(3)]
    bench.run(commands)


def test_far_coordinates_are_padding():
    """Coordinates beyond 16 bits do not come round into the input."""
    config = dataclasses.replace(CONFIGS[0], accumulator_bytes=2 * 150 * 4 * 4)
    wide = conv(out_w=140, stride_x=255, x0=0x7FFF, in_w=3000, pad=3)
    high = conv(out_h=140, stride_y=255, y0=0x7FFF, in_h=3000, pad=-3, acc=config.acc_half)
    bench = Bench(config)
    bench.run([wide, high])
    assert bench.model.padded == 280


@pytest.mark.parametrize("config", CONFIGS[-4:], ids=IDS[-4:])
def test_extreme_operands_and_zero_points(config: Config):
    """The largest products there are, of either sign, in every lane."""
    bench = Bench(config)
    bench.model.scratchpad = np.where(bench.model.scratchpad < 0, -128, 127)
    bench.model.scratchpad[::2], bench.model.scratchpad[1::4] = -128, 127
    bench.model.weights[:] = -128
    bench.model.weights[config.rows : 2 * config.rows] = 127
    commands = [
        conv(out_w=6, in_w=6, blocks=2, input_zero=x, weight_zero=w, acc=6 * i)
        for i, (x, w) in enumerate((x, w) for x in (-128, 127) for w in (-128, 127))
    ]
    bench.run(commands)
    assert bench.model.acc.max() >= 255 * 255 * config.rows


@pytest.mark.parametrize("config", CONFIGS[:3] + CONFIGS[-2:], ids=IDS[:3] + IDS[-2:])
def test_cycles(config: Config):
    """One vector a cycle: no bubble between rows, tiles and commands; ``rows`` for a short tile."""
    rows = config.rows
    exact = conv(out_w=rows, in_w=rows, src_pitch=rows)
    wide = conv(out_w=rows, out_h=2, in_w=rows, in_h=2, src_pitch=rows, x0=-1, kernel_w=3)
    deep = exact | {"blocks": 5, "src_block": 3}
    short = conv(out_w=rows // 2, in_w=rows, blocks=4)
    single = conv(blocks=3)

    for cmd in (wide, deep, exact, short, single):
        alone = Bench(config)
        alone.run([cmd])
        array = alone.dut.array
        overhead = conv_lead(config) - 1 + array_lead(config) + array.latency(config.cols - 1)
        # The last tile need not last `rows` cycles: nothing follows it.
        cost = (tiles(cmd) - 1) * max(outputs(cmd), rows) + outputs(cmd)
        assert alone.retired[0] - alone.accepted[0] <= cost + overhead
        if outputs(cmd) >= rows:
            assert alone.retired[0] - alone.accepted[0] == cost + overhead

        commands = [exact, cmd, exact, exact, exact, cmd, cmd]
        bench = Bench(config)
        bench.run(commands)
        costs = [tiles(c) * max(outputs(c), rows) for c in commands]
        took = np.diff(bench.retired)
        assert took[:5].sum() <= sum(costs[1:6])
        if outputs(cmd) >= rows:
            assert took.tolist() == costs[1:]
