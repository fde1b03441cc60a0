"""Bus and stream signatures shared by the engines, and the hardware layouts derived from
``isa``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

from amaranth.hdl import Cat, Const, Signal, Value, signed, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from systole.isa import COMMANDS, Config, Field, Opcode
from systole.isa.commands import ACC_ADDRESS_BITS, ADDRESS_BITS

INDEX_BITS = 24
"""Width of a command's index in the program."""


def layout_of(fields: Iterable[Field]) -> data.StructLayout:
    """The hardware layout of a list of ``isa`` fields, packed from bit 0."""
    return data.StructLayout(
        {f.name: signed(f.bits) if f.signed else unsigned(f.bits) for f in fields}
    )


def record(
    layout: data.StructLayout,
    *,
    name: str | None = None,
    init: Mapping[str, int] | None = None,
    reset_less: bool = False,
) -> data.View:
    """A signal of this layout: ``Signal(layout, ...)`` with the type that it really has."""
    signal = Signal(layout, name=name, init=cast(Any, init), reset_less=reset_less, src_loc_at=1)
    return cast(data.View, signal)


def command_layout(opcode: Opcode) -> data.StructLayout:
    """The layout of one kind of command, header included (shorter than its whole 64-bit words)."""
    return layout_of(COMMANDS[opcode].fields)


def read_beat_layout(config: Config) -> data.StructLayout:
    """A beat of a read; see :class:`MemoryRead`."""
    return data.StructLayout({"data": config.axi_data_bits, "last": 1, "error": 1})


class Bus(wiring.Signature):
    """A signature whose interfaces are of a class that names its members, for editors and type
    checkers."""

    interface: ClassVar[type[wiring.PureInterface]]

    def create(
        self, *, path: tuple[str | int, ...] = (), src_loc_at: int = 0
    ) -> wiring.PureInterface:
        """A new interface of this signature."""
        return self.interface(self, path=path, src_loc_at=1 + src_loc_at)


class CommandInterface(wiring.PureInterface):
    """The members of :class:`CommandPort`."""

    cmd: stream.Interface
    retire: Signal
    stalled: Signal
    fault: Signal
    fault_code: Signal
    fault_address: Signal


class ReadInterface(wiring.PureInterface):
    """The members of :class:`ScratchpadRead`."""

    valid: Signal
    ready: Signal
    addr: Signal
    data: Signal


class WriteInterface(wiring.PureInterface):
    """The members of :class:`ScratchpadWrite`; those of :class:`WeightWrite` are all but
    ``mask``."""

    valid: Signal
    ready: Signal
    addr: Signal
    data: Signal
    mask: Signal


class AccumulatorInterface(wiring.PureInterface):
    """The members of :class:`AccumulatorRead`."""

    en: Signal
    addr: Signal
    data: Signal


class MemoryReadInterface(wiring.PureInterface):
    """The members of :class:`MemoryRead`."""

    req: stream.Interface
    beats: stream.Interface
    denied: Signal


class MemoryWriteInterface(wiring.PureInterface):
    """The members of :class:`MemoryWrite`."""

    req: stream.Interface
    beats: stream.Interface
    done: Signal
    error: Signal
    denied: Signal


class CommandPort(Bus):
    """From an engine's shell (queue, tokens) to its core; the shell is the ``Out`` side.

    ``cmd`` is a stream of commands whose tokens have been taken. A core may accept the next command
    while earlier ones are in flight. It pulses ``retire`` one cycle for every command, in order,
    once all effects of that command are visible to the other engines (a read in the next cycle sees
    them). ``stalled`` is high in every cycle in which a command is in flight and only memory (a
    scratchpad bank conflict, the AXI bus) keeps it from progressing. ``fault`` pulses together with
    ``fault_code`` and ``fault_address`` when the oldest command in flight fails; the core then goes
    quiet and waits for reset."""

    interface = CommandInterface

    def __init__(self, opcode: Opcode):
        super().__init__(
            {
                "cmd": Out(stream.Signature(command_layout(opcode))),
                "retire": In(1),
                "stalled": In(1),
                "fault": In(1),
                "fault_code": In(4),
                "fault_address": In(32),
            }
        )


class ScratchpadRead(Bus):
    """A read client of the scratchpad; the client is the ``Out`` side.

    ``valid``/``ready`` hand over ``addr`` (``ready`` may depend on ``valid`` and ``addr`` in the
    same cycle). ``data`` holds the word in exactly the next cycle, and only then."""

    interface = ReadInterface

    def __init__(self, config: Config):
        super().__init__(
            {
                "valid": Out(1),
                "ready": In(1),
                "addr": Out(ADDRESS_BITS),
                "data": In(8 * config.rows),
            }
        )


class ScratchpadWrite(Bus):
    """A write client of the scratchpad; the client is the ``Out`` side.

    A word is written when ``valid`` and ``ready``; a read accepted in the next cycle sees it.
    ``mask`` has one bit for every ``written_lanes`` bytes.
    """

    interface = WriteInterface

    def __init__(self, config: Config):
        super().__init__(
            {
                "valid": Out(1),
                "ready": In(1),
                "addr": Out(ADDRESS_BITS),
                "data": Out(8 * config.rows),
                "mask": Out(config.word_parts),
            }
        )


def mask_of(place: Value, places: int, config: Config) -> Value:
    """The mask of a :class:`ScratchpadWrite` for one of ``places`` equal shares of a word."""
    if places == 1:
        return Const((1 << config.word_parts) - 1, config.word_parts)
    parts = config.word_parts // places
    return Cat(*((place == n).replicate(parts) for n in range(places)))


class WeightWrite(Bus):
    """A write client of the weight buffer; the client is the ``Out`` side. As ScratchpadWrite."""

    interface = WriteInterface

    def __init__(self, config: Config):
        super().__init__(
            {
                "valid": Out(1),
                "ready": In(1),
                "addr": Out(ADDRESS_BITS),
                "data": Out(8 * config.cols),
            }
        )


class AccumulatorRead(Bus):
    """POST's read port into the accumulators; POST is the ``Out`` side. ``data`` holds the word in
    exactly the cycle after ``en``: ``cols`` int32, lane 0 lowest. Never stalls."""

    interface = AccumulatorInterface

    def __init__(self, config: Config):
        super().__init__(
            {"en": Out(1), "addr": Out(ACC_ADDRESS_BITS), "data": In(32 * config.cols)}
        )


class MemoryRead(Bus):
    """A client of the AXI read manager; the client is the ``Out`` side.

    ``req`` asks for ``bytes`` bytes from byte ``addr`` of the DRAM window: any length, any
    alignment to 4 bytes; the manager splits it into bursts. ``beats`` answers, in the order of the
    client's requests, with whole bus beats, the first being the one that holds ``addr``; ``last``
    marks a request's last beat. ``error`` is set on a beat that carries an AXI error. A request
    outside the DRAM window answers nothing: ``denied`` pulses instead of bursts being issued. The
    client must not ask for beats that it cannot take in the end (beats of all clients share one
    ordered channel)."""

    interface = MemoryReadInterface

    def __init__(self, config: Config):
        super().__init__(
            {
                "req": Out(stream.Signature(data.StructLayout({"addr": 32, "bytes": 32}))),
                "beats": In(stream.Signature(read_beat_layout(config))),
                "denied": In(1),
            }
        )


class MemoryWrite(Bus):
    """A client of the AXI write manager; the client is the ``Out`` side.

    ``req`` as for MemoryRead; then ``beats`` must bring exactly the beats that the request spans,
    with byte strobes. ``done`` pulses once for every request, in order, when all its write
    responses have arrived, ``error`` with it if any was not OKAY. ``denied`` pulses instead for a
    request outside the DRAM window, for which no beats are taken."""

    interface = MemoryWriteInterface

    def __init__(self, config: Config):
        super().__init__(
            {
                "req": Out(stream.Signature(data.StructLayout({"addr": 32, "bytes": 32}))),
                "beats": Out(
                    stream.Signature(
                        data.StructLayout(
                            {"data": config.axi_data_bits, "strobe": config.axi_data_bits // 8}
                        )
                    )
                ),
                "done": In(1),
                "error": In(1),
                "denied": In(1),
            }
        )
