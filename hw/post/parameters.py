"""Reads POST's requantisation parameters ahead of the groups that need them."""

from __future__ import annotations

from amaranth.hdl import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from systole.hw.bus.interfaces import ReadInterface, ScratchpadRead
from systole.isa import Config
from systole.isa.commands import ADDRESS_BITS


class ParameterPrefetch(wiring.Component):
    """Reads the parameters of the next group and holds them until it starts.

    * ``offered``: a command with parameters from scratchpad word ``first`` on is offered to POST.
      Its first parameters are read as soon as there is room. ``accept``: POST takes the command.
    * ``take``: a group starts and takes its parameters from ``params``; ``ready`` says that they
      are there. Unless it is its command's ``last_group``, those of the next group are read.
    """

    offered: Signal
    first: Signal
    accept: Signal
    take: Signal
    last_group: Signal
    ready: Signal
    params: Signal
    read: ReadInterface

    def __init__(self, config: Config):
        self.config = config
        super().__init__(
            {
                "offered": In(1),
                "first": In(ADDRESS_BITS),
                "accept": In(1),
                "take": In(1),
                "last_group": In(1),
                "ready": Out(1),
                "params": Out(8 * config.rows * config.param_words),
                "read": Out(ScratchpadRead(config)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        read, word = self.read, 8 * self.config.rows
        count = self.config.param_words
        left = Signal(range(count + 1))  # words to ask for
        index = Signal(range(max(count, 2)))  # of the word that comes next
        comes = Signal()
        ahead = Signal()  # the reading for the offered command has begun
        idle = ~read.valid & ~comes & ~self.ready
        with m.If(read.valid & read.ready):
            m.d.sync += [read.addr.eq(read.addr + 1), left.eq(left - 1), read.valid.eq(left != 1)]
        m.d.sync += comes.eq(read.valid & read.ready)
        with m.If(comes):
            for i in range(count):
                with m.If(index == i):
                    m.d.sync += self.params.word_select(i, word).eq(read.data)
            m.d.sync += index.eq(index + 1)
            with m.If(index == count - 1):
                m.d.sync += [index.eq(0), self.ready.eq(1)]
        with m.If(self.take):
            m.d.sync += self.ready.eq(0)
            with m.If(~self.last_group):
                m.d.sync += [left.eq(count), read.valid.eq(1)]
        with m.If(self.offered & ~ahead & idle):
            m.d.sync += [read.addr.eq(self.first), left.eq(count), read.valid.eq(1), ahead.eq(1)]
        with m.If(self.accept):
            m.d.sync += ahead.eq(0)
        return m
