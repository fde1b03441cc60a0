"""The banked scratchpad and the weight arbiter against a model of their arbitration."""

import random

import pytest
from amaranth.sim import Simulator

from systole.hw.memory.scratchpad import Scratchpad, WeightArbiter
from systole.isa import Config
from tests.helpers.simulation import Inputs, simulation

CONFIGS = {
    "4x4": Config.sized(4, 4, scratchpad_bytes=4 * 64, banks=2),
    "16x16": Config.sized(16, 16, scratchpad_bytes=16 * 128),
    "32x8": Config.sized(32, 8, scratchpad_bytes=32 * 96, banks=8),
    "12x20": Config.sized(12, 20, scratchpad_bytes=12 * 100),
}


def grants(offers, banks):
    """Which of the offered addresses (None: no request) are taken: per bank, the lowest client."""
    taken, used = [], set()
    for addr in offers:
        taken.append(addr is not None and addr % banks not in used)
        if addr is not None:
            used.add(addr % banks)
    return taken


@pytest.mark.parametrize("name", CONFIGS)
def test_random_traffic(name):
    """Grants, data and masks as modelled; clients hold their request until it is taken."""
    config = CONFIGS[name]
    rng = random.Random(7)
    design = simulation(Scratchpad, config)
    dut = design.dut
    words, groups = config.scratchpad_words, config.rows // config.lanes
    content = [0] * words
    hits = {"conflict": 0, "full": 0, "raw": 0}

    async def bench(ctx):
        reads, writes = [None] * 4, [None] * 4
        written = set()
        inputs = Inputs(
            *(signal for p in dut.read for signal in (p.valid, p.addr)),
            *(signal for p in dut.write for signal in (p.valid, p.addr, p.data, p.mask)),
        )
        for _ in range(600):
            hot = rng.randrange(words)  # several clients at one word
            for i in range(4):
                addr = hot if rng.random() < 0.3 else rng.randrange(words)
                if reads[i] is None and rng.random() < 0.7:
                    again = written and rng.random() < 0.3  # right after it was written
                    reads[i] = rng.choice(sorted(written)) if again else addr
                if writes[i] is None and rng.random() < 0.7:
                    data = rng.getrandbits(8 * config.rows)
                    writes[i] = (addr, data, rng.randrange(1 << groups))
            inputs.set(
                ctx,
                *(value for addr in reads for value in (addr is not None, addr or 0)),
                *(value for w in writes for value in (w is not None, *(w or (0, 0, 0)))),
            )
            read_grants = grants(reads, config.banks)
            write_grants = grants([w and w[0] for w in writes], config.banks)
            expected = [content[a] if g else None for a, g in zip(reads, read_grants, strict=True)]
            busy = {w[0] for w, g in zip(writes, write_grants, strict=True) if g}
            for i in range(4):
                if reads[i] is not None:
                    assert ctx.get(dut.read[i].ready) == read_grants[i]
                    hits["conflict"] += not read_grants[i]
                if writes[i] is not None:
                    assert ctx.get(dut.write[i].ready) == write_grants[i]
            hits["full"] += all(read_grants)
            await ctx.tick()
            for i in range(4):
                # A write in the same cycle leaves open what is read.
                if read_grants[i]:
                    if reads[i] not in busy:
                        assert ctx.get(dut.read[i].data) == expected[i]
                        hits["raw"] += reads[i] in written
                    reads[i] = None
            written = busy
            for i in range(4):
                if write_grants[i]:
                    addr, data, mask = writes[i]
                    bits = sum(
                        ((1 << 8 * config.lanes) - 1) << 8 * config.lanes * g
                        for g in range(groups)
                        if mask >> g & 1
                    )
                    content[addr] = content[addr] & ~bits | data & bits
                    writes[i] = None

    design.run(bench)
    assert hits["conflict"] > 50 and hits["raw"] > 20
    assert hits["full"] > 5 or config.banks < 4


def test_weight_arbiter():
    """The first client goes first; the second gets what it leaves."""
    dut = WeightArbiter(CONFIGS["16x16"])
    first, second = dut.clients

    async def bench(ctx):
        ctx.set(first.addr, 5)
        ctx.set(first.data, 55)
        ctx.set(second.addr, 6)
        ctx.set(second.data, 66)
        for pattern in range(8):
            a, b, ready = pattern & 1, pattern >> 1 & 1, pattern >> 2
            ctx.set(first.valid, a)
            ctx.set(second.valid, b)
            ctx.set(dut.weights.ready, ready)
            await ctx.delay(1e-9)
            assert ctx.get(dut.weights.valid) == (a | b)
            assert ctx.get(first.ready) == ready
            if b:
                assert ctx.get(second.ready) == (ready & ~a)
            if a | b:
                assert ctx.get(dut.weights.addr) == (5 if a else 6)
                assert ctx.get(dut.weights.data) == (55 if a else 66)

    sim = Simulator(dut)
    sim.add_testbench(bench)
    sim.run()
