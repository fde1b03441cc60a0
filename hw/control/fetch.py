"""The fetch unit: reads the program from DRAM and hands its commands to the engines' queues."""

from __future__ import annotations

from typing import cast

from amaranth.hdl import Array, C, Cat, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out

from systole.hw.bus.interfaces import (
    INDEX_BITS,
    MemoryRead,
    MemoryReadInterface,
    record,
)
from systole.isa import COMMANDS, Config, Engine, Fault, Opcode
from systole.isa.commands import ENGINE_BITS, HEADER
from systole.isa.csr import NO_ENGINE
from systole.isa.timing import FETCH_BUFFER_BYTES, FETCH_REQUEST_WORDS

WORD_BITS = 64
LONGEST = max(c.words for c in COMMANDS.values())
"""Words of the longest command."""
PLACE_BITS = (LONGEST - 1).bit_length()
"""Bits of a word's position in its command."""
REST_BITS = WORD_BITS - sum(f.bits for f in HEADER)
"""Bits of a command's first word behind the header."""

HEAD = data.StructLayout({f.name: f.bits for f in HEADER} | {"rest": REST_BITS})
"""A command's first word."""

FAULT_REPORT = data.StructLayout(
    {"valid": 1, "code": 4, "index": INDEX_BITS, "engine": 4, "address": 32}
)
"""A fault and where it happened; ``valid`` pulses, or stays until the reset. Every unit that can
fail has such an output."""

OPCODE_OF: dict[Engine, Opcode] = {
    engine: command.opcode for command in COMMANDS.values() for engine in command.engines
}
"""The one kind of command each engine takes."""


def engines_of(config: Config) -> tuple[Engine, ...]:
    """The engines that exist."""
    return tuple(e for e in Engine if e is not Engine.WINDOW or config.window)


class Fetch(wiring.Component):
    """Runs through the ``words`` 64-bit words at byte ``program`` of the DRAM window.

    ``start`` pulses while ``idle``; ``program`` (a multiple of 64) and ``words`` are sampled with
    it. Words are taken at one a cycle, so that a command of which n are present takes n cycles when
    the bus is at least 64 bits wide. All but its first go to its engine as they come: ``write``
    (one bit per engine), ``word`` and ``place``, its position in the command. The first, with
    ``place`` 0, comes last: on ``index`` and with ``push`` (one bit per engine), too, until that
    engine's ``ready``; only then is the command complete and known to be legal.

    ``ended`` is high from the END command to the next start. ``idle``: no request is pending and
    every beat asked for has been taken. ``last_index`` is the index of the last complete command (0
    before the first). A fault (illegal command, a wait or signal of an engine that does not exist,
    no END, program outside the window, read error) pulses in ``fault`` and stops the unit until it
    is reset. While ``halt`` is high nothing is asked for and nothing handed out.
    """

    start: Signal
    halt: Signal
    program: Signal
    words: Signal
    memory: MemoryReadInterface
    index: Signal
    word: Signal
    place: Signal
    write: Signal
    push: Signal
    ready: Signal
    ended: Signal
    idle: Signal
    last_index: Signal
    fault: data.View

    def __init__(self, config: Config):
        self.config = config
        super().__init__(
            {
                "start": In(1),
                "halt": In(1),
                "program": In(32),
                "words": In(32),
                "memory": Out(MemoryRead(config)),
                "index": Out(INDEX_BITS),
                "word": Out(WORD_BITS),
                "place": Out(PLACE_BITS),
                "write": Out(len(Engine)),
                "push": Out(len(Engine)),
                "ready": In(len(Engine)),
                "ended": Out(1),
                "idle": Out(1),
                "last_index": Out(INDEX_BITS),
                "fault": Out(FAULT_REPORT),
            }
        )
        self._prefetch, self._unpack = Prefetch(config), Unpack(config)
        self._running = Signal()
        self._goes_on = Signal()
        self._left = Signal(32)  # words of the program still to come
        self._some_left = Signal()  # it is not 0
        self._index = Signal(INDEX_BITS)
        self._head = record(
            data.StructLayout({f.name: f.bits for f in HEADER} | {"rest": REST_BITS})
        )
        self._engines = engines_of(config)
        self._known = Signal(len(Engine))  # engines of which there is a last command
        self._next = Signal(WORD_BITS, reset_less=True)  # the next word, if ``_comes``
        self._comes = Signal()
        # The one after it: so the prefetch buffer need not know at once whether a word was taken.
        self._spare = Signal(WORD_BITS, reset_less=True)
        self._spare_comes = Signal()
        self._full = Signal()  # the command is whole, or its opcode illegal
        # Words of the command still to come; 0 while it is full.
        self._missing = Signal(self._head.present.shape())
        # About the command, from its first word.
        self._target = Signal(len(Engine))  # the engine that it is for, if it is legal
        self._end = Signal()  # it is a legal END
        self._pushed = Signal()

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.prefetch = self._prefetch
        m.submodules.unpack = self._unpack
        self._connect(m)
        m.d.comb += [
            self.index.eq(self._index),
            self._goes_on.eq(self._running & ~self.halt),
            # END and illegal commands have no target.
            self.push.eq(Mux(self._goes_on & self._full, self._target, 0)),
            self._pushed.eq((self.push & self.ready).any()),
            self.fault.engine.eq(NO_ENGINE),
            self.fault.index.eq(self._index),
        ]
        m.d.sync += self.fault.valid.eq(0)
        with m.If(self._goes_on):
            self._hand_out(m)
        self._take_word(m)
        with m.If(self.start):
            self._begin(m)
        return m

    def _connect(self, m: Module) -> None:
        memory, prefetch, unpack = self.memory, self._prefetch, self._unpack
        wiring.connect(m, prefetch.beats, unpack.beats)
        wiring.connect(m, wiring.flipped(memory), prefetch.memory)
        m.d.comb += [
            prefetch.start.eq(self.start),
            prefetch.stop.eq(self.ended | self.halt),
            prefetch.program.eq(self.program),
            prefetch.words.eq(self.words),
            unpack.start.eq(self.start),
            unpack.program.eq(self.program),
            unpack.discard.eq(self.ended),
            self.idle.eq(prefetch.idle),
        ]

    def _check_command(self, m: Module, head: data.View) -> None:
        """Where the command goes, if it is legal, when its ``head`` comes: which is when the
        command before it is handed out, if it has not been."""
        existing = sum(1 << e for e in self._engines)
        absent = ~existing & ((1 << ENGINE_BITS) - 1)
        target, end, complete, excess = Signal(len(Engine)), Signal(), Signal(), Signal()
        with m.Switch(head.opcode):
            for command in COMMANDS.values():
                with m.Case(command.opcode):
                    m.d.comb += [
                        complete.eq(head.present == command.complete),
                        excess.eq((head.present & ~C(command.complete, len(self._missing))).any()),
                    ]
                    if command.opcode is Opcode.END:
                        m.d.comb += end.eq(1)
                    for engine in command.engines:
                        if existing >> engine & 1:
                            with m.If(head.engine == engine):
                                m.d.comb += target.eq(1 << engine)
        tokens = ((head.wait | head.signal) & absent) == 0
        known = self._known | Mux(self._full, self._target, 0) | complete.replicate(len(Engine))
        m.d.sync += [
            self._target.eq(Mux(~excess & tokens, target & known, 0)),
            self._end.eq(end & complete & ~excess),
        ]

    def _fail(self, m: Module, code: Fault, address: Value | int = 0) -> None:
        m.d.sync += [
            self.fault.valid.eq(1),
            self.fault.code.eq(code),
            self.fault.address.eq(address),
            self._running.eq(0),
        ]

    def _hand_out(self, m: Module) -> None:
        """Offer the command to its engine, end the program, or fail."""
        full, prefetch, word = self._full, self._prefetch, self._unpack.word
        with m.If(full & ~self._end & (self._target == 0)):
            self._fail(m, Fault.ILLEGAL_COMMAND)
        with m.Elif(full & self._end):
            m.d.sync += [self.ended.eq(1), self._running.eq(0), full.eq(0)]
        with m.Elif(full), m.If(self._pushed):
            m.d.sync += [
                self._index.eq(self._index + 1),
                full.eq(0),
                self._known.eq(self._known | self._target),
            ]
        with m.Elif(~self._some_left):
            self._fail(m, Fault.ILLEGAL_COMMAND)
        with m.Elif(~self._comes & prefetch.over):
            self._fail(m, Fault.DRAM_WINDOW, self.memory.req.payload.addr)
        with m.Elif(~self._comes & word.valid & word.payload.error):
            self._fail(m, Fault.AXI_READ, self._unpack.address)

    def _take_word(self, m: Module) -> None:
        """Put the next word where it belongs: the head, or the queue of the head's engine."""
        word, head, missing, left = self._unpack.word, self._head, self._missing, self._left
        new = cast(data.View, data.View(head.shape(), self._next))
        opcodes = Array(i in COMMANDS for i in range(1 << len(head.opcode)))
        more = Signal.like(missing)  # words still missing once this one has been taken
        taken, accepts = Signal(), Signal()
        m.d.comb += [
            accepts.eq((self._goes_on & ~self._full) | self._pushed),
            taken.eq(self._comes & self._some_left & accepts),
            # A word in error stays where it is until all before it has gone.
            word.ready.eq(~self._spare_comes & ~word.payload.error),
            self.word.eq(Mux(self._full, head, self._next)),
        ]
        arrives = word.valid & word.ready
        with m.If(arrives):
            m.d.sync += self._spare.eq(word.payload.data)
        with m.If(~self._comes | taken):
            m.d.sync += [
                self._comes.eq(self._spare_comes | arrives),
                self._spare_comes.eq(0),
                self._next.eq(Mux(self._spare_comes, self._spare, word.payload.data)),
            ]
        with m.Elif(arrives):
            m.d.sync += self._spare_comes.eq(1)
        with m.If(self._full):
            m.d.comb += self.write.eq(self.push & self.ready)
        with m.If(taken):
            with m.If(missing == 0):
                m.d.comb += more.eq(Mux(opcodes[new.opcode], new.present, 0))
                m.d.sync += head.eq(new)
                self._check_command(m, new)
            with m.Else():
                m.d.comb += [more.eq(missing & (missing - 1)), self.write.eq(self._target)]
            for place in range(1, LONGEST):
                with m.If((missing & ~more)[place - 1]):
                    m.d.comb += self.place.eq(place)
            m.d.sync += [
                left.eq(left - 1),
                self._some_left.eq(left != 1),
                missing.eq(more),
            ]
            with m.If(more == 0):
                m.d.sync += self._full.eq(1)
                with m.If(self._pushed):
                    m.d.sync += self.last_index.eq(self._index + 1)
                with m.Else():
                    m.d.sync += self.last_index.eq(self._index)

    def _begin(self, m: Module) -> None:
        m.d.sync += [
            self._running.eq(1),
            self.ended.eq(0),
            self._left.eq(self.words),
            self._some_left.eq(self.words != 0),
            self._index.eq(0),
            self.last_index.eq(0),
            self._known.eq(0),
            self._missing.eq(0),
            self._full.eq(0),
            self._comes.eq(0),
            self._spare_comes.eq(0),
        ]


def _beat_layout(config: Config) -> data.StructLayout:
    return data.StructLayout({"data": config.axi_data_bits, "error": 1})


class Prefetch(wiring.Component):
    """Asks for the program piece by piece, never for more beats than its buffer has room for.

    ``stop`` ends asking (a request already offered stays). ``denied``: the last request, still in
    ``memory.req.payload``, was outside the DRAM window; nothing more is asked for. ``idle``: no
    request is offered and all beats to come have left through ``beats``. ``over``: both, in the
    cycle before.
    """

    start: Signal
    stop: Signal
    program: Signal
    words: Signal
    denied: Signal
    idle: Signal
    over: Signal
    memory: MemoryReadInterface
    beats: stream.Interface

    def __init__(self, config: Config):
        self.config = config
        super().__init__(
            {
                "start": In(1),
                "stop": In(1),
                "program": In(32),
                "words": In(32),
                "denied": Out(1),
                "idle": Out(1),
                "over": Out(1),
                "memory": Out(MemoryRead(config)),
                "beats": Out(stream.Signature(_beat_layout(config))),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        bits = self.config.axi_data_bits
        depth = 8 * FETCH_BUFFER_BYTES // bits
        m.submodules.buffer = buffer = SyncFIFOBuffered(width=bits, depth=depth)
        req, beats = self.memory.req, self.memory.beats
        m.d.comb += [
            buffer.w_data.eq(beats.payload.data),
            buffer.w_en.eq(beats.valid),
            beats.ready.eq(buffer.w_rdy),
            self.beats.payload.data.eq(buffer.r_data),
            self.beats.valid.eq(buffer.r_rdy),
            buffer.r_en.eq(self.beats.ready),
        ]
        self._mark_error(m, buffer)

        left = Signal(32)
        address = Signal(32)
        ask = Signal(range(FETCH_REQUEST_WORDS + 1))
        ask_beats = Signal(range(FETCH_REQUEST_WORDS * WORD_BITS // bits + 1))
        reserved = Signal(range(depth + 1))
        asked = Signal.like(ask_beats)  # Beats of the last request.
        begin = Signal()
        # In the cycle before, a beat left and the request was taken.
        popped, taken = Signal(), Signal()
        m.d.comb += [
            ask.eq(Mux(left < FETCH_REQUEST_WORDS, left, FETCH_REQUEST_WORDS)),
            ask_beats.eq((ask * WORD_BITS + (bits - 1)) // bits),
            # When ``denied`` pulses, the request in question was taken two cycles before.
            begin.eq(
                ~req.valid
                & ~taken
                & ~self.stop
                & ~self.denied
                & ~self.memory.denied
                & (left != 0)
                & (reserved <= depth - FETCH_REQUEST_WORDS * WORD_BITS // bits)
            ),
            self.idle.eq(~req.valid & (reserved == 0)),
        ]
        m.d.sync += [
            popped.eq(self.beats.valid & self.beats.ready),
            taken.eq(req.valid & req.ready),
            self.over.eq(self.denied & self.idle),
        ]
        with m.If(req.valid & req.ready):
            m.d.sync += req.valid.eq(0)
        with m.If(begin):
            m.d.sync += [
                req.valid.eq(1),
                req.payload.addr.eq(address),
                req.payload.bytes.eq(ask * (WORD_BITS // 8)),
                address.eq(address + FETCH_REQUEST_WORDS * WORD_BITS // 8),
                left.eq(left - ask),
                asked.eq(ask_beats),
            ]
        with m.If(begin | popped | self.memory.denied):
            m.d.sync += reserved.eq(
                reserved + Mux(begin, ask_beats, 0) - Mux(self.memory.denied, asked, 0) - popped
            )
        with m.If(self.memory.denied):
            m.d.sync += self.denied.eq(1)
        with m.If(self.start):
            m.d.sync += [address.eq(self.program), left.eq(self.words), self.denied.eq(0)]
        return m

    def _mark_error(self, m: Module, buffer: SyncFIFOBuffered) -> None:
        """Mark the first beat in error, after which nothing is of use. A count of the beats ahead
        of it says when it comes sooner in the cycle than a bit of the buffer's memory would."""
        beats = self.memory.beats
        erred = Signal()
        ahead = Signal(range(buffer.depth + 1))
        popped = self.beats.valid & self.beats.ready
        m.d.comb += self.beats.payload.error.eq(erred & (ahead == 0))
        with m.If(~erred):
            m.d.sync += [
                erred.eq(beats.valid & beats.ready & beats.payload.error),
                ahead.eq(buffer.r_level - popped),
            ]
        with m.Elif(popped):
            m.d.sync += ahead.eq(ahead - 1)
        with m.If(self.start):
            m.d.sync += erred.eq(0)


class Unpack(wiring.Component):
    """Turns bus beats into 64-bit words, one a cycle (one every other cycle from a 32-bit bus).

    The first beat after ``start`` begins with a word. ``address`` is the byte offset in the DRAM
    window of the beat that the word comes from. ``discard`` swallows beats.
    """

    start: Signal
    discard: Signal
    program: Signal
    address: Signal
    beats: stream.Interface
    word: stream.Interface

    def __init__(self, config: Config):
        self.config = config
        super().__init__(
            {
                "start": In(1),
                "discard": In(1),
                "program": In(32),
                "address": Out(32),
                "beats": In(stream.Signature(_beat_layout(config))),
                "word": Out(stream.Signature(data.StructLayout({"data": WORD_BITS, "error": 1}))),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        bits = self.config.axi_data_bits
        beat, word = self.beats, self.word
        taken = Signal()
        m.d.comb += [
            taken.eq(word.valid & word.ready),
            word.payload.error.eq(beat.payload.error),
        ]
        if bits < WORD_BITS:
            low = Signal(bits)
            half = Signal()
            # A low half in error is passed on at once, so that the error is never lost.
            m.d.comb += [
                word.payload.data.eq(Cat(low, beat.payload.data)),
                word.valid.eq(beat.valid & (half | beat.payload.error)),
                beat.ready.eq(taken | (~half & ~beat.payload.error) | self.discard),
            ]
            with m.If(beat.valid & beat.ready):
                m.d.sync += [low.eq(beat.payload.data), half.eq(~half)]
            with m.If(self.start):
                m.d.sync += half.eq(0)
        else:
            parts = bits // WORD_BITS
            part = Signal(range(parts))
            m.d.comb += [
                word.payload.data.eq(beat.payload.data.word_select(part, WORD_BITS)),
                word.valid.eq(beat.valid),
                beat.ready.eq((taken & (part == parts - 1)) | self.discard),
            ]
            with m.If(taken):
                m.d.sync += part.eq(Mux(part == parts - 1, 0, part + 1))
            with m.If(self.start):
                m.d.sync += part.eq(0)
        with m.If(beat.valid & beat.ready):
            m.d.sync += self.address.eq(self.address + bits // 8)
        with m.If(self.start):
            m.d.sync += self.address.eq(self.program)
        return m
