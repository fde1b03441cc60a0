"""The CONV engine: weight buffer, systolic array, accumulators and the sequencers driving them."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, Value, signed
from amaranth.lib import data, memory, wiring
from amaranth.lib.wiring import In, Out

from systole.hw.bus.interfaces import (
    AccumulatorInterface,
    AccumulatorRead,
    CommandInterface,
    CommandPort,
    ReadInterface,
    ScratchpadRead,
    WeightWrite,
    WriteInterface,
    record,
)
from systole.hw.conv.array import SystolicArray
from systole.hw.conv.edges import ArrayEdges
from systole.hw.conv.fast_array import array_of
from systole.hw.conv.sequencer import CONV, TAG, ActivationSequencer, WeightSequencer
from systole.isa import Config, Opcode
from systole.isa.config import bits_for
from systole.isa.timing import ACCUMULATE_LATENCY


class Accumulators(wiring.Component):
    """``acc_words`` words of ``cols`` int32, each column and half a memory of one read and one
    write port, updated in the skewed timing of the array's columns.

    * ``valid``, ``tag``: a vector enters the array in this cycle. Its accumulators are read
      ``ACCUMULATE_LATENCY`` cycles before their column's sum arrives and written in the cycle in
      which it does, so a vector must not add to a word that one of the ``ACCUMULATE_LATENCY``
      cycles before it wrote.
    * ``sums``: the array's.
    * ``done``: the last column of a tag's ``last`` vector is being written; a read in the next
      cycle sees all of that command.
    * ``read``: POST. Must not be enabled on the half in which vectors are in flight.
    """

    valid: Signal
    tag: data.View
    sums: list[Signal]
    done: Signal
    read: AccumulatorInterface

    def __init__(self, config: Config, array: SystolicArray):
        self.config = config
        self.array = array
        super().__init__(
            {
                "valid": In(1),
                "tag": In(TAG),
                "sums": In(signed(array.sum_width)).array(config.cols),
                "done": Out(1),
                "read": In(AccumulatorRead(config)),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        config, array = self.config, self.array
        address_bits = bits_for(config.acc_half)

        def split(addr):
            """Half, and word within the half, of an accumulator address."""
            half = addr >= config.acc_half
            return half, Mux(half, addr - config.acc_half, addr)[:address_bits]

        read_half, read_word = split(self.read.addr)
        shown_half = Signal()
        with m.If(self.read.en):
            m.d.sync += shown_half.eq(read_half)

        # Stage s of these holds the vector that entered the array s cycles ago. A column reads in
        # stage latency - 2, has the word in the next and its sum and the word in stage latency, in
        # which it writes. (What was read is registered: a memory's output comes late in its cycle.)
        depth = array.latency(config.cols - 1) + 1
        half, word = split(self.tag.acc)
        stages = [(self.valid, self.tag.overwrite, half, word)]
        last = self.valid & self.tag.last
        for s in range(1, depth):
            valid = Signal(name=f"valid_{s}")
            held = (
                Signal(name=f"overwrite_{s}", reset_less=True),
                Signal(name=f"half_{s}", reset_less=True),
                Signal(address_bits, name=f"word_{s}", reset_less=True),
            )
            m.d.sync += valid.eq(stages[-1][0])
            with m.If(stages[-1][0]):
                m.d.sync += [to.eq(value) for to, value in zip(held, stages[-1][1:], strict=True)]
            stages.append((valid, *held))
            after = Signal(name=f"last_{s}")
            m.d.sync += after.eq(last)
            last = after
        m.d.comb += self.done.eq(last)

        shown = []
        for c in range(config.cols):
            latency = array.latency(c)
            valid, _, half, word = stages[latency]
            comes, comes_anew, comes_half, _ = stages[latency - 1]
            next_valid, next_overwrite, next_half, next_word = stages[latency - ACCUMULATE_LATENCY]
            before = Signal(32, name=f"before_{c}", reset_less=True)
            total = Signal(32, name=f"total_{c}")
            words = []
            for h in (0, 1):
                cells: memory.Memory = memory.Memory(shape=32, depth=config.acc_half, init=[])
                m.submodules[f"column_{c}_{h}"] = cells
                write, read = cells.write_port(), cells.read_port()
                updating = next_valid & ~next_overwrite & (next_half == h)
                m.d.comb += [
                    read.en.eq(updating | (self.read.en & (read_half == h))),
                    read.addr.eq(Mux(updating, next_word, read_word)),
                    write.en.eq(valid & (half == h)),
                    write.addr.eq(word),
                    write.data.eq(total),
                ]
                words.append(read.data)
            with m.If(comes):
                m.d.sync += before.eq(Mux(comes_anew, 0, Mux(comes_half, words[1], words[0])))
            m.d.comb += total.eq(before + self.sums[c])
            shown.append(Mux(shown_half, words[1], words[0]))
        m.d.comb += self.read.data.eq(Cat(*shown))
        return m


class ConvEngine(wiring.Component):
    """Runs CONV commands: one activation vector a cycle through the array into the accumulators.

    Throughput: a tile of n outputs takes max(n, about ``rows``) cycles, with no cycle between tiles
    and commands; a refused scratchpad read costs the cycle it is refused in. Latency: the first
    read follows a command by ``conv_lead`` cycles when the engine was idle, and ``retire`` follows
    the last read by ``array_lead`` plus the array's ``latency(cols - 1)``.

    Two commands beyond the one that streams are taken from ``command``, so that the next one's
    first weights are in place in time. ``stalled`` is a refused scratchpad read. CONV never faults.
    ``weight_write`` is always ready; a weight read in the next cycle sees the write.
    """

    command: CommandInterface
    scratchpad: ReadInterface
    weight_write: WriteInterface
    accumulators: AccumulatorInterface

    def __init__(self, config: Config):
        self.config = config
        self.array = array_of(config)
        super().__init__(
            {
                "command": In(CommandPort(Opcode.CONV)),
                "scratchpad": Out(ScratchpadRead(config)),
                "weight_write": In(WeightWrite(config)),
                "accumulators": In(AccumulatorRead(config)),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        config = self.config
        m.submodules.array = array = self.array
        m.submodules.accumulators = accumulators = Accumulators(config, array)
        m.submodules.weights = weights = WeightSequencer(config, array)
        m.submodules.activations = activations = ActivationSequencer(config)
        buffer: memory.Memory = memory.Memory(
            shape=8 * config.cols, depth=config.weight_words, init=[]
        )
        m.submodules.weight_buffer = buffer

        # A command waits here until both sequencers have taken it.
        held = record(CONV, reset_less=True)
        weights_wait, activations_wait = Signal(), Signal()
        m.d.comb += self.command.cmd.ready.eq(~weights_wait & ~activations_wait)
        for sequencer, wait in ((weights, weights_wait), (activations, activations_wait)):
            m.d.comb += [sequencer.command.valid.eq(wait), sequencer.command.p.eq(held)]
            with m.If(sequencer.command.ready):
                m.d.sync += wait.eq(0)
        with m.If(self.command.cmd.valid & self.command.cmd.ready):
            m.d.sync += [held.eq(self.command.cmd.p), weights_wait.eq(1), activations_wait.eq(1)]

        write, read = buffer.write_port(), buffer.read_port()
        m.d.comb += [
            self.weight_write.ready.eq(1),
            write.en.eq(self.weight_write.valid),
            write.addr.eq(self.weight_write.addr),
            write.data.eq(self.weight_write.data),
            read.en.eq(weights.read_en),
            read.addr.eq(weights.read_addr),
            activations.loaded.eq(weights.loaded),
            weights.swap.eq(activations.swap),
            self.command.retire.eq(accumulators.done),
            self.command.stalled.eq(self.scratchpad.valid & ~self.scratchpad.ready),
        ]
        self._enter_array(m, weights, activations, accumulators, read.data)
        for c in range(config.cols):
            m.d.comb += accumulators.sums[c].eq(array.sums[c])
        wiring.connect(m, activations.scratchpad, wiring.flipped(self.scratchpad))
        wiring.connect(m, accumulators.read, wiring.flipped(self.accumulators))
        return m

    def _enter_array(
        self,
        m: Module,
        weights: WeightSequencer,
        activations: ActivationSequencer,
        accumulators: Accumulators,
        weight: Value,
    ) -> None:
        """Feed the array what both sequencers bring, less their zero points, if there are any;
        ``weight``: the word of the weight buffer."""
        x, valid, tag, swap = activations.x, activations.valid, activations.tag, activations.swap
        capture = weights.capture
        if self.config.zero_points:
            m.submodules.edges = edges = ArrayEdges(self.config)
            m.d.comb += [
                edges.x.eq(x),
                edges.valid.eq(valid),
                edges.tag.eq(tag),
                edges.input_zero.eq(activations.input_zero),
                edges.swap.eq(swap),
                edges.weights.eq(weight),
                edges.weight_zero.eq(weights.weight_zero),
                edges.capture.eq(capture),
            ]
            x, valid, tag, swap = edges.o_x, edges.o_valid, edges.o_tag, edges.o_swap
            weight, capture = edges.o_weights, edges.o_capture
        m.d.comb += [
            self.array.weights.eq(weight),
            self.array.capture.eq(capture),
            self.array.swap.eq(swap),
            self.array.x.eq(x),
            self.array.valid.eq(valid),
            accumulators.valid.eq(valid),
            accumulators.tag.eq(tag),
        ]
