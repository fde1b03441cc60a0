"""Designs of parts of the accelerator: its blocks side by side, for their benches, and the array
alone."""

from __future__ import annotations

from functools import reduce
from operator import xor

from amaranth.hdl import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from systole.hw.arithmetic.requantise import Requantise
from systole.hw.conv.engine import ConvEngine
from systole.hw.conv.fast_array import array_of
from systole.hw.memory.scratchpad import Scratchpad
from systole.hw.post.engine import PostEngine
from systole.hw.transfer.engines import LoadEngine, StoreEngine
from systole.hw.window.engine import WindowEngine
from systole.isa import Config


class Blocks(wiring.Component):
    """Blocks that share only clock and reset; the ports of each stand under its name. They are one
    design so that all their benches need one simulator only."""

    def __init__(self, config: Config):
        self.blocks = {
            "requantise": Requantise(lanes=config.lanes),
            "scratchpad": Scratchpad(config),
            "conv": ConvEngine(config),
            "post": PostEngine(config),
            "window": WindowEngine(config),
            "load": LoadEngine(config),
            "store": StoreEngine(config),
        }
        super().__init__({name: Out(block.signature) for name, block in self.blocks.items()})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        for name, block in self.blocks.items():
            m.submodules[name] = block
            # Not by ``connect``, which cannot flip arrays of ports.
            signature = block.signature
            ports = zip(signature.flatten(getattr(self, name)), signature.flatten(block))
            for (_, member, outer), (_, _, inner) in ports:
                is_input = member.flow is In
                m.d.comb += inner.eq(outer) if is_input else outer.eq(inner)
        return m

    def inputs(self) -> list[str]:
        """The input ports by their names in SystemVerilog."""
        return [
            "__".join(map(str, path))
            for path, member, _ in self.signature.flatten(self)
            if member.flow is In
        ]


class ArrayAlone(wiring.Component):
    """The systolic array; its column sums are folded into one output, so that nothing is optimised
    away."""

    sums: Signal

    def __init__(self, config: Config):
        self.array = array_of(config)
        ports = {name: port for name, port in self.array.signature.members.items() if port.is_port}
        self.inputs = [name for name, port in ports.items() if port.flow is In]
        super().__init__({**{name: ports[name] for name in self.inputs}, "sums": Out(32)})

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.array = self.array
        for name in self.inputs:
            m.d.comb += getattr(self.array, name).eq(getattr(self, name))
        m.d.comb += self.sums.eq(reduce(xor, self.array.sums))
        return m
