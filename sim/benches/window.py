"""cocotb bench of ``WindowEngine``: random commands against the model's scratchpad, compared whole
after every command."""

from __future__ import annotations

from collections import Counter
from typing import Any

import cocotb
import numpy as np

from systole.isa import Opcode, WindowOp
from systole.sim.benches.common import (
    CONFIG,
    Bench,
    Command,
    CommandDriver,
    Model,
    ReadServer,
    WriteServer,
    assert_equal,
    command,
)

COMMANDS = 24
SETS = 40
"""Parameter sets, from the scratchpad's word 0; no command writes them."""
TENSORS = SETS * CONFIG.window_param_words


def _random(rng: np.random.Generator) -> Command:
    """A command with any operation, legal or not; half of them on the fast 3x3 path."""
    op = WindowOp(rng.integers(len(WindowOp)))
    fast, packed = rng.random() < 0.5, op == WindowOp.IM2COL
    values: dict[str, int] = {}
    for axis, size in (("x", "w"), ("y", "h")):
        kernel = rng.integers(2, 4) if fast else rng.choice([1, 1, 2, 3, 5, 7])
        in_size = rng.integers(1, 40 if packed and axis == "x" else 12)
        values |= {
            f"kernel_{size}": kernel,
            f"stride_{axis}": rng.integers(1, kernel + 1) if fast else rng.integers(1, 4),
            f"dilation_{axis}": 1 if fast else rng.choice([1, 1, 2, 3]),
            f"out_{size}": rng.integers(1, 5),
            f"in_{size}": in_size,
            f"{axis}0": rng.integers(-5, 3),
        }
    words = -(-values["in_w"] // CONFIG.rows) if packed else values["in_w"]
    pitch, out_pitch = words + rng.integers(0, 3), values["out_w"] + rng.integers(0, 3)
    low, high = sorted(rng.integers(-128, 128, 2))
    return command(
        Opcode.WINDOW,
        op=op,
        blocks=1 if packed else rng.integers(1, 4),
        run=rng.choice([1, 3, 6, 9, 21]),
        src=rng.integers(TENSORS, CONFIG.scratchpad_words),
        src_pitch=pitch,
        src_block=values["in_h"] * pitch + 1,
        pad=rng.integers(-128, 128),
        out=rng.integers(TENSORS, CONFIG.scratchpad_words),
        out_pitch=out_pitch,
        out_block=values["out_h"] * out_pitch + rng.integers(0, 3),
        weights=rng.integers(TENSORS, CONFIG.scratchpad_words),
        params=rng.integers(0, SETS - 3) * CONFIG.window_param_words,
        zero=rng.integers(-128, 128),
        low=min(low, 0),
        high=max(high, 0),
        **values,
    )


def _kind(c: Command) -> str:
    """The operation, and whether it takes the fast path (as :class:`hw.window.walk.TapWalk` words
    its condition)."""
    if c.op == WindowOp.IM2COL:
        return c.op.name
    width = (c.out_w - 1) * c.stride_x + c.kernel_w
    fast = 2 <= width <= CONFIG.window_width and all(
        kernel <= CONFIG.window_kernel and stride <= kernel and (dilation == 1 or kernel == 1)
        for kernel, stride, dilation in (
            (c.kernel_w, c.stride_x, c.dilation_x),
            (c.kernel_h, c.stride_y, c.dilation_y),
        )
    )
    return f"{c.op.name} {'fast' if fast else 'general'}"


@cocotb.test()
async def window_random(dut: Any) -> None:
    """Every operation both ways, with refused reads and writes."""
    bench = Bench(dut)
    await bench.reset()
    model = Model(bench.rng)
    model.fill_parameters(bench.rng, TENSORS, CONFIG.window_param_words, CONFIG.rows, 34)
    expected = model.memories.scratchpad
    actual = expected.copy()

    def check(c: Command) -> None:
        model.execute(c)
        assert_equal(actual, expected, c)

    commands = model.draw(bench.rng, COMMANDS, _random)
    driver = CommandDriver(bench, "window", commands, check)
    read = ReadServer(bench, "window__scratchpad_read", actual)
    write = WriteServer(bench, "window__scratchpad_write", actual, CONFIG.lanes)
    await bench.run(read, write, driver, until=driver.done, timeout=60_000)
    assert read.refused > 20 and write.refused > 20
    kinds = Counter(_kind(c) for c in commands)
    assert len(kinds) >= 6, kinds
