"""The AXI read and write managers against a memory that checks the bus rules."""

import random

import pytest
from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import Out

from systole.hw.bus.axi import Axi4, ReadManager, WriteManager, forward
from systole.isa import Config
from tests.helpers.axi_model import AxiMemory
from tests.helpers.simulation import get, put, simulation

BASE = 0x12_3FFF_F000
"""The window crosses a 32-bit boundary of the bus."""

CONFIGS = {
    "32": Config(axi_data_bits=32, axi_burst_beats=1, axi_outstanding=2),
    "64": Config(axi_data_bits=64, axi_burst_beats=16, axi_outstanding=1),
    "128": Config(axi_data_bits=128),
    "512": Config(axi_data_bits=512, axi_burst_beats=64, axi_outstanding=4),
}


class Port(wiring.Component):
    """Both managers on one AXI4 port."""

    def __init__(self, config, clients):
        self.readers = ReadManager(config, clients=clients)
        self.writers = WriteManager(config, clients=clients)
        super().__init__({"bus": Out(Axi4(config))})

    def elaborate(self, platform):
        m = Module()
        m.submodules.readers, m.submodules.writers = self.readers, self.writers
        forward(m, self.readers.bus, self.bus)
        forward(m, self.writers.bus, self.bus)
        return m


def beats_of(config, addr, size):
    """Offsets of the beats that a request spans."""
    beat = config.beat_bytes
    return range(addr // beat * beat, addr + size, beat)


class Bench:
    """A port, a memory of random bytes, and a counter of cycles."""

    def __init__(self, config, *, clients=3, size=1 << 14, limit=None, seed=1, **memory):
        self.config, self.clients = config, clients
        self.random = random.Random(seed)
        self._simulation = simulation(Port, config, clients)
        self.port = self._simulation.dut
        self.memory = AxiMemory(config, size, base=BASE, seed=seed, **memory)
        self.memory.data[:] = self.random.randbytes(size)
        self.limit = size if limit is None else limit
        self.now = 0

    def run(self, *testbenches, background=()):
        """Simulate until the testbenches have ended."""
        self._simulation.run(
            *(self.setup, *testbenches),
            background=(self.count, *background),
            processes=(self.memory.reader(self.port.bus), self.memory.writer(self.port.bus)),
        )

    async def setup(self, ctx):
        for manager in (self.port.readers, self.port.writers):
            ctx.set(manager.base, BASE)
            ctx.set(manager.limit, self.limit)

    async def count(self, ctx):
        async for _ in ctx.tick():
            self.now += 1
            assert self.now < 50_000, "hangs"

    async def pause(self, ctx, stall):
        while self.random.random() < stall:
            await ctx.tick()

    async def ask(self, ctx, port, addr, size):
        await put(ctx, port.req, {"addr": addr, "bytes": size})

    async def take(self, ctx, port, stall=0.0):
        await self.pause(ctx, stall)
        return await get(ctx, port.beats)

    async def give(self, ctx, port, data, strobe, stall=0.0):
        await self.pause(ctx, stall)
        await put(ctx, port.beats, {"data": data, "strobe": strobe})

    def requests(self, count, start, end):
        """Random requests of any 4-byte alignment inside ``start..end``."""
        most = min(3000, 80 * self.config.beat_bytes)
        for _ in range(count):
            size = self.random.choice((1, 4, 64, most, self.random.randint(1, most)))
            addr = self.random.randrange(start, end - size, 4)
            yield addr, size


@pytest.mark.parametrize("name", CONFIGS)
def test_random_reads(name):
    config = CONFIGS[name]
    bench = Bench(config, latency=(1, 12), stall=0.3)
    wanted = [list(bench.requests(8, 0, bench.limit)) for _ in range(bench.clients)]

    def asker(i):
        async def run(ctx):
            for addr, size in wanted[i]:
                await bench.pause(ctx, 0.5)
                await bench.ask(ctx, bench.port.readers.clients[i], addr, size)

        return run

    def taker(i):
        async def run(ctx):
            for addr, size in wanted[i]:
                offsets = beats_of(config, addr, size)
                for at in offsets:
                    payload = await bench.take(ctx, bench.port.readers.clients[i], 0.2)
                    expected = bench.memory.data[at : at + config.beat_bytes]
                    assert payload.data == int.from_bytes(expected, "little")
                    assert payload.last == (at == offsets[-1])
                    assert not payload.error

        return run

    bench.run(*(role(i) for i in range(bench.clients) for role in (asker, taker)))
    beats = sum(len(beats_of(config, *request)) for client in wanted for request in client)
    assert bench.memory.read_beats == beats
    assert bench.memory.most_reads <= config.axi_outstanding


@pytest.mark.parametrize("name", CONFIGS)
def test_random_writes(name):
    config = CONFIGS[name]
    bench = Bench(config, latency=(1, 12), stall=0.3)
    third = bench.limit // bench.clients // 64 * 64
    wanted = [list(bench.requests(8, i * third, (i + 1) * third)) for i in range(bench.clients)]
    expected = bytearray(bench.memory.data)
    total = [0] * bench.clients
    counted = [0] * bench.clients

    def asker(i):
        async def run(ctx):
            for addr, size in wanted[i]:
                await bench.ask(ctx, bench.port.writers.clients[i], addr, size)

        return run

    def giver(i):
        async def run(ctx):
            for addr, size in wanted[i]:
                for at in beats_of(config, addr, size):
                    word = bench.random.randbytes(config.beat_bytes)
                    strobe = 0
                    for k, byte in enumerate(word):
                        if addr <= at + k < addr + size:
                            strobe |= 1 << k
                            expected[at + k] = byte
                    total[i] += 1
                    port = bench.port.writers.clients[i]
                    await bench.give(ctx, port, int.from_bytes(word, "little"), strobe, 0.2)

        return run

    def finisher(i):
        async def run(ctx):
            for _ in wanted[i]:
                port = bench.port.writers.clients[i]
                error, *_ = await ctx.tick().sample(port.error).until(port.done)
                assert not error

        return run

    async def counter(ctx):
        writers = bench.port.writers
        async for _, _, beat, client in ctx.tick().sample(writers.beat, writers.beat_client):
            counted[client] += beat

    roles = (asker, giver, finisher)
    bench.run(
        *(role(i) for i in range(bench.clients) for role in roles),
        background=(counter,),
    )
    assert bench.memory.data == expected
    assert counted == total
    assert bench.memory.most_writes <= config.axi_outstanding


def test_read_throughput():
    """4 KiB in one request: a beat a cycle, latency hidden, although it takes several bursts."""
    bench = Bench(CONFIGS["128"], latency=(40, 40))
    port = bench.port.readers.clients[1]

    async def run(ctx):
        start = bench.now
        await bench.ask(ctx, port, 0, 4096)
        for _ in range(256):
            await bench.take(ctx, port)
        assert bench.now - start <= 256 + 40 + 6

    bench.run(run)


def test_write_throughput():
    """Requests of 16 beats back to back: a beat a cycle."""
    bench = Bench(CONFIGS["128"], latency=(20, 20))
    port = bench.port.writers.clients[0]

    async def ask(ctx):
        for i in range(16):
            await bench.ask(ctx, port, 256 * i, 256)

    async def give(ctx):
        start = bench.now
        for i in range(256):
            await bench.give(ctx, port, i, 0xFFFF)
        assert bench.now - start <= 256 + 6

    async def done(ctx):
        for _ in range(16):
            await ctx.tick().until(port.done)

    bench.run(ask, give, done)
    assert bench.memory.writes == [(256 * i, 16) for i in range(16)]
    assert bench.memory.data[16 * 200] == 200


def test_short_requests():
    """Requests of one beat: one a cycle, of one client every other, and their beats too."""
    bench = Bench(Config(axi_outstanding=64), latency=(40, 40))
    ports = bench.port.readers.clients[1:3]

    async def ask(ctx, first):
        for i in range(first, 60, 2):
            await bench.ask(ctx, ports[first], 36 * i, 4)
        assert bench.now <= 60 + 3

    async def take(ctx):
        for i in range(60):
            payload = await bench.take(ctx, ports[i % 2])
            assert payload.last
            at = 36 * i // 16 * 16
            assert payload.data == int.from_bytes(bench.memory.data[at : at + 16], "little")
        assert bench.now <= 60 + 40 + 6

    bench.run(lambda ctx: ask(ctx, 0), lambda ctx: ask(ctx, 1), take)


def test_read_turns():
    """Client 0 goes first, the others take turns burst by burst."""
    bench = Bench(CONFIGS["32"], latency=(2, 2))

    def reader(i):
        async def run(ctx):
            port = bench.port.readers.clients[i]
            if i == 0:
                await ctx.tick().repeat(20)
            await bench.ask(ctx, port, 0x1000 * i, 4 if i == 0 else 80)
            for _ in range(1 if i == 0 else 20):
                await bench.take(ctx, port)

        return run

    bench.run(*map(reader, range(3)))
    clients = [at >> 12 for at, _ in bench.memory.reads]
    assert clients.index(0) < 15
    clients.remove(0)
    assert clients == [1, 2] * 20


@pytest.mark.parametrize(
    "addr, size, denied",
    [
        (0, 8000, False),
        (0, 8001, True),
        (7996, 4, False),
        (8000, 4, True),
        (16, 0, True),
        (0xFFFF_FFFC, 8, True),
        (16, 0xFFFF_FFFF, True),
    ],
)
def test_window(addr, size, denied):
    bench = Bench(CONFIGS["128"], limit=8000)

    async def run(ctx):
        for manager in (bench.port.readers, bench.port.writers):
            port = manager.clients[2]
            await bench.ask(ctx, port, addr, size)
            assert not ctx.get(port.denied)
            await ctx.tick()
            assert ctx.get(port.denied) == denied
            await ctx.tick().repeat(3)
            assert not ctx.get(port.denied)
            assert ctx.get(manager.idle) == denied
        assert bool(bench.memory.reads) == (not denied)
        assert bool(bench.memory.writes) == (not denied)

    bench.run(run)


def test_errors():
    """A read error marks its beat; a write error the whole request, and no other."""
    config = CONFIGS["64"]
    bench = Bench(config)
    bench.memory.errors = {1024 + 8}

    async def reads(ctx):
        port = bench.port.readers.clients[0]
        await bench.ask(ctx, port, 1024, 24)
        assert [(await bench.take(ctx, port)).error for _ in range(3)] == [0, 1, 0]

    async def writes(ctx):
        port = bench.port.writers.clients[0]
        for addr, size in ((1024, 512), (512, 512)):
            await bench.ask(ctx, port, addr, size)
            for _ in range(64):
                await bench.give(ctx, port, 0, 0xFF)
            error, *_ = await ctx.tick().sample(port.error).until(port.done)
            assert error == (addr == 1024)

    bench.run(reads, writes)


@pytest.mark.parametrize("size", [64, 8000])  # one burst, over and over; more than gets issued
@pytest.mark.parametrize("after", range(1, 40, 3))
def test_drain(after, size):
    """Draining at any time ends the bursts begun, writes no more, and the port works again."""
    config = Config(axi_burst_beats=4, axi_outstanding=4)
    bench = Bench(config, latency=(5, 15), stall=0.4, seed=after)
    before = bytearray(bench.memory.data)
    readers, writers = bench.port.readers, bench.port.writers

    async def run(ctx):
        read, write = readers.clients[1], writers.clients[1]
        ctx.set(read.req.payload, {"addr": 0, "bytes": 8000})
        ctx.set(write.req.payload, {"addr": 0, "bytes": size})
        ctx.set(write.beats.payload, {"data": 0, "strobe": 0xFFFF})
        offers = (read.req.valid, write.req.valid, write.beats.valid, read.beats.ready)
        for signal in offers:
            ctx.set(signal, 1)
        written = 0
        for _ in range(after):
            *_, beat = await ctx.tick().sample(writers.beat)
            written += beat
        ctx.set(readers.drain, 1)
        ctx.set(writers.drain, 1)
        for _ in range(3):
            ready = read.req.ready | write.req.ready | write.beats.ready | read.beats.valid
            await ctx.tick()
            assert not ctx.get(ready), "the clients see nothing of the draining"
        # The clients are reset while it goes on.
        for signal in offers:
            ctx.set(signal, 0)
        idle = False
        while not idle:
            *_, idle, done = await ctx.tick().sample(readers.idle & writers.idle, write.done)
            assert not done
        assert bench.memory.read_beats == sum(n for _, n in bench.memory.reads)
        assert bench.memory.write_beats == sum(n for _, n in bench.memory.writes)
        assert len(bench.memory.reads) < 60, "drain stops issuing"
        assert bench.memory.data == before[min(16 * written, size) :].rjust(len(before), b"\0")
        ctx.set(readers.drain, 0)
        ctx.set(writers.drain, 0)
        await bench.ask(ctx, read, 8000, 16)
        payload = await bench.take(ctx, read)
        assert payload.last and payload.data == int.from_bytes(before[8000:8016], "little")
        await bench.ask(ctx, write, 8000, 16)
        await bench.give(ctx, write, 7, 1)
        error, *_ = await ctx.tick().sample(write.error).until(write.done)
        assert not error and bench.memory.data[8000] == 7

    bench.run(run)
