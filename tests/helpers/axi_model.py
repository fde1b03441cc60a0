"""A memory on AXI4 for Amaranth's simulator, which checks the manager's side of the protocol."""

from __future__ import annotations

import random
from collections import deque

SLVERR = 2


class AxiMemory:
    """``size`` bytes (the ``bytearray`` ``data``) from bus address ``base`` on.

    ``latency`` (low, high) cycles pass before a read burst's first beat and before a write
    response; in each cycle every handshake of the memory's side stalls with probability ``stall``.
    Beats that touch an address in ``errors`` (a set of offsets of beats) answer SLVERR; such writes
    are dropped. Violations of the burst and stability rules raise AssertionError. Add
    ``reader(bus)`` and ``writer(bus)`` with ``Simulator.add_process``.
    """

    def __init__(self, config, size, *, base=0, latency=(8, 8), stall=0.0, seed=0):
        self.config = config
        self.base = base
        self.data = bytearray(size)
        self.latency = latency
        self.stall = stall
        self.errors = set()
        self.reads, self.writes = [], []
        """Bursts seen: (offset, beats)."""
        self.most_reads = self.most_writes = 0
        """Most bursts in flight at a time."""
        self.read_beats = self.write_beats = 0
        self._random = random.Random(seed)

    def _go(self):
        return self._random.random() >= self.stall

    def _due(self, now):
        return now + self._random.randint(*self.latency)

    def _burst(self, addr, length, size, burst):
        beat = self.config.beat_bytes
        assert 1 << size == beat and burst == 1, "full-width INCR bursts only"
        assert addr % beat == 0, "bursts begin at a whole beat"
        assert length < self.config.axi_burst_beats, f"burst of {length + 1} beats"
        end = addr + (length + 1) * beat
        assert addr >> 12 == (end - 1) >> 12, f"burst at {addr:#x} crosses 4 KiB"
        offset = addr - self.base
        assert offset >= 0 and end - self.base <= len(self.data), f"{addr:#x} outside the memory"
        return offset, length + 1

    @staticmethod
    def _stable(held, now, ready, what):
        """Check that an offer (a tuple, first its valid) not taken last time is still there."""
        if held is not None:
            assert held == now, f"{what} changed before it was taken"
        return now if now[0] and not ready else None

    def reader(self, bus):
        """The process that serves the read channels of ``bus``."""

        async def process(ctx):
            await self._read(ctx, bus)

        return process

    def writer(self, bus):
        """The process that serves the write channels of ``bus``."""

        async def process(ctx):
            await self._write(ctx, bus)

        return process

    async def _read(self, ctx, bus):
        beat_bytes = self.config.beat_bytes
        queue = deque()
        now = 0
        held = None
        arready = rvalid = 0
        async for _, _, *address, rready in ctx.tick().sample(
            bus.arvalid, bus.araddr, bus.arlen, bus.arsize, bus.arburst, bus.rready
        ):
            now += 1
            held = self._stable(held, address, arready, "AR")
            if rvalid and rready:
                self.read_beats += 1
                queue[0][1].popleft()
                if not queue[0][1]:
                    queue.popleft()
                rvalid = 0
            if address[0] and arready:
                offset, beats = self._burst(*address[1:])
                self.reads.append((offset, beats))
                offsets = deque(offset + i * beat_bytes for i in range(beats))
                queue.append((self._due(now), offsets))
                self.most_reads = max(self.most_reads, len(queue))
            if not rvalid and queue and queue[0][0] <= now and self._go():
                at = queue[0][1][0]
                rvalid = 1
                ctx.set(bus.rdata, int.from_bytes(self.data[at : at + beat_bytes], "little"))
                ctx.set(bus.rresp, SLVERR if at in self.errors else 0)
                ctx.set(bus.rlast, len(queue[0][1]) == 1)
            arready = int(self._go())
            ctx.set(bus.rvalid, rvalid)
            ctx.set(bus.arready, arready)

    async def _write(self, ctx, bus):
        beat_bytes = self.config.beat_bytes
        bursts, beats, responses = deque(), deque(), deque()
        now = 0
        held_aw = held_w = None
        awready = wready = bvalid = 0
        async for _, _, *sampled in ctx.tick().sample(
            *(bus.awvalid, bus.awaddr, bus.awlen, bus.awsize, bus.awburst),
            *(bus.wvalid, bus.wdata, bus.wstrb, bus.wlast),
            bus.bready,
        ):
            address, beat, bready = sampled[:5], sampled[5:9], sampled[9]
            now += 1
            held_aw = self._stable(held_aw, address, awready, "AW")
            held_w = self._stable(held_w, beat, wready, "W")
            if bvalid and bready:
                responses.popleft()
                bvalid = 0
            if address[0] and awready:
                bursts.append(self._burst(*address[1:]))
                self.writes.append(bursts[-1])
            if beat[0] and wready:
                self.write_beats += 1
                beats.append(beat[1:])
            while bursts and len(beats) >= bursts[0][1]:
                offset, count = bursts.popleft()
                error = 0
                for i in range(count):
                    word, strobe, last = beats.popleft()
                    assert last == (i == count - 1), f"WLAST wrong at beat {i} of {count}"
                    at = offset + i * beat_bytes
                    if at in self.errors:
                        error = SLVERR
                        continue
                    for k, byte in enumerate(word.to_bytes(beat_bytes, "little")):
                        if strobe >> k & 1:
                            self.data[at + k] = byte
                responses.append((self._due(now), error))
            self.most_writes = max(self.most_writes, len(bursts) + len(responses))
            if not bvalid and responses and responses[0][0] <= now and self._go():
                bvalid = 1
                ctx.set(bus.bresp, responses[0][1])
            awready, wready = int(self._go()), int(self._go())
            ctx.set(bus.bvalid, bvalid)
            ctx.set(bus.awready, awready)
            ctx.set(bus.wready, wready)
