"""WindowEngine against the command's definition in ``isa.commands``, in numpy; its rates."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from systole.hw.window.engine import WindowEngine
from systole.isa import COMMANDS, Config, Opcode, WindowOp
from systole.isa.commands import ROW_OPS
from systole.isa.numerics import requantise
from systole.isa.timing import WINDOW_GAP, window_walk_start
from tests.helpers.simulation import Inputs, simulation

SOURCE, WEIGHTS, PARAMS, OUT, WORDS = 0, 4096, 8192, 9216, 16384
"""Areas of the scratchpad, in words."""
BLOCK_PARAMS = 8
RANDOM = 9
"""Random commands of a test."""

OPS = [op for op in WindowOp if op not in ROW_OPS]
"""Operations over windows; those on rows are in ``test_rows``."""
SHAPES = [(4, 4), (8, 8), (6, 10)]
LARGE = pytest.param((12, 20), marks=pytest.mark.long)

AROUND = 28
"""Cycles of set-up and pipeline around a command's words, at most; IM2COL takes five more."""


def seed_of(shape: tuple[int, int], op: WindowOp) -> int:
    """The seed of a test's random commands."""
    return 100 * shape[0] + op + 1


def shape_of(rows: int, cols: int) -> Config:
    return Config.sized(rows, cols, window_width=16, scratchpad_bytes=WORDS * rows)


def fields(**values: int) -> dict[str, int]:
    """A whole WINDOW command; fields not named get the value of a plain one-word command."""
    out = {f.name: 0 for f in COMMANDS[Opcode.WINDOW].fields}
    ones = ("blocks", "run", "out_w", "out_h", "kernel_w", "kernel_h", "stride_x", "stride_y")
    out |= dict.fromkeys(ones + ("dilation_x", "dilation_y", "in_w", "in_h", "src_pitch"), 1)
    out |= {"src": SOURCE, "weights": WEIGHTS, "params": PARAMS, "out": OUT}
    return out | {"low": -128, "high": 127} | values


class Scratchpad:
    """The scratchpad's content and the reference that executes a command on it."""

    def __init__(self, config: Config, rng: np.random.Generator):
        self.rows = config.rows
        self.words = rng.integers(-128, 128, (WORDS, config.rows)).astype(np.int8)
        bias = rng.integers(-1000, 1000, (OUT - PARAMS) // BLOCK_PARAMS * config.rows)
        multiplier = rng.integers(1 << 23, 1 << 24, bias.shape)
        shift = rng.integers(30, 38, bias.shape)
        packed = bias & 0xFFFF_FFFF | multiplier << 32 | shift << 56
        self.words[PARAMS:OUT] = packed.astype("<u8").view(np.int8).reshape(-1, config.rows)
        self.params = [a.reshape(-1, config.rows) for a in (bias, multiplier, shift)]

    def execute(self, c: dict[str, int]) -> None:
        if c["op"] == WindowOp.IM2COL:
            self._im2col(c)
        else:
            self._reduce(c)

    def _reduce(self, c: dict[str, int]) -> None:
        taps = [(ky, kx) for ky in range(c["kernel_h"]) for kx in range(c["kernel_w"])]
        for b in range(c["blocks"]):
            first = c["weights"] + b * len(taps)
            w = self.words[first : first + len(taps)].astype(np.int64) - c["weight_zero"]
            params = [p[(c["params"] - PARAMS) // BLOCK_PARAMS + b] for p in self.params]
            for oy in range(c["out_h"]):
                for ox in range(c["out_w"]):
                    x = np.full((len(taps), self.rows), c["pad"], np.int64)
                    for i, (ky, kx) in enumerate(taps):
                        iy = c["y0"] + oy * c["stride_y"] + ky * c["dilation_y"]
                        ix = c["x0"] + ox * c["stride_x"] + kx * c["dilation_x"]
                        if 0 <= iy < c["in_h"] and 0 <= ix < c["in_w"]:
                            x[i] = self.words[
                                c["src"] + b * c["src_block"] + iy * c["src_pitch"] + ix
                            ]
                    if c["op"] == WindowOp.MAX:
                        y = np.clip(x.max(axis=0), c["low"], c["high"])
                    else:
                        acc = (x * (w if c["op"] == WindowOp.DEPTHWISE else 1)).sum(axis=0)
                        y = requantise(acc, *params, zero=c["zero"], low=c["low"], high=c["high"])
                    self.words[c["out"] + b * c["out_block"] + oy * c["out_pitch"] + ox] = y

    def _im2col(self, c: dict[str, int]) -> None:
        for oy in range(c["out_h"]):
            for ox in range(c["out_w"]):
                column: list[int] = []
                for ky in range(c["kernel_h"]):
                    iy = c["y0"] + oy * c["stride_y"] + ky * c["dilation_y"]
                    row = self.words[c["src"] + iy * c["src_pitch"] :].reshape(-1)
                    for kx in range(c["kernel_w"]):
                        start = c["x0"] + ox * c["stride_x"] + kx * c["dilation_x"]
                        for ix in range(start, start + c["run"]):
                            inside = 0 <= iy < c["in_h"] and 0 <= ix < c["in_w"]
                            column.append(row[ix] if inside else c["pad"])
                column += [c["pad"]] * (-len(column) % self.rows)
                for t, word in enumerate(np.array(column, np.int8).reshape(-1, self.rows)):
                    at = c["out"] + t * c["out_block"] + oy * c["out_pitch"] + ox
                    self.words[at] = word


def run(
    config: Config,
    commands: list[dict[str, int]],
    *,
    seed: int = 0,
    read_stall: float = 0.0,
    write_stall: float = 0.0,
    extreme: bool = False,
    content: Scratchpad | None = None,
) -> list[int]:
    """Executes the commands on engine and reference; asserts that the scratchpads agree.
    ``extreme``: all input and weights are -128 or 127, most of a word alike. ``content``: what is
    in the scratchpad; random by default.

    Returns the cycles from the first command's acceptance to the ``retire`` of each.
    """
    rng = np.random.default_rng(seed)
    expected = content or Scratchpad(config, rng)
    if extreme:
        expected.words[:PARAMS] = np.where(expected.words[:PARAMS] < 100, -128, 127)
        expected.words[WEIGHTS:PARAMS] = -1 - expected.words[WEIGHTS:PARAMS]
    actual = expected.words.copy()
    for c in commands:
        expected.execute(c)
    design = simulation(WindowEngine, config)
    dut = design.dut
    port, read, write = dut.command, dut.scratchpad_read, dut.scratchpad_write
    cycles: list[int] = []
    accepted: int | None = None

    async def bench(ctx):
        nonlocal accepted
        waiting = list(commands)
        ctx.set(port.cmd.payload, waiting[0])
        now = data = 0
        refused_before = False
        inputs = Inputs(port.cmd.valid, read.ready, write.ready, read.data)
        edge = ctx.tick().sample(
            *(port.cmd.ready, port.retire, port.stalled, read.valid, read.addr),
            *(write.valid, write.addr, write.data, write.mask),
        )
        while len(cycles) < len(commands):
            offered = bool(waiting) and rng.random() < 0.9
            read_ready = rng.random() >= read_stall
            write_ready = rng.random() >= write_stall
            inputs.set(ctx, offered, read_ready, write_ready, data)
            _, _, ready, retire, stalled, reads, address, writes, target, word, mask = await edge
            now += 1
            assert now < 60_000, "timeout"
            read_refused, write_refused = reads and not read_ready, writes and not write_ready
            # The pipeline learns of a refused write in the cycle after.
            assert read_refused <= stalled <= (read_refused or refused_before)
            refused_before = write_refused
            if offered and ready:
                waiting.pop(0)
                ctx.set(port.cmd.payload, waiting[0] if waiting else fields())
                accepted = now if accepted is None else accepted
            if retire:
                cycles.append(now - accepted)
            if reads and read_ready:
                row = actual[address]
            else:
                row = rng.integers(-128, 128, config.rows).astype(np.int8)
            data = int.from_bytes(row.tobytes(), "little")
            if writes and write_ready:
                new = np.frombuffer(word.to_bytes(config.rows, "little"), np.int8)
                parts = mask >> np.arange(config.word_parts) & 1 == 1
                assert parts.any() and (config.window_passes > 1 or parts.all())
                written = parts.repeat(config.written_lanes)
                actual[target, written] = new[written]

    design.run(bench)
    wrong = np.flatnonzero((actual != expected.words).any(axis=1))
    assert not len(wrong), (
        f"words {wrong[:8]} differ: {actual[wrong[0]]} {expected.words[wrong[0]]}"
    )
    return cycles


def random_reduction(rng: np.random.Generator, config: Config, op: WindowOp) -> dict[str, int]:
    """A legal DEPTHWISE, SUM or MAX command of few taps in all."""

    fast, small = rng.random() < 0.7, rng.random() < 0.5

    def axis(most: int) -> tuple[int, int, int, int]:
        if fast:
            kernel = int(rng.integers(2, 4 if small else config.window_kernel + 1))
            dilation = int(rng.integers(1, (config.window_kernel - 1) // (kernel - 1) + 1))
            stride = int(rng.integers(1, kernel + 1))
            # Rows that the line memory holds, or one word more.
            most = (config.window_width - (kernel - 1) * dilation) // stride + 1
            return kernel, stride, dilation, int(rng.integers(1, min(most, 6) + 1))
        kernel = int(rng.choice([1, 2, 3, 3, 3, 4, 5, 7, 11]))
        stride = int(rng.integers(1, 5 if rng.random() < 0.5 else 2))
        dilation = int(rng.choice([1, 1, 1, 2, 3]))
        return kernel, stride, dilation, int(rng.integers(1, max(1, most // kernel) + 1))

    kernel_w, stride_x, dilation_x, out_w = axis(24)
    kernel_h, stride_y, dilation_y, out_h = axis(16)
    in_w, in_h = (int(n) for n in rng.integers(1, 20, 2))
    pitch = in_w + int(rng.integers(0, 3))
    out_pitch = out_w + int(rng.integers(0, 3))
    low, high = sorted(int(n) for n in rng.integers(-128, 128, 2))
    return fields(
        op=op,
        blocks=int(rng.integers(1, 4)),
        src=SOURCE + int(rng.integers(100)),
        src_pitch=pitch,
        src_block=in_h * pitch + 1,
        in_w=in_w,
        in_h=in_h,
        x0=int(rng.integers(-5, 3)),
        y0=int(rng.integers(-5, 3)),
        out_w=out_w,
        out_h=out_h,
        kernel_w=kernel_w,
        kernel_h=kernel_h,
        stride_x=stride_x,
        stride_y=stride_y,
        dilation_x=dilation_x,
        dilation_y=dilation_y,
        pad=int(rng.integers(-128, 128)),
        out_pitch=out_pitch,
        out_block=out_h * out_pitch + 2,
        out=OUT + int(rng.integers(4000)),
        weights=WEIGHTS + int(rng.integers(1000)),
        params=PARAMS + BLOCK_PARAMS * int(rng.integers(100)),
        zero=int(rng.integers(-128, 128)),
        low=min(low, 0),
        high=max(high, 0),
        weight_zero=int(rng.choice([-128, -1, 5, 127])) if config.zero_points else 0,
    )


def random_im2col(rng: np.random.Generator, config: Config) -> dict[str, int]:
    kernel_w, kernel_h = int(rng.choice([1, 1, 3])), int(rng.choice([1, 3, 5]))
    out_w, out_h = (int(n) for n in rng.integers(1, 5, 2))
    in_w, in_h = int(rng.integers(10, 80)), int(rng.integers(4, 12))
    pitch = -(-in_w // config.rows) + int(rng.integers(0, 2))
    return fields(
        op=WindowOp.IM2COL,
        run=int(rng.choice([1, 3, 6, 9, 21, 8, 12])),
        src=SOURCE + int(rng.integers(100)),
        src_pitch=pitch,
        in_w=in_w,
        in_h=in_h,
        x0=int(rng.integers(-15, 8)),
        y0=int(rng.integers(-3, 3)),
        out_w=out_w,
        out_h=out_h,
        kernel_w=kernel_w,
        kernel_h=kernel_h,
        stride_x=int(rng.integers(1, 20)),
        stride_y=int(rng.integers(1, 4)),
        dilation_x=int(rng.integers(1, 20)),
        dilation_y=int(rng.integers(1, 3)),
        pad=int(rng.integers(-128, 128)),
        out_pitch=out_w,
        out_block=out_w * out_h,
        out=OUT + int(rng.integers(1000)),
    )


@pytest.mark.parametrize("shape", [*SHAPES, LARGE])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kernel", [pytest.param(5, marks=pytest.mark.long), 7])
def test_random_commands(shape: tuple[int, int], op: WindowOp, kernel: int) -> None:
    config = dataclasses.replace(shape_of(*shape), window_kernel=kernel)
    seed = seed_of(shape, op)
    rng = np.random.default_rng(seed)
    if op == WindowOp.IM2COL:
        commands = [random_im2col(rng, config) for _ in range(16)]
    else:
        commands = [random_reduction(rng, config, op) for _ in range(RANDOM)]
    run(config, commands, seed=seed, read_stall=0.2, write_stall=0.3)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("shape", "lanes", "kernel"),
    [
        ((4, 4), 2, 7),
        pytest.param((4, 4), 1, 3, marks=pytest.mark.long),
        pytest.param((12, 20), 3, 7, marks=pytest.mark.long),
    ],
)
def test_random_commands_in_passes(shape, lanes, kernel, op) -> None:
    """Some channels of a block at a time. IM2COL still takes whole words."""
    options = {"window_lanes": lanes, "window_kernel": kernel}
    config = dataclasses.replace(shape_of(*shape), **options)
    seed = seed_of(shape, op) + lanes
    rng = np.random.default_rng(seed)
    make = random_im2col if op == WindowOp.IM2COL else random_reduction
    arguments = () if op == WindowOp.IM2COL else (op,)
    commands = [make(rng, config, *arguments) for _ in range(4)]
    run(config, commands, seed=seed, read_stall=0.2, write_stall=0.3)


@pytest.mark.parametrize("kernel", [3, pytest.param(5, marks=pytest.mark.long), 7])
@pytest.mark.parametrize("shape", [(4, 4), pytest.param((6, 10), marks=pytest.mark.long)])
def test_random_commands_with_zero_points(shape: tuple[int, int], kernel: int) -> None:
    """Of one zero point or another, in turn with sums and maxima, which have no weights."""
    config = dataclasses.replace(shape_of(*shape), window_kernel=kernel, zero_points=True)
    seed = seed_of(shape, WindowOp.DEPTHWISE) + kernel
    rng = np.random.default_rng(seed)
    ops = [WindowOp.DEPTHWISE] * 4 + [WindowOp.SUM, WindowOp.MAX]
    commands = [random_reduction(rng, config, ops[i % len(ops)]) for i in range(RANDOM)]
    run(config, commands, seed=seed, read_stall=0.2, write_stall=0.3)


WAYS = {
    "3x3": {},
    "5x5": {"kernel_w": 5, "kernel_h": 5},
    "7x7": {"kernel_w": 7, "kernel_h": 7},
    "dilated": {"dilation_x": 2, "dilation_y": 3},
    "stored": {"kernel_w": 3, "kernel_h": 3, "stride_x": 4},
    "again": {"kernel_w": 9, "kernel_h": 9, "out_w": 3, "out_h": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_extreme_weights_and_zero_points(way: str) -> None:
    """The widest products there are, of both signs; one command after the other, with other zero
    points."""
    config = dataclasses.replace(shape_of(4, 4), window_kernel=7, zero_points=True)
    command = square(6, op=WindowOp.DEPTHWISE, **WAYS[way])
    commands = [
        command | {"weight_zero": zero, "out": OUT + 50 * i}
        for i, zero in enumerate((127, -128, -128, 0))
    ]
    run(config, commands, seed=1, write_stall=0.5, extreme=True)


def is_fast(c: dict[str, int], config: Config) -> bool:
    """The documented condition of the fast way: for larger windows, then for an axis at a time."""
    width = (c["out_w"] - 1) * c["stride_x"] + span(c, "w")
    if max(span(c, "w"), span(c, "h")) > 5 and (
        c["kernel_h"] == 1 or max(c["stride_x"], c["stride_y"]) > 4 or c["out_w"] == c["out_h"] == 1
    ):
        return False
    return 2 <= width <= config.window_width and all(
        span(c, a) <= config.window_kernel
        and c[f"stride_{s}"] <= c[f"kernel_{a}"]
        and (
            (c[f"dilation_{s}"] == 1 or c[f"kernel_{a}"] == 1)
            or (config.window_kernel > 5 and c[f"out_{a}"] > c[f"dilation_{s}"] <= 3)
        )
        for a, s in ("wx", "hy")
    )


def span(c: dict[str, int], axis: str) -> int:
    """Positions from the first tap to the last of an axis, ``w`` or ``h``."""
    return (c[f"kernel_{axis}"] - 1) * c[f"dilation_{'x' if axis == 'w' else 'y'}"] + 1


def test_random_commands_cover_all_ways() -> None:
    config = dataclasses.replace(shape_of(4, 4), window_kernel=7)
    taken = set()
    for shape in SHAPES:
        for op in (WindowOp.DEPTHWISE, WindowOp.SUM, WindowOp.MAX):
            rng = np.random.default_rng(seed_of(shape, op))
            for _ in range(RANDOM):
                c = random_reduction(rng, config, op)
                fits = c["kernel_w"] * c["kernel_h"] <= config.window_width
                fast = "columns" if max(span(c, "w"), span(c, "h")) > 5 else "square"
                dilated = max(c["dilation_x"], c["dilation_y"]) > 1
                fast = f"dilated {fast}" if dilated else fast
                taken.add((op, fast if is_fast(c, config) else fits))
    ways = ("square", "columns", "dilated square", "dilated columns", True, False)
    assert taken == {(op, way) for op in list(WindowOp)[:3] for way in ways}


def square(size: int, **values: int) -> dict[str, int]:
    """A command over a ``size`` x ``size`` input with same-padding of a 3x3 kernel."""
    place = {"in_w": size, "in_h": size, "src_pitch": size, "out_w": size, "out_h": size}
    kernel = {"kernel_w": 3, "kernel_h": 3, "x0": -1, "y0": -1}
    return fields(**(place | kernel | {"out_pitch": size, "out_block": size * size} | values))


@pytest.mark.parametrize("op", [WindowOp.DEPTHWISE, WindowOp.SUM, WindowOp.MAX])
def test_fast_rate(op: WindowOp) -> None:
    """3x3 stride 1: one word of the padded region a cycle, 17 more for a block, some 20 in all."""
    blocks, size = 3, 14
    command = square(size, op=op, blocks=blocks, src_block=size * size)
    (cycles,) = run(shape_of(4, 4), [command])
    overhead = {WindowOp.DEPTHWISE: 17, WindowOp.SUM: 8, WindowOp.MAX: 0}[op]
    assert cycles <= blocks * ((size + 2) ** 2 + overhead) + AROUND


@pytest.mark.parametrize(
    "kernel_w, kernel_h, parts",
    [
        *((5, 5, 3), (4, 4, 3), (5, 3, 2), (5, 1, 2), (2, 5, 2)),
        # By columns, a cycle for each.
        *((7, 7, 7), (6, 6, 6), (7, 5, 7), (5, 7, 5), (1, 7, 1), (6, 2, 6), (3, 6, 3)),
    ],
)
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_large_kernel_rate(kernel_w: int, kernel_h: int, parts: int, stride: int) -> None:
    """One word of the padded region a cycle, and further parts of the window for every output."""
    out_w, out_h = 6, 5
    sizes = {"kernel_w": kernel_w, "kernel_h": kernel_h, "out_w": out_w, "out_h": out_h}
    strides = {"stride_x": min(stride, kernel_w), "stride_y": min(stride, kernel_h)}
    command = square(14, op=WindowOp.DEPTHWISE, **sizes, **strides)
    config = Config.sized(4, 4, window_kernel=7, window_width=32, scratchpad_bytes=4 * WORDS)
    (cycles,) = run(config, [command])
    width, height = (
        (n - 1) * s + k
        for n, s, k in zip((out_w, out_h), strides.values(), (kernel_w, kernel_h), strict=True)
    )
    words = width * height + (parts - 1) * out_w * out_h + kernel_w * kernel_h + 8
    assert words < cycles <= words + AROUND


@pytest.mark.parametrize("op", [WindowOp.DEPTHWISE, WindowOp.SUM, WindowOp.MAX])
@pytest.mark.parametrize(
    "kernel, dilation, parts", [((3, 3), (2, 2), 3), ((3, 3), (3, 3), 3), ((2, 4), (3, 2), 4)]
)
def test_dilated_rate(
    op: WindowOp, kernel: tuple[int, int], dilation: tuple[int, int], parts: int
) -> None:
    """As fast as an undilated kernel that spans as much; by columns, only the kernel's own."""
    config = Config.sized(4, 4, window_kernel=7, window_width=32, scratchpad_bytes=4 * WORDS)
    (kernel_h, kernel_w), (dilation_y, dilation_x), out = kernel, dilation, 8
    sizes = {"kernel_w": kernel_w, "kernel_h": kernel_h, "out_w": out, "out_h": out}
    command = square(12, op=op, dilation_y=dilation_y, dilation_x=dilation_x, **sizes)
    (cycles,) = run(config, [command, command | {"out": OUT + 100}])[:1]
    words = (out - 1 + span(command, "w")) * (out - 1 + span(command, "h"))
    words += (parts - 1) * out * out
    overhead = {WindowOp.DEPTHWISE: kernel_h * kernel_w + 8, WindowOp.SUM: 8, WindowOp.MAX: 0}[op]
    assert words < cycles <= words + overhead + AROUND


@pytest.mark.parametrize("op", [WindowOp.DEPTHWISE, WindowOp.SUM, WindowOp.MAX])
def test_small_window(op: WindowOp) -> None:
    """Configured for kernels of 3, larger ones take a cycle a tap."""
    config = dataclasses.replace(shape_of(4, 4), window_kernel=3)
    (fast,) = run(config, [square(8, op=op)])
    (general,) = run(config, [square(8, op=op, kernel_w=5, kernel_h=5)])
    assert fast < 150 and general > 25 * 64


@pytest.mark.parametrize(
    "values",
    [
        {"out_w": 1, "out_h": 1},
        {"out_w": 3, "out_h": 3, "stride_x": 5},
        {"out_w": 3, "out_h": 3, "stride_y": 5},
        {"kernel_h": 1},
        # Few outputs lie apart from each other.
        {"kernel_w": 3, "kernel_h": 3, "dilation_x": 3, "out_w": 3, "out_h": 6},
        {"kernel_w": 3, "kernel_h": 3, "dilation_y": 2, "out_w": 6, "out_h": 2},
        {"kernel_w": 2, "kernel_h": 2, "dilation_x": 4, "out_w": 6, "out_h": 6},
    ],
)
def test_columns_that_do_not_pay(values: dict[str, int]) -> None:
    """Kernels for which the fast way would be no gain take a cycle a tap."""
    config = Config.sized(4, 4, window_kernel=7, window_width=32, scratchpad_bytes=4 * WORDS)
    command = square(8, op=WindowOp.MAX, **{"kernel_w": 7, "kernel_h": 7} | values)
    taps = command["kernel_w"] * command["kernel_h"] * command["out_w"] * command["out_h"]
    (cycles,) = run(config, [command])
    assert taps < cycles <= taps + AROUND


@pytest.mark.parametrize("size", [4, pytest.param(8, marks=pytest.mark.long)])
def test_square_and_columns_take_turns(size: int) -> None:
    """Weights, ones and windows of one way leave nothing behind for the other."""
    config = Config.sized(4, 4, window_kernel=7, window_width=32, scratchpad_bytes=4 * WORDS)
    sizes = [(7, 7), (3, 3), (6, 7), (7, 3), (5, 5), (2, 6), (9, 9), (3, 2)]
    ops = [WindowOp.DEPTHWISE, WindowOp.SUM, WindowOp.DEPTHWISE, WindowOp.MAX]
    commands = [
        square(size, op=ops[i % 4], kernel_w=w, kernel_h=h, out=OUT + 100 * i, blocks=1 + i % 2)
        for i, (h, w) in enumerate(sizes * 2)
    ]
    # The same kernel with other dilations: it waits for the results under way.
    commands += [
        square(size, op=op, kernel_h=3, dilation_x=d, dilation_y=d, out=OUT + 2000 + 100 * d)
        for op in ops[1:]
        for d in (1, 2, 3, 1)
    ]
    run(config, commands, seed=3, read_stall=0.2, write_stall=0.3)


@pytest.mark.parametrize("window_width, tap", [(128, 1), (16, 2)])
def test_general_rate(window_width: int, tap: int) -> None:
    """One tap a cycle, or two cycles a tap with more taps than the line memory has words."""
    config = Config.sized(4, 4, window_width=window_width, scratchpad_bytes=4 * WORDS)
    place = {"out_w": 4, "out_h": 3, "blocks": 3, "src_block": 144}
    command = square(12, op=WindowOp.DEPTHWISE, kernel_w=7, kernel_h=5, **place)
    (cycles,) = run(config, [command])
    assert cycles <= 3 * (4 * 3 * 35 * tap + (35 if tap == 1 else 0) + 8) + AROUND


def packed(kernel: int, stride: int, out_w: int, out_h: int, **values: int) -> dict[str, int]:
    """IM2COL of three channels and a square kernel with same-padding, at 16 lanes."""
    width = stride * out_w
    return fields(
        op=WindowOp.IM2COL,
        run=3 * kernel,
        in_w=3 * width,
        in_h=stride * out_h,
        src_pitch=-(-3 * width // 16),
        x0=-3 * (kernel // 2),
        y0=-(kernel // 2),
        stride_x=3 * stride,
        stride_y=stride,
        dilation_x=3,
        **({"kernel_h": kernel, "out_w": out_w, "out_h": out_h, "out_pitch": out_w} | values),
        out_block=out_w * out_h,
        pad=-7,
    )


@pytest.mark.parametrize(
    "kernel, stride, values, words",
    [
        (3, 1, {}, 3),
        (3, 2, {}, 3),
        (3, 2, {"kernel_h": 1}, 1),
        (5, 4, {}, 6),  # 75 bytes: the last run ends in the next word
        (7, 2, {}, 15),  # 147 bytes: runs of 16 and 5, the last ends in the next word
    ],
)
def test_im2col_rate(kernel: int, stride: int, values: dict[str, int], words: float) -> None:
    """A run that is no longer than a word takes a cycle, once the words before are held."""
    out = 32
    command = packed(kernel, stride, out, 4, **values)
    (cycles,) = run(shape_of(16, 8), [command])
    first = 2 * command["kernel_h"] * 4  # runs of each row's first output
    assert words * out * 4 < cycles <= words * out * 4 + first + AROUND + 5


@pytest.mark.parametrize("op", OPS)
def test_commands_follow_each_other(op: WindowOp) -> None:
    """A command like the one before costs its words and the gap between the two."""
    count, size = 6, 8
    if op == WindowOp.IM2COL:
        command = packed(3, 2, 16, 2, kernel_h=1)
        words = 16 * 2 + 2
    else:
        command = square(size, op=op)
        words = (size + 2) ** 2 + {WindowOp.DEPTHWISE: 17, WindowOp.SUM: 8, WindowOp.MAX: 0}[op]
    commands = [command | {"out": OUT + 100 * i} for i in range(count)]
    cycles = run(shape_of(16, 16), commands)
    gap = WINDOW_GAP + window_walk_start(op)
    # The bench offers a command in nine of ten cycles.
    assert cycles[-1] - cycles[1] <= (count - 2) * (words + gap) + 3


@pytest.mark.parametrize("op", OPS)
def test_command_sees_earlier_writes(op: WindowOp) -> None:
    """Each command reads what the one before wrote, back to back."""
    size = 5
    first = square(size, op=WindowOp.MAX, out=OUT)
    second = square(size, op=op, src=OUT, out=OUT + 100, run=2)
    if op == WindowOp.IM2COL:
        second |= {"kernel_w": 1, "stride_x": 4, "out_w": 3, "out_block": 50}
    third = square(size, op=WindowOp.MAX, src=OUT + 100, out=OUT + 300)
    run(shape_of(4, 4), [first, second, third], seed=op)


@pytest.mark.parametrize(
    "op, field", [*((op, "src") for op in OPS), (WindowOp.DEPTHWISE, "weights")]
)
def test_command_sees_words_still_to_be_written(op: WindowOp, field: str) -> None:
    """A command that follows its like at once reads the very last words that it wrote."""
    if op == WindowOp.IM2COL:
        first = fields(op=op, run=8, in_w=64, out_w=4, stride_x=8, out_pitch=4, out_block=4)
    else:
        size = {"out_w": 4, "in_w": 4, "out_pitch": 4, "src_pitch": 4, "kernel_w": 1, "blocks": 2}
        first = fields(op=op, src_block=4, out_block=4, pad=3, **size)
    chain = [first]
    for i in range(1, 4):
        last = chain[-1]["out"] + 7 if op != WindowOp.IM2COL else chain[-1]["out"] + 3
        chain.append(first | {field: last - i, "out": OUT + 20 * i})
    run(shape_of(8, 8), chain, seed=op, write_stall=0.3)


@pytest.mark.parametrize("op", [WindowOp.DEPTHWISE, WindowOp.SUM, WindowOp.MAX])
def test_shortest_blocks(op: WindowOp) -> None:
    """One output of one tap in each of many blocks: parameters follow parameters closely."""
    command = fields(op=op, blocks=20, src_block=3, out_block=2)
    run(shape_of(8, 8), [command, command | {"src": 500, "x0": -1}], seed=1, write_stall=0.5)


def test_extreme_coordinates() -> None:
    """Windows far outside the input read ``pad`` only; offsets use the fields' whole range."""
    config = shape_of(4, 4)
    far = [
        fields(op=op, x0=x0, y0=y0, out_w=3, out_h=2, stride_x=255, stride_y=255, kernel_w=2, pad=5)
        for op in (WindowOp.MAX, WindowOp.IM2COL)
        for x0, y0 in ((-(1 << 15), -(1 << 15)), ((1 << 15) - 1, (1 << 15) - 1), (-255, -255))
    ]
    for c in far:
        c |= {"in_w": 100, "in_h": 100, "src_pitch": 40, "out_pitch": 3, "out_block": 6}
    # Rows and columns far into a large input.
    inside = {"in_w": 40, "in_h": 100, "src_pitch": 40, "x0": -510, "y0": -255, "stride_x": 255}
    far.append(fields(op=WindowOp.MAX, out_w=3, out_h=2, stride_y=255, out_pitch=3, **inside))
    wide = {"in_w": 160, "in_h": 100, "src_pitch": 40, "run": 7, "x0": -200, "stride_x": 201}
    far.append(fields(op=WindowOp.IM2COL, out_w=2, y0=90, out_block=2, **wide))
    run(config, far, seed=5, read_stall=0.3)
