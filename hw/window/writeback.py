"""The end of the WINDOW engine: results on their way into the scratchpad."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from systole.hw.arithmetic.requantise import clamped_to, ordered_low
from systole.hw.bus.interfaces import (
    ScratchpadWrite,
    WriteInterface,
    command_layout,
    mask_of,
    record,
)
from systole.hw.window.walk import OutputWalk
from systole.isa import Config, Opcode, WindowOp
from systole.isa.commands import ADDRESS_BITS
from systole.isa.config import bits_for

IN_FLIGHT = 22
"""Words that a token can have been issued for and that are not yet written: more than the longest
way through the pipeline (data, reduction, requantisation, result: 20 cycles) and a result that
waits."""


class PendingWrites(wiring.Component):
    """Where the results under way will be written, oldest first.

    ``push`` appends ``addr``, ``number`` (of the pass) and ``end``; there must never be more than
    ``IN_FLIGHT``. ``pop`` removes the oldest, which is at ``o_addr``, ``o_number`` and ``o_end``
    from the third cycle after its ``push`` on, or from the cycle after its predecessor's ``pop``.
    ``clash``: ``check`` is one of the addresses (with ``checks``, or else 0).
    """

    push: Signal
    addr: Signal
    number: Signal
    end: Signal
    pop: Signal
    o_addr: Signal
    o_number: Signal
    o_end: Signal
    empty: Signal
    checks: Signal
    check: Signal
    clash: Signal

    def __init__(self, config: Config) -> None:
        # The scratchpad does not look at more, either.
        self._bits = bits_for(config.scratchpad_words)
        self._numbers = range(config.window_passes)
        super().__init__(
            {
                "push": In(1),
                "addr": In(self._bits),
                "number": In(self._numbers),
                "end": In(1),
                "pop": In(1),
                "o_addr": Out(self._bits),
                "o_number": Out(self._numbers),
                "o_end": Out(1),
                "empty": Out(1),
                "checks": In(1),
                "check": In(self._bits),
                "clash": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        entry = data.StructLayout({"addr": self._bits, "number": self._numbers, "end": 1})
        entries = [record(entry, name=f"entry{i}", reset_less=True) for i in range(IN_FLIGHT)]
        used = Signal(IN_FLIGHT)
        # Where the next goes; where the oldest is; where the one behind it is.
        free, oldest, following = (
            Signal(range(IN_FLIGHT), name=n) for n in ("free", "oldest", "following")
        )
        one = Const(1, IN_FLIGHT)
        place = Signal(IN_FLIGHT)
        with m.If(self.push | self.pop):
            popped = Mux(self.pop, (one << oldest)[:IN_FLIGHT], 0)
            m.d.sync += used.eq((used & ~popped) | place)
        with m.If(self.push):
            m.d.comb += place.eq(one << free)
            m.d.sync += free.eq(_after(free))
        for chosen, e in zip(place, entries, strict=True):
            with m.If(chosen):
                m.d.sync += [e.addr.eq(self.addr), e.number.eq(self.number), e.end.eq(self.end)]
        # The oldest in a register of its own, so that the arbiter has it early.
        shown, found, entry_found = Signal(), Signal(), record(entry, name="entry_found")
        with m.Switch(following):
            for i, e in enumerate(entries):
                with m.Case(i):
                    m.d.comb += [found.eq(used[i]), entry_found.eq(e)]
        with m.If(self.pop | ~shown):
            m.d.sync += shown.eq(found)
            with m.If(found):
                m.d.sync += [
                    self.o_addr.eq(entry_found.addr),
                    self.o_number.eq(entry_found.number),
                    self.o_end.eq(entry_found.end),
                    oldest.eq(following),
                    following.eq(_after(following)),
                ]
        hits = Signal(IN_FLIGHT)
        with m.If(self.checks):
            m.d.comb += hits.eq(used & Cat(e.addr == self.check for e in entries))
        m.d.comb += [self.empty.eq(~used.any()), self.clash.eq(hits.any())]
        return m


def _after(place: Signal) -> Value:
    """The place behind ``place``, in a circle."""
    return Mux(place == IN_FLIGHT - 1, 0, place + 1)


class WriteBack(wiring.Component):
    """Writes the results in order, each to the address that was set aside when it was announced.

    * ``cmd``, ``start``: the command whose outputs are announced, as for
      :class:`~hw.window.walk.OutputWalk`.
    * ``announce``: a token that completes a word is on its way. ``last_word``: it is its pixel's
      last (IM2COL).
    * ``requantised``, ``maxima``, ``collected``: results, at most one in a cycle, taken when
      ``en``. Those collected are whole words, the others the channels of a pass. Maxima are 32
      bits a lane and still to be clamped to ``low``..``high`` of ``cmd``.
    * ``en``: the pipeline moves. It stands still while two results wait for the scratchpad.
    * ``checks``, ``check``, ``clash``: whether a word is still to be written, as for
      :class:`PendingWrites`; with ``follows``, also the one that is announced next. ``drained``:
      none is to be written that has been announced.
    * ``retire``: the last word of a command was written in the cycle before.
    """

    cmd: data.View
    start: Signal
    announce: Signal
    last_word: Signal
    requantised: stream.Interface
    maxima: stream.Interface
    collected: stream.Interface
    en: Signal
    checks: Signal
    check: Signal
    follows: Signal
    clash: Signal
    drained: Signal
    retire: Signal
    scratchpad: WriteInterface

    def __init__(self, config: Config):
        self.config = config
        word, reduced = 8 * config.rows, 8 * config.reduced_lanes
        always = {"always_ready": True}
        super().__init__(
            {
                "cmd": In(command_layout(Opcode.WINDOW)),
                "start": In(1),
                "announce": In(1),
                "last_word": In(1),
                "requantised": In(stream.Signature(reduced, **always)),
                "maxima": In(stream.Signature(4 * reduced, **always)),
                "collected": In(stream.Signature(word, **always)),
                "en": Out(1),
                "checks": In(1),
                "check": In(ADDRESS_BITS),
                "follows": In(1),
                "clash": Out(1),
                "drained": Out(1),
                "retire": Out(1),
                "scratchpad": Out(ScratchpadWrite(config)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        word = 8 * self.config.rows
        write = self.scratchpad
        m.submodules.outputs = outputs = OutputWalk(self.config)
        m.submodules.pending = pending = PendingWrites(self.config)
        written = Signal()
        m.d.comb += [
            outputs.cmd.eq(self.cmd),
            outputs.start.eq(self.start),
            outputs.step.eq(self.announce),
            outputs.last_word.eq(self.last_word),
            pending.push.eq(self.announce),
            pending.addr.eq(outputs.addr),
            pending.number.eq(outputs.number),
            pending.end.eq(outputs.end),
            pending.pop.eq(written),
            pending.checks.eq(self.checks),
            pending.check.eq(self.check),
            self.clash.eq(pending.clash | (self.follows & (pending.check == pending.addr))),
            self.drained.eq(pending.empty),
        ]
        m.d.sync += self.retire.eq(written & pending.o_end)

        result, comes = self._find_result(m)
        # Two results find room. ``en`` and ``valid`` are registers: the answer of the scratchpad
        # does not travel up the pipeline in its cycle.
        first, second = (Signal(word, name=n, reset_less=True) for n in ("first", "second"))
        has_first, has_second = Signal(), Signal()
        push = self.en & comes
        m.d.comb += [
            self.en.eq(~has_second),
            write.valid.eq(has_first),
            write.addr.eq(pending.o_addr),
            write.data.eq(first),
            write.mask.eq(self._mask(pending.o_number)),
            written.eq(write.valid & write.ready),
        ]
        with m.If(written):
            m.d.sync += [has_first.eq(has_second | push), has_second.eq(0)]
        with m.Elif(push):
            m.d.sync += [has_first.eq(1), has_second.eq(has_first)]
        with m.If(push):
            m.d.sync += second.eq(result)
        with m.If(written | ~has_first):
            with m.If(has_second):
                m.d.sync += first.eq(second)
            with m.Elif(comes):
                m.d.sync += first.eq(result)
        return m

    def _find_result(self, m: Module) -> tuple[Signal, Signal]:
        """The result that comes, and whether one does."""
        result = Signal(8 * self.config.rows)
        comes = Signal()
        low, high = self.cmd.low, self.cmd.high
        lower = Signal(signed(8), reset_less=True)
        m.d.sync += lower.eq(ordered_low(low, high))
        m.d.comb += comes.eq(self.requantised.valid | self.maxima.valid | self.collected.valid)
        with m.If(self.requantised.valid):
            m.d.comb += result.eq(self.requantised.payload.replicate(self.config.window_passes))
        with m.Elif(self.collected.valid):
            m.d.comb += result.eq(self.collected.payload)
        with m.Elif(self.maxima.valid):
            self._clamp_maxima(m, result, lower, high)
        return result, comes

    def _clamp_maxima(self, m: Module, result: Signal, lower: Signal, high: Value) -> None:
        """The results of MAX, between limits in order."""
        clamped = Signal(8 * self.config.reduced_lanes)
        for i in range(self.config.reduced_lanes):
            value = self.maxima.payload[32 * i :][:8].as_signed()
            m.d.comb += clamped.word_select(i, 8).eq(clamped_to(lower, high, value))
        m.d.comb += result.eq(clamped.replicate(self.config.window_passes))

    def _mask(self, number: Signal) -> Value:
        """The parts of a word that a pass writes; IM2COL writes all of them."""
        own = mask_of(number, self.config.window_passes, self.config)
        if self.config.window_passes == 1:
            return own
        return own | (self.cmd.op == WindowOp.IM2COL).replicate(len(own))
