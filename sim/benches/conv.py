"""cocotb bench of ``ConvEngine``: random commands, as fast as the engine takes them; its
accumulators must equal the model's."""

from __future__ import annotations

from collections import Counter

import cocotb
import numpy as np

from systole.isa import Opcode
from systole.sim.benches.common import (
    Agent,
    Bench,
    Command,
    CommandDriver,
    Model,
    ReadServer,
    assert_equal,
    command,
    pack,
    pick,
)
from systole.sim.benches.environment import CONFIG, Handle

COMMANDS = 30


class WeightAgent(Agent):
    """Writer of the whole weight buffer; the engine takes a word in every cycle."""

    def __init__(self, bench: Bench, weights: np.ndarray):
        super().__init__(bench, "conv__weight_write", "valid ready addr data")
        self.weights = weights
        self.at = 0

    def drive(self) -> None:
        self.valid.value = self.at < len(self.weights)
        if self.at < len(self.weights):
            self.addr.value = self.at
            self.data.value = pack(self.weights[self.at])

    def sample(self) -> None:
        assert self.ready.value
        self.at += 1


class AccumulatorReader(Agent):
    """Reader of all accumulators, into ``words``."""

    def __init__(self, bench: Bench):
        super().__init__(bench, "conv__accumulators", "en addr data")
        self.words: list[np.ndarray] = []
        self.at = 0

    def drive(self) -> None:
        self.en.value = self.at < CONFIG.acc_words
        self.addr.value = min(self.at, CONFIG.acc_words - 1)

    def sample(self) -> None:
        if self.at:
            raw = int(self.data.value).to_bytes(4 * CONFIG.cols, "little")
            self.words.append(np.frombuffer(raw, "<i4"))
        self.at += 1

    def done(self) -> bool:
        """Whether all words have been read."""
        return len(self.words) == CONFIG.acc_words


def _random(rng: np.random.Generator) -> Command:
    """A command of up to 18 tiles and 24 outputs, legal or not; often with a single output, so that
    tiles add to the same word at short distances."""
    single = rng.random() < 0.2
    in_w, in_h = rng.integers(1, 9, 2).tolist()
    pitch = in_w + pick(rng, 0, 3)
    return command(
        Opcode.CONV,
        accumulate=pick(rng, 0, 2),
        weights=pick(rng, 0, CONFIG.weight_words),
        acc=pick(rng, 0, min(64, CONFIG.acc_words)) * (CONFIG.acc_words // 64),
        blocks=pick(rng, 1, 4),
        src=pick(rng, 0, CONFIG.scratchpad_words),
        src_pitch=pitch,
        src_block=in_h * pitch + pick(rng, 0, 5),
        in_w=in_w,
        in_h=in_h,
        x0=pick(rng, -4, 4),
        y0=pick(rng, -4, 4),
        out_w=1 if single else pick(rng, 1, 7),
        out_h=1 if single else pick(rng, 1, 5),
        kernel_w=pick(rng, 1, 4),
        kernel_h=pick(rng, 1, 3),
        stride_x=pick(rng, 1, 4),
        stride_y=pick(rng, 1, 4),
        dilation_x=pick(rng, 1, 4),
        dilation_y=pick(rng, 1, 4),
        pad=pick(rng, -128, 128),
    )


def _clear() -> list[Command]:
    """Commands that define both halves of the accumulators."""
    half = CONFIG.acc_half
    ones = "blocks out_h kernel_w kernel_h stride_x stride_y dilation_x dilation_y"
    fields = dict.fromkeys(ones.split(), 1) | {"out_w": half, "pad": 3}
    return [command(Opcode.CONV, acc=first, **fields) for first in (0, half)]


@cocotb.test()
async def conv_random(dut: Handle) -> None:
    """Compares all accumulators after all commands; a stall is exactly a refused read."""
    bench = await Bench.started(dut)
    model = Model(bench.rng)
    weights = WeightAgent(bench, model.memories.weights)
    await bench.run(weights, until=lambda: weights.at > len(model.memories.weights))
    coverage: Counter[str] = Counter()

    def check(c: Command) -> None:
        model.execute(c)
        coverage["adds" if c.accumulate else "overwrites"] += 1
        coverage["short"] += c.out_w * c.out_h < CONFIG.rows
        coverage["pads"] += c.x0 < 0 or c.y0 < 0

    clear = _clear()
    for c in clear:
        model.execute(c)
    for pause in (0.0, 0.9):
        commands = clear + model.draw(bench.rng, COMMANDS // 2, _random)
        driver = CommandDriver(bench, "conv", commands, check, pause)
        memory = ReadServer(bench, "conv__scratchpad", model.memories.scratchpad)
        await bench.run(driver, memory, until=driver.done)
        assert driver.stalls == memory.refused > 0
        reader = AccumulatorReader(bench)
        await bench.run(reader, until=reader.done)
        assert_equal(np.stack(reader.words), model.memories.accumulators, "all commands")
    assert all(coverage[name] > 3 for name in ("adds", "overwrites", "short", "pads")), coverage
