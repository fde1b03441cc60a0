"""POST's table: a function of int8, looked up in all lanes every cycle."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Signal, Value, unsigned
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out

from systole.hw.bus.interfaces import (
    ReadInterface,
    ScratchpadRead,
)
from systole.isa import Config
from systole.isa.commands import ADDRESS_BITS
from systole.isa.config import bits_for
from systole.isa.timing import TABLE_LATENCY, table_parts, table_reads


class PostTable(wiring.Component):
    """Replaces each of ``lanes`` int8 r by byte r + 128 of a table of 256 bytes.

    ``load`` makes it read the table from scratchpad word ``table`` on: ``load_words`` requests to
    ``read``, one a cycle if they are taken. Words of more than ``TABLE_WIDTH`` bytes are read in
    parts, once for each. ``loaded`` goes low in the next cycle, and high once the last word has
    been written; then lookups see the new table. ``load`` must not be raised while the table is
    being loaded, nor while lookups are in flight.

    ``i`` is taken with ``i_valid``, every cycle if need be; ``o`` is valid with ``o_valid``
    ``LATENCY`` cycles later.

    Every lane has a memory of its own, so that it may be one without a promise about collisions:
    nothing is looked up while it is written. Stages: memory; byte of its word.
    """

    LATENCY = TABLE_LATENCY

    load: Signal
    table: Signal
    loaded: Signal
    read: ReadInterface
    i_valid: Signal
    i: Signal
    o_valid: Signal
    o: Signal

    def __init__(self, config: Config):
        self.config = config
        self.parts = table_parts(config)
        """Words of the memory that one scratchpad word fills; the last may be filled in part."""
        self.width = -(-config.rows // self.parts)
        self.load_words = table_reads(config)
        super().__init__(
            {
                "load": In(1),
                "table": In(ADDRESS_BITS),
                "loaded": Out(1),
                "read": Out(ScratchpadRead(config)),
                "i_valid": In(1),
                "i": In(8 * config.lanes),
                "o_valid": Out(1),
                "o": Out(8 * config.lanes),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, read = self.config, self.read
        # Loading -----------------------------------------------------------------------------
        write_en, write_addr = Signal(), Signal(range(self.load_words))
        write_data = Signal(8 * self.width)
        left = Signal(range(self.load_words + 1))  # requests to come
        part, part_comes = Signal(range(max(self.parts, 2))), Signal(range(max(self.parts, 2)))
        comes = Signal()
        taken = Signal()
        m.d.comb += [
            taken.eq(read.valid & read.ready),
            write_en.eq(comes),
            write_data.eq(read.data),
        ]
        if self.parts > 1:
            spare = Const(0, 8 * (self.parts * self.width - config.rows))
            whole = Cat(read.data, spare)
            m.d.comb += write_data.eq(whole.word_select(part_comes, 8 * self.width))
        m.d.sync += comes.eq(taken)
        with m.If(taken):
            m.d.sync += [
                left.eq(left - 1),
                read.valid.eq(left != 1),
                part.eq(part + 1),
                part_comes.eq(part),
            ]
            with m.If(part == self.parts - 1):
                m.d.sync += [part.eq(0), read.addr.eq(read.addr + 1)]
        with m.If(comes):
            m.d.sync += write_addr.eq(write_addr + 1)
            with m.If(write_addr == self.load_words - 1):
                m.d.sync += self.loaded.eq(1)
        with m.If(self.load):
            m.d.sync += [
                left.eq(self.load_words),
                read.valid.eq(1),
                read.addr.eq(self.table),
                write_addr.eq(0),
                self.loaded.eq(0),
            ]

        # Lookups -------------------------------------------------------------------------------
        index_valid = Signal()
        m.d.sync += [index_valid.eq(self.i_valid), self.o_valid.eq(index_valid)]
        for lane in range(config.lanes):
            table: memory.Memory = memory.Memory(
                shape=unsigned(8 * self.width), depth=self.load_words, init=[]
            )
            m.submodules[f"memory_{lane}"] = table
            write, port = table.write_port(), table.read_port()
            index = Cat(self.i[8 * lane :][:7], ~self.i[8 * lane + 7])
            word, byte = _divide(index, config.rows)
            if self.parts > 1:
                part_of, byte = _divide(byte, self.width)
                word = word * self.parts + part_of
            place = Signal(range(self.width), name=f"place_{lane}")
            m.d.comb += [
                write.en.eq(write_en),
                write.addr.eq(write_addr),
                write.data.eq(write_data),
                port.en.eq(self.i_valid),
                port.addr.eq(word),
            ]
            with m.If(self.i_valid):
                m.d.sync += place.eq(byte)
            with m.If(index_valid):
                m.d.sync += self.o[8 * lane :][:8].eq(port.data.word_select(place, 8))
        return m


def _divide(value: Value, by: int) -> tuple[Value, Value]:
    """A value of up to 8 bits divided by a constant: quotient, remainder."""
    # ceil(2^16 / by) is too large by less than 2^-8 for every ``by`` up to 256: exact below 2^8.
    quotient = (value * -(-(1 << 16) // by))[16:24]
    return quotient, (value - quotient * by)[: bits_for(by)]
