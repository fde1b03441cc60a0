"""The banked scratchpad with its arbiters, and the arbiter in front of the weight buffer."""

from __future__ import annotations

from collections.abc import Sequence

from amaranth.hdl import Cat, Module, Signal, unsigned
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out

from systole.hw.bus.interfaces import (
    ReadInterface,
    ScratchpadRead,
    ScratchpadWrite,
    WeightWrite,
    WriteInterface,
)
from systole.isa import Config


class Scratchpad(wiring.Component):
    """``banks`` memories of one read and one write port, interleaved by the low address bits.

    In each cycle every bank serves one of the ``read`` and one of the ``write`` clients, the lowest
    index first; clients at different banks do not disturb each other. ``ready`` depends on the
    requests of lower clients and on the client's own address, not on its ``valid``. ``data`` of a
    read holds the word in exactly the cycle after it was taken; it sees the writes of all earlier
    cycles. A word that is written in the very cycle in which its read is taken reads as anything,
    and so does one that was never written. Addresses are not checked: those beyond the last word
    read and write nothing in particular.
    """

    read: list[ReadInterface]
    write: list[WriteInterface]

    def __init__(self, config: Config, *, readers: int = 4, writers: int = 4):
        self.config = config
        super().__init__(
            {
                "read": In(ScratchpadRead(config)).array(readers),
                "write": In(ScratchpadWrite(config)).array(writers),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config = self.config
        bank_bits = (config.banks - 1).bit_length()
        width = 8 * config.rows
        masked = config.word_parts > 1

        ports = []
        for b in range(config.banks):
            bank: memory.Memory = memory.Memory(
                shape=unsigned(width), depth=config.scratchpad_words // config.banks, init=[]
            )
            m.submodules[f"bank_{b}"] = bank
            granularity = 8 * config.written_lanes if masked else None
            ports.append((bank.read_port(), bank.write_port(granularity=granularity)))

        sides: tuple[Sequence[ReadInterface | WriteInterface], ...] = (self.read, self.write)
        for clients in sides:
            for i, client in enumerate(clients):
                own_bank = client.addr[:bank_bits]
                clash = [c.valid & (c.addr[:bank_bits] == own_bank) for c in list(clients)[:i]]
                m.d.comb += client.ready.eq(~Cat(clash).any())

        # The last assignment wins: clients in reverse, so that the first comes last.
        for b, (read_port, write_port) in enumerate(ports):
            m.d.comb += read_port.en.eq(0)  # Amaranth's default is to read in every cycle.
            for client in reversed(self.read):
                with m.If(client.valid & (client.addr[:bank_bits] == b)):
                    m.d.comb += [read_port.en.eq(1), read_port.addr.eq(client.addr[bank_bits:])]
            for client in reversed(self.write):
                with m.If(client.valid & (client.addr[:bank_bits] == b)):
                    m.d.comb += [
                        write_port.en.eq(client.mask),
                        write_port.addr.eq(client.addr[bank_bits:]),
                        write_port.data.eq(client.data),
                    ]

        for i, client in enumerate(self.read):
            source = Signal(bank_bits, name=f"source_{i}")
            with m.If(client.valid):
                m.d.sync += source.eq(client.addr[:bank_bits])
            with m.Switch(source):
                for b, (read_port, _) in enumerate(ports):
                    with m.Case(b):
                        m.d.comb += client.data.eq(read_port.data)
        return m


class WeightArbiter(wiring.Component):
    """Two write clients of the weight buffer to one, without latency; ``clients[0]`` goes first."""

    clients: list[WriteInterface]
    weights: WriteInterface

    def __init__(self, config: Config):
        super().__init__(
            {
                "clients": In(WeightWrite(config)).array(2),
                "weights": Out(WeightWrite(config)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        first, second = self.clients
        m.d.comb += [
            self.weights.valid.eq(first.valid | second.valid),
            first.ready.eq(self.weights.ready),
            second.ready.eq(self.weights.ready & ~first.valid),
        ]
        with m.If(first.valid):
            m.d.comb += [self.weights.addr.eq(first.addr), self.weights.data.eq(first.data)]
        with m.Else():
            m.d.comb += [self.weights.addr.eq(second.addr), self.weights.data.eq(second.data)]
        return m
