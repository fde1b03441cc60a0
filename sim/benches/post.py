"""cocotb bench of ``PostEngine``: random commands; after each, the whole scratchpad must equal the
model's."""

from __future__ import annotations

import itertools

import cocotb
import numpy as np

from systole.isa import Opcode, PostOp, PostSource
from systole.isa.commands import TABLE_BYTES
from systole.sim.benches.common import (
    Agent,
    Bench,
    Command,
    CommandDriver,
    Model,
    ReadServer,
    WriteServer,
    assert_equal,
    command,
    pack,
    pick,
)
from systole.sim.benches.environment import CONFIG, Handle

COMMANDS = 48
PARAMS_END = CONFIG.scratchpad_words // 4
TENSORS = PARAMS_END + 2 * -(-TABLE_BYTES // CONFIG.rows)
"""Words below hold parameters and, from ``PARAMS_END``, tables; no command writes them."""
KINDS = list(itertools.product(PostSource, PostOp, (0, 1)))
"""Source, operation, table."""


class AccumulatorModel(Agent):
    """Accumulators that show a word in exactly the cycle after it was asked for."""

    def __init__(self, bench: Bench, words: np.ndarray):
        super().__init__(bench, "post__accumulators", "en addr data")
        self.words = words
        self.word: np.ndarray | None = None

    def drive(self) -> None:
        junk = self.rng.integers(-128, 128, 4 * CONFIG.cols, np.int8)
        self.data.value = pack(junk if self.word is None else self.word)

    def sample(self) -> None:
        self.word = self.words[int(self.addr.value)] if self.en.value else None


def _random(rng: np.random.Generator) -> Command:
    """A command of any kind, legal or not."""
    source, op, lut = KINDS[pick(rng, 0, len(KINDS))]
    places = CONFIG.rows // CONFIG.lanes
    w, h, step = pick(rng, 1, 8), pick(rng, 1, 5), int(rng.choice([1, 1, 2, 3]))
    from_scratchpad = source == PostSource.SCRATCHPAD
    groups = pick(rng, 1, 2 * places + 2 if from_scratchpad else CONFIG.groups + 1)
    values: dict[str, int] = {}
    for name in ("out", "a", "b"):
        pitch = w * (step if name == "out" else 1) + pick(rng, 0, 3)
        values[name] = pick(rng, TENSORS, CONFIG.scratchpad_words)
        values[f"{name}_pitch"] = pitch
        values[f"{name}_block"] = h * pitch + pick(rng, 0, 3)
    if rng.random() < 0.2:  # in place
        step = 1
        values |= {f"out{part}": values[f"a{part}"] for part in ("", "_pitch", "_block")}
    if rng.random() < 0.3:  # one word of b for a row or for the image
        values |= {"b_step": 0, "b_pitch": values["b_pitch"] * pick(rng, 0, 2)}
    else:
        values["b_step"] = 1
    for end in ("", "2"):
        clamped = rng.random() < 0.4
        low, high = sorted(rng.integers(-128, 128, 2).tolist()) if clamped else (-128, 127)
        values |= {f"low{end}": low, f"high{end}": high}
    values |= {name: pick(rng, -128, 128) for name in ("zero", "za", "zb", "zo")}
    shift = pick(rng, 1, 64) if rng.random() < 0.2 else pick(rng, 12, 26)
    for name in ("ma", "mb"):
        # Powers of two make ties.
        any_ = rng.random() < 0.5
        values[name] = pick(rng, 0, 1 << 24) if any_ else 1 << max(0, min(shift, 24) - 1)
    return command(
        Opcode.POST,
        source=source,
        op=op,
        lut=lut,
        acc=pick(rng, 0, CONFIG.acc_words),
        groups=groups,
        lane=pick(rng, 0, places),
        out_w=w,
        out_h=h,
        out_step=step,
        params=pick(rng, 0, PARAMS_END // CONFIG.param_words - groups + 1) * CONFIG.param_words,
        shift=shift,
        table=pick(rng, PARAMS_END, TENSORS - TABLE_BYTES // CONFIG.rows),
        **values,
    )


@cocotb.test()
async def post_random(dut: Handle) -> None:
    """Covers every source, operation and table, in place and broadcast, with refused reads and
    writes."""
    bench = await Bench.started(dut)
    model = Model(bench.rng)
    model.fill_parameters(bench.rng, PARAMS_END, CONFIG.param_words, CONFIG.lanes, 40)
    expected, kinds = model.memories.scratchpad, set()
    actual = expected.copy()

    def check(c: Command) -> None:
        model.execute(c)
        assert_equal(actual, expected, c)
        kinds.add((c.source, c.op, c.lut))

    for pause in (0.0, 0.9):
        commands = model.draw(bench.rng, COMMANDS // 2, _random)
        driver = CommandDriver(bench, "post", commands, check, pause)
        read = ReadServer(bench, "post__scratchpad_read", actual)
        write = WriteServer(bench, "post__scratchpad_write", actual, CONFIG.written_lanes)
        accumulators = AccumulatorModel(bench, model.memories.accumulators)
        await bench.run(read, write, accumulators, driver, until=driver.done)
        assert read.refused > 20 and write.refused > 20 and driver.stalls > 20
    assert len(kinds) >= len(KINDS) - 4, f"only {sorted(kinds)}"
