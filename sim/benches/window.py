"""cocotb bench of ``WindowEngine``: random commands; after each, the whole scratchpad must equal
the model's."""

from __future__ import annotations

from collections import Counter

import cocotb
import numpy as np

from systole.isa import Opcode, WindowOp
from systole.isa.commands import ROW_OPS
from systole.isa.params import NORMALISE_PARAMS, ROW_PARAM_BYTES, SOFTMAX_PARAMS, pack
from systole.isa.timing import WindowShape
from systole.sim.benches.common import (
    Bench,
    Command,
    CommandDriver,
    Model,
    ReadServer,
    WriteServer,
    assert_equal,
    command,
    pick,
)
from systole.sim.benches.environment import CONFIG, Handle

COMMANDS = 24
SETS = 40
"""Parameter sets, from the scratchpad's word 0; no command writes them."""
TENSORS = SETS * CONFIG.window_param_words

POINTWISE = [f"{n}_{a}" for n in ("stride", "dilation") for a in "xy"] + ["kernel_w", "kernel_h"]


def _random(rng: np.random.Generator) -> Command:
    """A command with any operation, legal or not; half of them on the fast path."""
    if CONFIG.row_ops and rng.random() < 0.3:
        return _random_row(rng)
    op = WindowOp(pick(rng, 0, len(WindowOp) - len(ROW_OPS)))
    fast, packed = rng.random() < 0.5, op == WindowOp.IM2COL
    values: dict[str, int] = {}
    for axis, size in (("x", "w"), ("y", "h")):
        kernel = (
            pick(rng, 2, CONFIG.window_kernel + 1) if fast else int(rng.choice([1, 1, 2, 3, 5, 7]))
        )
        in_size = pick(rng, 1, 40 if packed and axis == "x" else 12)
        values |= {
            f"kernel_{size}": kernel,
            f"stride_{axis}": pick(rng, 1, min(kernel, 3) + 1) if fast else pick(rng, 1, 4),
            f"dilation_{axis}": 1 if fast else int(rng.choice([1, 1, 2, 3])),
            f"out_{size}": pick(rng, 1, 5),
            f"in_{size}": in_size,
            f"{axis}0": pick(rng, -5, 3),
        }
    words = -(-values["in_w"] // CONFIG.rows) if packed else values["in_w"]
    pitch, out_pitch = words + pick(rng, 0, 3), values["out_w"] + pick(rng, 0, 3)
    low, high = sorted(rng.integers(-128, 128, 2).tolist())
    return command(
        Opcode.WINDOW,
        op=op,
        blocks=1 if packed else pick(rng, 1, 4),
        run=int(rng.choice([1, 3, 6, 9, 21])),
        src=pick(rng, TENSORS, CONFIG.scratchpad_words),
        src_pitch=pitch,
        src_block=values["in_h"] * pitch + 1,
        pad=pick(rng, -128, 128),
        out=pick(rng, TENSORS, CONFIG.scratchpad_words),
        out_pitch=out_pitch,
        out_block=values["out_h"] * out_pitch + pick(rng, 0, 3),
        weights=pick(rng, TENSORS, CONFIG.scratchpad_words),
        params=pick(rng, 0, SETS - 3) * CONFIG.window_param_words,
        zero=pick(rng, -128, 128),
        low=min(low, 0),
        high=max(high, 0),
        **values,
    )


def _random_row(rng: np.random.Generator) -> Command:
    """A command with an operation on rows, legal or not. Its table or its channels' parameters are
    what stands behind its own."""
    positions, blocks = pick(rng, 1, 12), pick(rng, 1, 5)
    masks = {n: pick(rng, 0, 2) for n in ("causal", "masked", "mask_step")}
    return command(
        Opcode.WINDOW,
        op=ROW_OPS[pick(rng, 0, len(ROW_OPS))],
        blocks=blocks,
        **{name: 1 for name in POINTWISE},
        out_w=positions,
        out_h=1,
        src=pick(rng, TENSORS, CONFIG.scratchpad_words),
        src_block=positions + pick(rng, 0, 3),
        out=pick(rng, TENSORS, CONFIG.scratchpad_words),
        out_block=positions + pick(rng, 0, 3),
        weights=pick(rng, TENSORS, CONFIG.scratchpad_words),
        mask_block=pick(rng, 0, 20),
        features=pick(rng, 1, blocks * CONFIG.rows + 1),
        pad=pick(rng, -128, 128),
        zero=pick(rng, -128, 128),
        low=-128,
        high=127,
        **masks,
    )


def _place_row_parameters(words: np.ndarray) -> None:
    """Write own parameters, which both operations on rows can take, to word 0 and on."""
    own = pack(SOFTMAX_PARAMS, numerator=0xC0FFEE, shift=16)
    own |= pack(NORMALISE_PARAMS, epsilon=0, centred=1)
    content = np.frombuffer(own.to_bytes(ROW_PARAM_BYTES, "little"), np.int8)
    words.reshape(-1)[: len(content)] = content


def _kind(c: Command) -> str:
    """The operation and the path it takes."""
    if c.op == WindowOp.IM2COL or c.op in ROW_OPS:
        return c.op.name
    shape = WindowShape.of_command(vars(c))
    fast = "columns" if shape.by_columns else "square"
    return f"{c.op.name} {fast if shape.is_fast(CONFIG) else 'general'}"


@cocotb.test()
async def window_random(dut: Handle) -> None:
    """Covers every operation on the fast path, by squares and columns, on the general one, and
    those on rows, with refused reads and writes."""
    bench = await Bench.started(dut)
    model = Model(bench.rng)
    model.fill_parameters(bench.rng, TENSORS, CONFIG.window_param_words, CONFIG.rows, 34)
    if CONFIG.row_ops:
        _place_row_parameters(model.memories.scratchpad)
    expected = model.memories.scratchpad
    actual = expected.copy()

    def check(c: Command) -> None:
        model.execute(c)
        assert_equal(actual, expected, c)

    commands = model.draw(bench.rng, COMMANDS, _random)
    driver = CommandDriver(bench, "window", commands, check)
    read = ReadServer(bench, "window__scratchpad_read", actual)
    write = WriteServer(bench, "window__scratchpad_write", actual, CONFIG.written_lanes)
    await bench.run(read, write, driver, until=driver.done, timeout=60_000)
    assert read.refused > 20 and write.refused > 20
    kinds = Counter(_kind(c) for c in commands)
    assert len(kinds) >= 6 and any("columns" in kind for kind in kinds), kinds
