"""The transfer engines between DRAM and the on-chip memories: LOAD (also as WLOAD) and STORE."""

from __future__ import annotations

from amaranth.hdl import C, Cat, Module, Mux, Signal, ValueLike
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out, connect, flipped

from systole.hw.bus.interfaces import (
    CommandInterface,
    CommandPort,
    MemoryRead,
    MemoryReadInterface,
    MemoryWrite,
    MemoryWriteInterface,
    ReadInterface,
    ScratchpadRead,
    ScratchpadWrite,
    WeightWrite,
    WriteInterface,
    command_layout,
    record,
)
from systole.isa import Config, Fault, LoadTarget, Opcode
from systole.isa.commands import ADDRESS_BITS

RUN = data.StructLayout({"dram": 32, "local": ADDRESS_BITS, "count": 16, "target": 1, "last": 1})
"""A run of ``count`` vectors; ``last``: it is its command's last."""


def queue_depth(config: Config) -> int:
    """Runs that may be asked for ahead: enough to keep all bursts in flight."""
    return config.axi_outstanding + 2


class RunRequester(wiring.Component):
    """Turns transfer commands into runs and asks the memory for each with a request of its own, as
    fast as it takes them, with one idle cycle between commands.

    ``asked`` is high when the request for ``run`` is taken; it waits for ``room``. The manager
    denies a request before it takes another: from that cycle on ``refused`` is high, nothing more
    is asked for and no command taken, so the run refused is the last one asked for. ``stop``
    does the same while it is high. ``busy``: runs of the current command are still to be asked for.
    ``vectors`` are the bytes of a vector in DRAM, by target.
    """

    cmd: stream.Interface
    req: stream.Interface
    denied: Signal
    stop: Signal
    room: Signal
    asked: Signal
    run: data.View
    refused: Signal
    busy: Signal

    def __init__(self, opcode: Opcode, vectors: tuple[int, ...]):
        self.vectors = vectors
        self.layout = command_layout(opcode)
        request = data.StructLayout({"addr": 32, "bytes": 32})
        super().__init__(
            {
                "cmd": In(stream.Signature(self.layout)),
                "req": Out(stream.Signature(request)),
                "denied": In(1),
                "stop": In(1),
                "room": In(1),
                "asked": Out(1),
                "run": Out(RUN),
                "refused": Out(1),
                "busy": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        new, run = self.cmd.payload, self.run
        held = record(self.layout, reset_less=True)
        left1, left2 = (Signal(16, name=n, reset_less=True) for n in ("left1", "left2"))
        # Bit 32 says that the address has left the 32 bits: the run is refused, the engine stops.
        dram, next_dram = Signal(33, reset_less=True), Signal(33)
        group_dram, start, step = Signal(32, reset_less=True), Signal(32), Signal(32)
        local, group_local = (
            Signal(ADDRESS_BITS, name=n, reset_less=True) for n in ("local", "group_local")
        )
        next_local = Signal(ADDRESS_BITS)
        last_of_group, was_refused, go = Signal(), Signal(), Signal()

        m.d.comb += [
            self.refused.eq(self.denied | was_refused),
            go.eq(~self.refused & ~self.stop),
            self.cmd.ready.eq(~self.busy & go),
            last_of_group.eq(left1 == 1),
            run.dram.eq(dram),
            run.local.eq(local),
            run.count.eq(held.count0),
            run.last.eq(last_of_group & (left2 == 1)),
            self.req.valid.eq(self.busy & self.room & go),
            self.asked.eq(self.req.valid & self.req.ready),
        ]
        if len(self.vectors) > 1:
            m.d.comb += run.target.eq(held.target)
        m.d.sync += was_refused.eq(self.refused)

        for target, vector in enumerate(self.vectors):
            with m.If(run.target == target):
                # Whole vectors only, so that an engine never loses step with its beats.
                bits = (vector - 1).bit_length()
                m.d.comb += [
                    self.req.payload.addr.eq(Cat(C(0, bits), dram[bits:])),
                    self.req.payload.bytes.eq(run.count << bits),
                ]
        with m.If(dram[32]):
            # An empty request is denied like one outside the window.
            m.d.comb += self.req.payload.bytes.eq(0)

        m.d.comb += next_dram.eq(start + step)
        with m.If(last_of_group):
            m.d.comb += [
                start.eq(group_dram),
                step.eq(held.dram2),
                next_local.eq(group_local + held.local2),
            ]
        with m.Else():
            m.d.comb += [
                start.eq(dram),
                step.eq(held.dram1),
                next_local.eq(local + held.local1),
            ]
        with m.If(self.cmd.valid & self.cmd.ready):
            m.d.sync += [
                held.eq(new),
                self.busy.eq(1),
                dram.eq(new.dram),
                local.eq(new.local),
                group_dram.eq(new.dram),
                group_local.eq(new.local),
                left1.eq(new.count1),
                left2.eq(new.count2),
            ]
        with m.If(self.asked):
            m.d.sync += [dram.eq(next_dram), local.eq(next_local), left1.eq(left1 - 1)]
            with m.If(last_of_group):
                m.d.sync += [
                    group_dram.eq(next_dram),
                    group_local.eq(next_local),
                    left1.eq(held.count1),
                    left2.eq(left2 - 1),
                ]
            with m.If(run.last):
                m.d.sync += self.busy.eq(0)
        return m


def fail(m: Module, command: CommandInterface, failed: Signal, code: Fault) -> None:
    """Stop the engine for good: set ``failed`` and what :func:`report` will report."""
    m.d.sync += [failed.eq(1), command.fault_code.eq(code)]


def report(m: Module, command: CommandInterface, failed: Signal, address: ValueLike) -> None:
    """Pulse ``fault`` one cycle after ``failed`` rises: the ``retire`` before it is over by then.
    ``address`` must stay as it is from ``failed`` on."""
    reported = Signal()
    m.d.sync += [reported.eq(failed), command.fault.eq(failed & ~reported)]
    m.d.comb += command.fault_address.eq(address)


class LoadEngine(wiring.Component):
    """Copies runs of vectors from DRAM to the scratchpad or the weight buffer (see LOAD in
    ``isa.commands``).

    Takes a beat, or writes a word of it, every cycle as long as beats come and words are taken; a
    word leaves one cycle after its (last) beat came. While one waits, all but the last beat of the
    next are taken. Following runs, also of following commands,
    are asked for while beats arrive. ``retire`` comes one cycle after the last word was written.
    After a fault all beats are swallowed, so that they do not stand in the way of other clients.
    """

    command: CommandInterface
    memory: MemoryReadInterface
    scratchpad: WriteInterface
    weights: WriteInterface

    def __init__(self, config: Config):
        self.config = config
        super().__init__(
            {
                "command": In(CommandPort(Opcode.LOAD)),
                "memory": Out(MemoryRead(config)),
                "scratchpad": Out(ScratchpadWrite(config)),
                "weights": Out(WeightWrite(config)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, command, beats = self.config, self.command, self.memory.beats
        beat_bytes = config.beat_bytes
        lanes = {LoadTarget.SCRATCHPAD: config.rows, LoadTarget.WEIGHTS: config.cols}
        vectors = (config.vector_bytes, config.weight_vector_bytes)
        failed = Signal()

        # Runs asked for, oldest at the head, where it stays after a fault.
        m.submodules.queue = queue = SyncFIFO(width=RUN.size, depth=queue_depth(config))
        head = data.View(RUN, queue.r_data)
        report(m, command, failed, head.dram)
        m.submodules.requester = requester = RunRequester(Opcode.LOAD, vectors)
        connect(m, flipped(command).cmd, requester.cmd)
        connect(m, requester.req, flipped(self.memory).req)
        m.d.comb += [
            requester.denied.eq(self.memory.denied),
            requester.stop.eq(failed),
            requester.room.eq(queue.w_rdy),
            queue.w_en.eq(requester.asked),
            queue.w_data.eq(requester.run),
        ]

        # The word on its way to one of the memories.
        full, to_weights, last = Signal(), Signal(), Signal()
        word = Signal(8 * max(lanes.values()))
        address = Signal(ADDRESS_BITS)
        written = Signal()
        m.d.comb += [
            self.scratchpad.valid.eq(full & ~to_weights),
            self.scratchpad.addr.eq(address),
            self.scratchpad.data.eq(word),
            self.scratchpad.mask.eq(~0),
            self.weights.valid.eq(full & to_weights),
            self.weights.addr.eq(address),
            self.weights.data.eq(word),
            written.eq(full & Mux(to_weights, self.weights.ready, self.scratchpad.ready)),
        ]
        m.d.sync += command.retire.eq(written & last)
        with m.If(written):
            m.d.sync += full.eq(0)

        # ``step``: the beat at hand is used. ``whole``: this makes a word.
        step, whole, last_word = Signal(), Signal(), Signal()
        index = Signal(16)  # words of the run at the head that are done
        m.d.comb += last_word.eq(index + 1 == head.count)
        gathers = Signal()  # the beat at hand is not its word's last: it does not need ``word``
        with m.If(failed):
            m.d.comb += beats.ready.eq(1)
        with m.Elif(queue.r_rdy & (~full | written)):
            with m.If(requester.refused & (queue.r_level == 1)):
                fail(m, command, failed, Fault.DRAM_WINDOW)
            with m.Elif(beats.valid & beats.payload.error):
                fail(m, command, failed, Fault.AXI_READ)
            with m.Elif(beats.valid):
                m.d.comb += step.eq(1)
        with m.Elif(queue.r_rdy & gathers & beats.valid & ~beats.payload.error):
            m.d.comb += step.eq(1)

        most = max(vectors) // beat_bytes
        part = Signal(range(max(2, most)))  # beats of a longer word that have been gathered
        gathered = [
            Signal(config.axi_data_bits, name=f"gathered_{k}", reset_less=True)
            for k in range(most - 1)
        ]
        for (target, width), vector in zip(lanes.items(), vectors, strict=True):
            if vector > beat_bytes:
                with m.If(head.target == target):
                    m.d.comb += gathers.eq(part != vector // beat_bytes - 1)
            with m.If(step & (head.target == target)):
                if vector > beat_bytes:
                    before = gathered[: vector // beat_bytes - 1]
                    m.d.comb += [whole.eq(part == len(before)), beats.ready.eq(1)]
                    m.d.sync += part.eq(Mux(whole, 0, part + 1))
                    for k, piece in enumerate(before):
                        with m.If(part == k):
                            m.d.sync += piece.eq(beats.payload.data)
                    with m.If(whole):
                        m.d.sync += word.eq(Cat(before, beats.payload.data)[: 8 * width])
                else:
                    lane = Signal(range(beat_bytes // vector), name=f"lane_{target}")
                    m.d.comb += [
                        lane.eq(head.dram[(vector - 1).bit_length() :] + index),
                        whole.eq(1),
                        beats.ready.eq(last_word | lane.all()),
                    ]
                    with m.Switch(lane):
                        for k in range(beat_bytes // vector):
                            with m.Case(k):
                                at = 8 * vector * k
                                m.d.sync += word.eq(beats.payload.data[at : at + 8 * width])
        with m.If(whole):
            m.d.comb += queue.r_en.eq(last_word)
            m.d.sync += [
                full.eq(1),
                to_weights.eq(head.target),
                address.eq(head.local + index),
                last.eq(head.last & last_word),
                index.eq(Mux(last_word, 0, index + 1)),
            ]
        m.d.comb += command.stalled.eq(
            (requester.busy | queue.r_rdy | full) & ~step & ~written & ~failed
        )
        return m


class StoreEngine(wiring.Component):
    """Copies runs of scratchpad words to DRAM (see STORE in ``isa.commands``).

    Reads ahead up to ``WORDS`` words and offers a beat, or fills a part of one, every cycle as long
    as scratchpad and memory keep up. Neither the requests nor the reads of following runs, also of
    following commands, wait for write responses. ``retire`` comes one cycle after a command's last
    run was done. After a fault the runs already asked for are still carried out, so that they do
    not stand in the way of other clients.
    """

    WORDS = 8

    command: CommandInterface
    scratchpad: ReadInterface
    memory: MemoryWriteInterface

    def __init__(self, config: Config):
        self.config = config
        super().__init__(
            {
                "command": In(CommandPort(Opcode.STORE)),
                "scratchpad": Out(ScratchpadRead(config)),
                "memory": Out(MemoryWrite(config)),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        config, command, memory = self.config, self.command, self.memory
        vector, beat_bytes = config.vector_bytes, config.beat_bytes
        failed = Signal()

        # Runs to read, and runs asked for whose responses are to come.
        m.submodules.reads = reads = SyncFIFO(width=RUN.size, depth=queue_depth(config))
        m.submodules.pending = pending = SyncFIFO(width=RUN.size, depth=queue_depth(config))
        m.submodules.requester = requester = RunRequester(Opcode.STORE, (vector,))
        connect(m, flipped(command).cmd, requester.cmd)
        connect(m, requester.req, flipped(memory).req)
        m.d.comb += [
            requester.denied.eq(memory.denied),
            requester.stop.eq(failed),
            requester.room.eq(reads.w_rdy & pending.w_rdy),
        ]
        for queue in (reads, pending):
            m.d.comb += [queue.w_en.eq(requester.asked), queue.w_data.eq(requester.run)]

        # Read words, with what the beats need to know about them, into a FIFO. A run that is
        # refused is read too: no beats are taken for it, and nothing follows.
        lanes = max(1, beat_bytes // vector)
        place = data.StructLayout({"lane": max(1, (lanes - 1).bit_length()), "last": 1})
        entry = data.StructLayout({"word": 8 * config.rows, "place": place})
        m.submodules.words = words = SyncFIFO(width=entry.size, depth=self.WORDS)
        run = data.View(RUN, reads.r_data)
        index = Signal(16)  # words of the run that have been read
        arriving, place_arriving = Signal(), record(place)
        accepted, last_word = Signal(), Signal()
        m.d.comb += [
            self.scratchpad.valid.eq(reads.r_rdy & (words.r_level + arriving < self.WORDS)),
            self.scratchpad.addr.eq(run.local + index),
            accepted.eq(self.scratchpad.valid & self.scratchpad.ready),
            last_word.eq(index + 1 == run.count),
            reads.r_en.eq(accepted & last_word),
            words.w_en.eq(arriving),
            words.w_data.eq(Cat(self.scratchpad.data, place_arriving)),
        ]
        m.d.sync += arriving.eq(accepted)
        with m.If(accepted):
            first_lane = run.dram[(vector - 1).bit_length() :]
            m.d.sync += [
                index.eq(Mux(last_word, 0, index + 1)),
                place_arriving.lane.eq((first_lane + index) & (lanes - 1)),
                place_arriving.last.eq(last_word),
            ]

        # Pack them into beats: several beats a word, or up to ``lanes`` words a beat.
        head = data.View(entry, words.r_data)
        beat = Signal(config.axi_data_bits)
        strobe = Signal(lanes)
        valid, step, complete = Signal(), Signal(), Signal()
        m.d.comb += [
            memory.beats.valid.eq(valid),
            memory.beats.payload.data.eq(beat),
            memory.beats.payload.strobe.eq(Cat(s.replicate(beat_bytes // lanes) for s in strobe)),
            step.eq(words.r_rdy & (~valid | memory.beats.ready)),
        ]
        word = Cat(head.word, C(0, 8 * (vector - config.rows)))
        with m.If(memory.beats.ready):
            m.d.sync += valid.eq(0)
        with m.If(step):
            m.d.sync += valid.eq(complete)
        if vector > beat_bytes:
            parts = vector // beat_bytes
            part = Signal(range(parts))
            m.d.comb += [complete.eq(1), words.r_en.eq(step & part.all()), strobe.eq(~0)]
            with m.If(step):
                m.d.sync += part.eq(part + 1)
                with m.Switch(part):
                    for k in range(parts):
                        with m.Case(k):
                            m.d.sync += beat.eq(word[8 * beat_bytes * k : 8 * beat_bytes * (k + 1)])
        else:
            fresh = Signal()  # the next word opens a new beat
            m.d.comb += [
                complete.eq(head.place.last | (head.place.lane == lanes - 1)),
                words.r_en.eq(step),
            ]
            with m.If(step):
                m.d.sync += fresh.eq(complete)
                for k in range(lanes):
                    with m.If(head.place.lane == k):
                        m.d.sync += beat[8 * vector * k : 8 * vector * (k + 1)].eq(word)
                        m.d.sync += strobe[k].eq(1)
                    with m.Elif(fresh):
                        m.d.sync += strobe[k].eq(0)

        oldest = data.View(RUN, pending.r_data)  # stays after a fault
        report(m, command, failed, oldest.dram)
        m.d.sync += command.retire.eq(0)
        with m.If(~failed):
            with m.If(memory.done & memory.error):
                fail(m, command, failed, Fault.AXI_WRITE)
            with m.Elif(memory.done):
                m.d.comb += pending.r_en.eq(1)
                m.d.sync += command.retire.eq(oldest.last)
            with m.Elif(requester.refused & (pending.r_level == 1)):
                fail(m, command, failed, Fault.DRAM_WINDOW)
        m.d.comb += command.stalled.eq(
            (requester.busy | pending.r_rdy) & ~accepted & ~step & ~failed
        )
        return m
