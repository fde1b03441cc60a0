"""cocotb bench of ``Scratchpad``: four readers and four writers at random words, against an array
and the rule that each bank serves the client with the lowest index first."""

from __future__ import annotations

from collections import Counter

import cocotb
import numpy as np

from systole.sim.benches.common import Agent, Bench, Ports, pack
from systole.sim.benches.environment import CONFIG, Handle

CYCLES = 1000
CLIENTS = 4
GROUPS = CONFIG.word_parts


class Clients(Agent):
    """All clients, each of which holds its request until it is taken; model and scoreboard."""

    def __init__(self, bench: Bench):
        super().__init__(bench, "scratchpad", "")
        self.read = [
            Ports(bench, f"scratchpad__read__{i}", "valid ready addr data") for i in range(CLIENTS)
        ]
        self.write = [
            Ports(bench, f"scratchpad__write__{i}", "valid ready addr data mask")
            for i in range(CLIENTS)
        ]
        self.content = np.zeros((CONFIG.scratchpad_words, CONFIG.rows), np.int8)
        self.known = np.zeros(self.content.shape, bool)
        """Bytes written since the start: an earlier bench may have left the others."""
        self.reads: list[int | None] = [None] * CLIENTS
        self.writes: list[tuple[int, np.ndarray, int] | None] = [None] * CLIENTS
        self.shown: list[tuple[np.ndarray, np.ndarray] | None] = [None] * CLIENTS
        """Words that readers must see in this cycle, with the bytes of them that are known."""
        self.recent: list[int] = []
        self.coverage: Counter[str] = Counter()

    def _address(self) -> int:
        # Few words, so that many are read again; or one that was just written.
        if self.recent and self.rng.random() < 0.4:
            return int(self.rng.choice(self.recent))
        return int(self.rng.integers(0, 64)) * (CONFIG.scratchpad_words // 64 - 1)

    def drive(self) -> None:
        rng = self.rng
        for i in range(CLIENTS):
            if self.reads[i] is None and rng.random() < 0.6:
                self.reads[i] = self._address()
            if self.writes[i] is None and rng.random() < 0.6:
                data = rng.integers(-128, 128, CONFIG.rows, np.int8)
                self.writes[i] = self._address(), data, int(rng.integers(0, 1 << GROUPS))
            self.read[i].valid.value = self.reads[i] is not None
            self.read[i].addr.value = self.reads[i] or 0
            write = self.writes[i]
            self.write[i].valid.value = write is not None
            if write is not None:
                self.write[i].addr.value = write[0]
                self.write[i].data.value = pack(write[1])
                self.write[i].mask.value = write[2]

    def _granted(self, offers: list[int | None]) -> list[bool]:
        """Whether each client is served: at each bank, the first that asks."""
        banks = [None if a is None else a % CONFIG.banks for a in offers]
        return [b is not None and b not in banks[:i] for i, b in enumerate(banks)]

    def sample(self) -> None:
        for i, shown in enumerate(self.shown):
            if shown is not None:
                word, known = shown
                raw = int(self.read[i].data.value).to_bytes(CONFIG.rows, "little")
                got = np.frombuffer(raw, np.int8)
                assert (got[known] == word[known]).all(), f"reader {i}: {got}, not {word}"
                self.coverage["compared"] += int(known.sum())
        self.shown = [None] * CLIENTS
        served = self._granted(self.reads)
        for i, addr in enumerate(self.reads):
            if addr is None:
                continue
            assert self.read[i].ready.value == served[i], f"reader {i} at {addr}"
            self.coverage["read refused"] += not served[i]
            if served[i]:
                self.shown[i] = self.content[addr].copy(), self.known[addr].copy()
                self.coverage["read after write"] += addr in self.recent
                self.reads[i] = None
        self.recent = []
        served = self._granted([None if w is None else w[0] for w in self.writes])
        for i, write in enumerate(self.writes):
            if write is None:
                continue
            addr, data, mask = write
            assert self.write[i].ready.value == served[i], f"writer {i} at {addr}"
            self.coverage["write refused"] += not served[i]
            if served[i]:
                parts = mask >> np.arange(GROUPS) & 1
                written = np.repeat(parts.astype(bool), CONFIG.written_lanes)
                self.content[addr, written] = data[written]
                self.known[addr] |= written
                self.recent.append(addr)
                self.writes[i] = None


@cocotb.test()
async def scratchpad_traffic(dut: Handle) -> None:
    """Checks grants, data and masks; a read sees the word before a write in the same cycle."""
    bench = await Bench.started(dut)
    clients = Clients(bench)
    await bench.run(clients, until=lambda: bench.cycles >= CYCLES)
    names = ("compared", "read refused", "write refused", "read after write")
    assert all(clients.coverage[name] > 50 for name in names), clients.coverage
