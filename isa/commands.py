"""The command set: declared once, from which encoder, hardware layouts, documentation follow.

A program is one stream of commands in DRAM. A command is a little-endian bit string, fields packed
from bit 0 without gaps in declared order, padded to whole 64-bit words.

In the stream, a command is its first word and those of the others that ``present`` names, in order.
The words left out are as they were in the last command of the same engine. An engine's first
command after the start of a program must be complete. Fields that change together share a word.

The fetch unit hands each command to the queue of the engine it names. Every engine runs its queue
in order; engines run concurrently and synchronise with tokens only:

* There is one counting semaphore for every ordered pair of engines (from, to).
* Before a command starts, it takes one token of each engine whose bit is set in ``wait``.
* When a command has ended (all its effects are visible), it gives one token to each engine whose
  bit is set in ``signal``.

Commands of one engine see all effects of earlier commands of that engine. Anything else must be
ordered by tokens; two unordered commands that touch the same word, one of them writing, are a race.
The stream, executed one command at a time in program order, must be legal (every ``wait`` met by an
earlier ``signal``); that makes it free of deadlock for any queue depth.

Memories (a *word* is the unit of addresses):

* DRAM, byte addresses relative to the window the driver opened (CSRs DRAM_BASE, DRAM_LIMIT).
* scratchpad: words of ``rows`` int8 lanes.
* weights: words of ``cols`` int8 lanes; a weight tile is ``rows`` consecutive words, word ``r``
  holding the weights of input lane ``r``.
* accumulators: words of ``cols`` int32 lanes, in two halves. At any time one half may be in use by
  CONV or by POST, not by both.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate


class Engine(enum.IntEnum):
    """The engines, each with a queue of its own. The value is the bit in ``wait``/``signal``."""

    LOAD = 0
    """DRAM to scratchpad or weight buffer (activations, by convention)."""
    WLOAD = 1
    """A second, identical load engine (weights and parameters, by convention)."""
    CONV = 2
    """The systolic array with its weight and activation sequencers."""
    POST = 3
    """Post-processing: accumulators or scratchpad to scratchpad."""
    WINDOW = 4
    """Depthwise convolution, pooling, im2col: scratchpad to scratchpad."""
    STORE = 5
    """Scratchpad to DRAM."""


class Opcode(enum.IntEnum):
    """First field of every command. 0 is illegal, so that zeroed memory is not a program."""

    END = 1
    LOAD = 2
    STORE = 3
    CONV = 4
    POST = 5
    WINDOW = 6


class LoadTarget(enum.IntEnum):
    SCRATCHPAD = 0
    WEIGHTS = 1


class PostSource(enum.IntEnum):
    ACCUMULATOR = 0
    """``a`` is the requantised accumulator."""
    SCRATCHPAD = 1
    """``a`` is read from the scratchpad."""


class PostOp(enum.IntEnum):
    NONE = 0
    """The result is ``a``."""
    ADD = 1
    """The result is ``clamp(round(((a - za) * ma + (b - zb) * mb) / 2^shift) + zo)``."""
    SUB = 2
    """The result is ``clamp(round(((a - za) * ma - (b - zb) * mb) / 2^shift) + zo)``."""
    MUL = 3
    """The result is ``clamp(round((a - za) * (b - zb) * ma / 2^shift) + zo)``."""


class WindowOp(enum.IntEnum):
    DEPTHWISE = 0
    """Sum over the taps of x * w, then requantised."""
    SUM = 1
    """Sum over the taps of x (all weights 1), then requantised: average pooling."""
    MAX = 2
    """Maximum over the taps, then clamped; no requantisation."""
    IM2COL = 3
    """Copies runs of bytes of a packed few-channel tensor into whole reduction words."""
    SOFTMAX = 4
    """Exponentials of every position's channels, divided by their sum."""
    NORMALISE = 5
    """Every position's channels less their mean, divided by their deviation, requantised."""


ROW_OPS = (WindowOp.SOFTMAX, WindowOp.NORMALISE)
"""Operations on rows: all channels of a position (:mod:`systole.isa.rows`)."""

Size = int | str
"""A number, or the name of the property of :class:`isa.Config` that holds it."""


@dataclass(frozen=True)
class Limit:
    """What the values of a field must keep to. A command that breaks a limit is never started: it
    is a fault, ILLEGAL_FIELD."""

    least: Size | None = None
    most: Size | None = None
    """None, for both: what the field holds."""
    multiple: Size = 1
    """They must be multiples of this power of two."""
    where: tuple[enum.IntEnum, ...] = ()
    """The limit is one only where the command's field of this enumeration has one of these values;
    (): everywhere."""

    def __str__(self) -> str:
        """As the field's documentation has it."""
        parts = [f">= {self.least}"] if self.least is not None else []
        parts += [f"<= {self.most}"] if self.most is not None else []
        parts += [f"a multiple of {self.multiple}"] if self.multiple != 1 else []
        names = [w.name for w in self.where]
        return (f"{', '.join(names)}: " if names else "") + ", ".join(parts)


@dataclass(frozen=True)
class Field:
    """One bit field of a command, CSR or trace event."""

    name: str
    bits: int
    doc: str
    signed: bool = False
    enum: type[enum.IntEnum] | None = None
    limits: tuple[Limit, ...] = ()

    @property
    def meaning(self) -> str:
        """What it stands for, with its limits."""
        limits = "; ".join(map(str, self.limits))
        return f"{self.doc} ({limits})" if limits else self.doc

    @cached_property
    def low(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @cached_property
    def high(self) -> int:
        return (1 << (self.bits - self.signed)) - 1


ENGINE_BITS = 6
"""Width of the wait and signal masks; bits of an engine that does not exist must be zero."""

ADDRESS_BITS = 20
"""Width of the word addresses of scratchpad and weight buffer. Address arithmetic wraps around."""
ACC_ADDRESS_BITS = 16
"""Width of the word addresses of the accumulators."""

MAX_FEATURES = 4096
"""Channels of the longest row of SOFTMAX and NORMALISE."""
ROW_POSITIONS = 256
"""Positions that they take, at most: numbers of each are kept from pass to pass."""

TABLE_BYTES = 256
"""Length of POST's table: one byte for every int8."""

HEADER = (
    Field("opcode", 3, "what to do", enum=Opcode),
    Field("engine", 3, "which engine's queue (END: 0)", enum=Engine),
    Field("wait", ENGINE_BITS, "engines to take one token of before starting, one bit each"),
    Field("signal", ENGINE_BITS, "engines to give one token to at the end, one bit each"),
    Field("present", 6, "words that follow in the stream: bit i is word i + 1 of the command"),
)
"""All in the first word. The other words of the longest command set the width of ``present``."""


@dataclass(frozen=True)
class Command:
    """A kind of command: its opcode, the engines that take it, its fields after the header."""

    opcode: Opcode
    engines: tuple[Engine, ...]
    own_fields: tuple[Field, ...]
    doc: str

    @property
    def name(self) -> str:
        return self.opcode.name

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        return HEADER + self.own_fields

    @cached_property
    def places(self) -> dict[str, tuple[Field, int]]:
        """The fields by name, with their first bit."""
        ends = accumulate(f.bits for f in self.fields)
        return {f.name: (f, end - f.bits) for f, end in zip(self.fields, ends)}

    def high(self, field: str) -> int:
        """The largest value of a field. Raises ``KeyError`` for an unknown field."""
        return self.places[field][0].high

    def field_of(self, members: type[enum.IntEnum]) -> str:
        """The name of the field that holds a value of an enumeration."""
        (name,) = (f.name for f in self.own_fields if f.enum is members)
        return name

    @cached_property
    def bits(self) -> int:
        return sum(f.bits for f in self.fields)

    @cached_property
    def words(self) -> int:
        """Length in 64-bit words when complete."""
        return -(-self.bits // 64)

    @cached_property
    def complete(self) -> int:
        """``present`` of a complete command."""
        return (1 << (self.words - 1)) - 1


def _ordered(names: str, groups: Sequence[Sequence[Field]]) -> tuple[Field, ...]:
    """The fields of ``groups`` in the order of ``names``, which must be all of them."""
    fields = {f.name: f for group in groups for f in group}
    order = names.split()
    assert sorted(order) == sorted(fields), set(order) ^ set(fields)
    return tuple(fields[name] for name in order)


AT_LEAST_1 = (Limit(least=1),)

_ZERO_POINTS = (Limit(least="least_zero_point", most="most_zero_point"),)
_SCRATCHPAD_VECTORS = (Limit(multiple="vector_bytes"),)
_VECTORS_BY_TARGET = (
    Limit(multiple="vector_bytes", where=(LoadTarget.SCRATCHPAD,)),
    Limit(multiple="weight_vector_bytes", where=(LoadTarget.WEIGHTS,)),
)


def _transfer(local: str, vectors: tuple[Limit, ...]) -> tuple[Field, ...]:
    return (
        Field("dram", 32, "byte address in the DRAM window of the first vector", limits=vectors),
        Field(
            "count0",
            16,
            "vectors in a run, contiguous in DRAM and locally",
            limits=AT_LEAST_1,
        ),
        Field("count1", 16, "runs", limits=AT_LEAST_1),
        Field("count2", 16, "groups of runs", limits=AT_LEAST_1),
        Field("dram1", 32, "bytes from one run to the next in DRAM", limits=vectors),
        Field("dram2", 32, "bytes from one group to the next in DRAM", limits=vectors),
        Field("local", ADDRESS_BITS, f"first word in the {local}"),
        Field("local1", ADDRESS_BITS, "words from one run to the next"),
        Field("local2", ADDRESS_BITS, "words from one group to the next"),
    )


def _window(kernel_doc: str, *, rows: bool) -> tuple[Field, ...]:
    """The fields of a sliding window; ``rows``: there are operations on rows besides."""
    positions, one = (
        (*AT_LEAST_1, *[Limit(most=most, where=ROW_OPS)] * rows) for most in (ROW_POSITIONS, 1)
    )
    return (
        Field("src", ADDRESS_BITS, "scratchpad word of the input's (0, 0), block 0"),
        Field("src_pitch", 16, "words from one input row to the next"),
        Field("src_block", ADDRESS_BITS, "words from one input channel block to the next"),
        Field("in_w", 16, "input columns present; others read as ``pad``"),
        Field("in_h", 16, "input rows present; others read as ``pad``"),
        Field("x0", 16, "input column of output 0, tap 0", signed=True),
        Field("y0", 16, "input row of output 0, tap 0", signed=True),
        Field("out_w", 16, "output columns", limits=positions),
        Field("out_h", 16, "output rows", limits=one),
        Field("kernel_w", 6, f"{kernel_doc} columns", limits=AT_LEAST_1),
        Field("kernel_h", 6, f"{kernel_doc} rows", limits=AT_LEAST_1),
        Field("stride_x", 8, "input columns per output column", limits=AT_LEAST_1),
        Field("stride_y", 8, "input rows per output row", limits=AT_LEAST_1),
        Field("dilation_x", 8, "input columns per tap column", limits=AT_LEAST_1),
        Field("dilation_y", 8, "input rows per tap row", limits=AT_LEAST_1),
        Field("pad", 8, "value read outside the input: its zero point", signed=True),
    )


def _zero_point(name: str, doc: str) -> Field:
    return Field(name, 8, f"{doc}, which is subtracted", signed=True, limits=_ZERO_POINTS)


def _output() -> tuple[Field, ...]:
    return (
        Field("out", ADDRESS_BITS, "scratchpad word of output (0, 0), block 0"),
        Field("out_pitch", 16, "words from one output row to the next"),
        Field("out_block", ADDRESS_BITS, "words from one output channel block to the next"),
    )


def _requantise() -> tuple[Field, ...]:
    return (
        Field("zero", 8, "zero point added after requantisation", signed=True),
        Field("low", 8, "lower clamp after requantisation", signed=True),
        Field("high", 8, "upper clamp after requantisation", signed=True),
    )


COMMANDS: dict[Opcode, Command] = {
    c.opcode: c
    for c in (
        Command(
            Opcode.END,
            (),
            (),
            "Ends the program: when every engine has run dry, sets DONE and raises the interrupt.",
        ),
        Command(
            Opcode.LOAD,
            (Engine.LOAD, Engine.WLOAD),
            _ordered(
                "dram target local2 local count0 local1 dram1 count1 count2 dram2",
                [
                    (Field("target", 1, "destination memory", enum=LoadTarget),),
                    _transfer("destination memory", _VECTORS_BY_TARGET),
                ],
            ),
            "Copies ``count2 x count1 x count0`` vectors from DRAM. A vector takes "
            "``vector_bytes`` (scratchpad) or ``weight_vector_bytes`` (weights) in DRAM, of which "
            "the first ``rows`` or ``cols`` are kept.",
        ),
        Command(
            Opcode.STORE,
            (Engine.STORE,),
            _ordered(
                "dram local2 local count0 local1 dram1 count1 count2 dram2",
                [_transfer("scratchpad", _SCRATCHPAD_VECTORS)],
            ),
            "Copies ``count2 x count1 x count0`` scratchpad words to DRAM, ``vector_bytes`` each; "
            "the bytes beyond ``rows`` of each are written as zero. Ends when the last write "
            "response has arrived.",
        ),
        Command(
            Opcode.CONV,
            (Engine.CONV,),
            _ordered(
                "weights acc accumulate pad src blocks x0 kernel_w stride_x y0 out_h in_h kernel_h "
                "out_w in_w src_pitch src_block stride_y dilation_x dilation_y input_zero "
                "weight_zero",
                [
                    (
                        Field(
                            "accumulate",
                            1,
                            "0: the first tile overwrites the accumulators; 1: adds",
                        ),
                        Field("weights", ADDRESS_BITS, "weight word of the first tile"),
                        Field("acc", ACC_ADDRESS_BITS, "accumulator word of output (0, 0)"),
                        Field("blocks", 12, "input channel blocks", limits=AT_LEAST_1),
                        _zero_point("input_zero", "zero point of the input"),
                        _zero_point("weight_zero", "zero point of the weights"),
                    ),
                    _window("kernel", rows=False),
                ],
            ),
            "For every tile (b, ky, kx), b outermost, kx innermost, consecutive in the weight "
            "buffer: for every output (oy, ox): acc[oy * out_w + ox][n] += sum over lanes r of "
            "(x(b, y0 + oy * stride_y + ky * dilation_y, x0 + ox * stride_x + kx * dilation_x)[r] "
            "- input_zero) * (w[tile][r][n] - weight_zero), modulo 2^32. x(b, y, x) is scratchpad "
            "word src + b * src_block + y * src_pitch + x, or ``pad`` in every lane outside the "
            "input.",
        ),
        Command(
            Opcode.POST,
            (Engine.POST,),
            _ordered(
                "acc out lane params a b op out_h out_w out_pitch groups zero low high out_block "
                "b_block out_step a_pitch a_block b_pitch za source b_step lut zb zo low2 high2 "
                "shift ma mb table",
                [
                    (
                        Field("source", 1, "where ``a`` comes from", enum=PostSource),
                        Field("op", 2, "what is done with ``a`` and ``b``", enum=PostOp),
                        Field(
                            "acc",
                            ACC_ADDRESS_BITS,
                            "accumulator word of output (0, 0); outputs are consecutive",
                        ),
                        Field(
                            "groups",
                            8,
                            "groups of ``lanes`` channels to process",
                            limits=(
                                *AT_LEAST_1,
                                Limit(most="groups", where=(PostSource.ACCUMULATOR,)),
                            ),
                        ),
                        Field(
                            "lane",
                            6,
                            "first group's position in its scratchpad word, in groups",
                            limits=(Limit(most="last_group"),),
                        ),
                        Field("out_w", 16, "output columns", limits=AT_LEAST_1),
                        Field("out_h", 16, "output rows", limits=AT_LEAST_1),
                    ),
                    _output(),
                    (
                        Field(
                            "out_step",
                            8,
                            "words from one output column to the next",
                            limits=AT_LEAST_1,
                        ),
                        Field(
                            "a", ADDRESS_BITS, "source SCRATCHPAD: word of ``a`` (0, 0), block 0"
                        ),
                        Field("a_pitch", 16, "words from one row of ``a`` to the next"),
                        Field(
                            "a_block",
                            ADDRESS_BITS,
                            "words from one channel block of ``a`` to the next",
                        ),
                        Field("b", ADDRESS_BITS, "op not NONE: word of ``b`` (0, 0), block 0"),
                        Field("b_pitch", 16, "words from one row of ``b`` to the next"),
                        Field(
                            "b_block",
                            ADDRESS_BITS,
                            "words from one channel block of ``b`` to the next",
                        ),
                        Field("b_step", 1, "words from one column of ``b`` to the next"),
                        Field(
                            "params",
                            ADDRESS_BITS,
                            "source ACCUMULATOR: scratchpad word of the parameters",
                        ),
                    ),
                    _requantise(),
                    (
                        Field("za", 8, "op not NONE: zero point of ``a``", signed=True),
                        Field("zb", 8, "op not NONE: zero point of ``b``", signed=True),
                        Field("zo", 8, "op not NONE: zero point of the result", signed=True),
                        Field("low2", 8, "op not NONE: lower clamp of the result", signed=True),
                        Field("high2", 8, "op not NONE: upper clamp of the result", signed=True),
                        Field("ma", 24, "op ADD, SUB: multiplier of ``a``; MUL: of the product"),
                        Field("mb", 24, "op ADD, SUB: multiplier of ``b``"),
                        Field(
                            "shift",
                            6,
                            "op not NONE: right shift, rounding half to even",
                            limits=(Limit(least=1, where=(PostOp.ADD, PostOp.SUB, PostOp.MUL)),),
                        ),
                        Field("lut", 1, "1: results go through the table"),
                        Field("table", ADDRESS_BITS, "lut: scratchpad word of the table"),
                    ),
                ],
            ),
            "For every group g (outermost) and output (oy, ox): takes ``lanes`` channels, "
            "computes, writes them at position (lane + g) mod (rows / lanes) of scratchpad word "
            "out + ((lane + g) div (rows / lanes)) * out_block + oy * out_pitch + ox * out_step; "
            "``a`` (source SCRATCHPAD) and ``b`` are read from the same position and block of "
            "their own tensors, from columns 1 and ``b_step`` words apart (``b_pitch`` and "
            "``b_step`` 0: one word of ``b`` for the whole image). Source ACCUMULATOR: ``a`` = "
            "requantise(acc[acc + oy * out_w + ox][g * lanes + i]) with the parameters at params + "
            "g * param_words; source SCRATCHPAD: ``a`` is taken as it is. With ``lut``, the result "
            "r of every lane is replaced by byte r + 128 of the table: 256 bytes from byte 0 of "
            "scratchpad word ``table``, going on into following words of ``rows`` bytes. POST "
            "prefetches parameters and tables: they must not be written by a POST command that has "
            "not retired.",
        ),
        Command(
            Opcode.WINDOW,
            (Engine.WINDOW,),
            _ordered(
                "out src weights params y0 high out_h in_h x0 out_w in_w src_pitch out_pitch low "
                "zero src_block out_block pad op kernel_w kernel_h stride_x stride_y dilation_x "
                "dilation_y blocks run weight_zero features causal masked mask_step mask_block",
                [
                    (
                        Field(
                            "op",
                            3,
                            "what is done over the window or to the row",
                            enum=WindowOp,
                            limits=(Limit(most="last_window_op"),),
                        ),
                        Field(
                            "blocks",
                            12,
                            "channel blocks to process",
                            limits=(*AT_LEAST_1, Limit(most=1, where=(WindowOp.IM2COL,))),
                        ),
                        Field(
                            "run",
                            8,
                            "IM2COL: bytes copied per tap",
                            limits=(Limit(least=1, where=(WindowOp.IM2COL,)),),
                        ),
                    ),
                    _window("window", rows=True),
                    _output(),
                    (
                        Field(
                            "weights",
                            ADDRESS_BITS,
                            "DEPTHWISE: scratchpad word of the first tap's weights",
                        ),
                        Field(
                            "params",
                            ADDRESS_BITS,
                            "DEPTHWISE, SUM: scratchpad word of the parameters",
                        ),
                        _zero_point("weight_zero", "DEPTHWISE: zero point of the weights"),
                    ),
                    _requantise(),
                    (
                        Field(
                            "features",
                            13,
                            "SOFTMAX, NORMALISE: channels of a row that count",
                            limits=(Limit(least=1, most=MAX_FEATURES, where=ROW_OPS),),
                        ),
                        Field("causal", 1, "SOFTMAX: 1: one more for every further position"),
                        Field(
                            "masked",
                            1,
                            "SOFTMAX: 1: only channels whose mask, at word ``weights``, is not "
                            "negative count",
                        ),
                        Field(
                            "mask_step", 1, "SOFTMAX: words from one position's mask to the next"
                        ),
                        Field(
                            "mask_block",
                            ADDRESS_BITS,
                            "SOFTMAX: words from one channel block of the mask to the next",
                        ),
                    ),
                ],
            ),
            "DEPTHWISE, SUM, MAX: for every block b and output (oy, ox), lane by lane: reduces "
            "x(b, y0 + oy * stride_y + ky * dilation_y, x0 + ox * stride_x + kx * dilation_x) over "
            "the taps (x as for CONV) and writes scratchpad word out + b * out_block + oy * "
            "out_pitch + ox. Tap weights of block b: words weights + (b * kernel_h + ky) * "
            "kernel_w + kx, each less ``weight_zero``; parameters of block b: 8 words at params + "
            "8 * b. "
            "IM2COL: the input is packed bytes: row y starts at word src + y * src_pitch; in_w, "
            "x0, stride_x, dilation_x count bytes (a negative or too large byte column, or a row "
            "outside 0..in_h-1, reads as ``pad``). For every output (oy, ox), the bytes of all "
            "taps (ky, kx) - ``run`` bytes from column x0 + ox * stride_x + kx * dilation_x of row "
            "y0 + oy * stride_y + ky * dilation_y - are concatenated, filled up with ``pad`` to "
            "whole words, and word t written to out + t * out_block + oy * out_pitch + ox. "
            "SOFTMAX, NORMALISE: position ox of block b is word src + b * src_block + ox; its row "
            "is reduced over the channels that count, and all blocks are written to out + b * "
            "out_block + ox. At ``params`` stand their own parameters, then SOFTMAX's table, or "
            "those of NORMALISE's blocks, 8 words each. Where ``masked``, the mask of position ox "
            "of block b is word weights + b * mask_block + ox * mask_step.",
        ),
    )
}

MAX_KERNEL = COMMANDS[Opcode.WINDOW].high("kernel_w")
"""Largest kernel height and width of CONV and WINDOW."""
MAX_STRIDE = COMMANDS[Opcode.WINDOW].high("stride_x")
"""Largest stride and dilation of CONV and WINDOW; IM2COL's count bytes."""
MAX_RUN = COMMANDS[Opcode.WINDOW].high("run")
"""Most bytes that IM2COL copies for a tap."""


def encode(
    opcode: Opcode,
    engine: Engine | None = None,
    *,
    wait: int = 0,
    signal: int = 0,
    present: int | None = None,
    **values: int,
) -> list[int]:
    """All 64-bit words of a command. They are what stands in the stream if the command is complete,
    as it is by default.

    ``engine``: by default, the first that takes the command. Fields not named are 0. Raises
    ``ValueError`` naming the field that does not exist or whose value does not fit.
    """
    command = COMMANDS[opcode]
    if engine is None:
        engine = command.engines[0] if command.engines else Engine(0)
    elif engine not in command.engines:
        raise ValueError(f"{command.name}: engine {engine!r} does not take this command")
    if present is None:
        present = command.complete
    header = dict(opcode=opcode, engine=engine, wait=wait, signal=signal, present=present)
    number, packing = 0, _packing(opcode)
    for part in (header, values):
        for name, value in part.items():
            if name not in packing:
                raise ValueError(f"{command.name}: no field {name!r}")
            low, high, mask, at = packing[name]
            if not low <= value <= high:
                raise ValueError(f"{command.name}: {name} = {value} outside {low}..{high}")
            number |= (int(value) & mask) << at
    return [number >> at & 0xFFFF_FFFF_FFFF_FFFF for at in range(0, 64 * command.words, 64)]


@cache
def _packing(opcode: Opcode) -> dict[str, tuple[int, int, int, int]]:
    """By field: its lowest and its highest value, the mask of its bits, and its first bit."""
    places = COMMANDS[opcode].places.values()
    return {f.name: (f.low, f.high, (1 << f.bits) - 1, at) for f, at in places}


def unpack(fields: Sequence[Field], number: int) -> dict[str, int]:
    """The bits of ``fields``, packed from bit 0 of ``number``, by name, as unsigned numbers."""
    out = {}
    for f in fields:
        out[f.name] = number & ((1 << f.bits) - 1)
        number >>= f.bits
    return out


def header_of(head: int) -> dict[str, int]:
    """The header's fields, by name, in a command's first word."""
    return unpack(HEADER, head)


_ENGINE, _ENGINE_AT = COMMANDS[Opcode.END].places["engine"]
_PRESENT_AT = COMMANDS[Opcode.END].places["present"][1]


class Encoder:
    """Encodes the commands of one stream, in order, as short as they can be."""

    def __init__(self) -> None:
        self._last: dict[int, list[int]] = {}

    def encode(
        self,
        opcode: Opcode,
        engine: Engine | None = None,
        *,
        present: int | None = None,
        **values: int,
    ) -> list[int]:
        """The words of a command in the stream: those of :func:`encode` without the ones that are
        as in the engine's last command, or with just those that ``present`` names."""
        head, *words = encode(opcode, engine, present=present, **values)
        number = head >> _ENGINE_AT & (1 << _ENGINE.bits) - 1
        last = self._last.get(number)
        if present is not None and last is not None:
            words = [w if present >> i & 1 else last[i] for i, w in enumerate(words)]
        elif present is None:
            present = COMMANDS[opcode].complete
            if last is not None:
                same = sum(1 << i for i, (a, b) in enumerate(zip(words, last)) if a == b)
                present, head = present & ~same, head & ~(same << _PRESENT_AT)
        if words:
            self._last[number] = words
        return [head] + [w for i, w in enumerate(words) if present >> i & 1]


class Decoder:
    """Decodes the commands of one stream, in order."""

    def __init__(self) -> None:
        self._last: dict[int, list[int]] = {}

    def decode(self, words: Sequence[int], at: int = 0) -> tuple[Mapping[str, int], int]:
        """Decode the command at ``words[at]``: its fields by name, and the index of the next.

        Raises ``ValueError`` on an illegal opcode, engine, enum value or ``present``, on a first
        command that is incomplete or one that is truncated.
        """
        header = header_of(int(words[at]))
        engine, present = header["engine"], header["present"]
        try:
            command = COMMANDS[Opcode(header["opcode"])]
        except ValueError:
            raise ValueError(f"word {at}: illegal opcode {header['opcode']}") from None
        if command.engines and engine not in command.engines:
            raise ValueError(f"word {at}: {command.name}: illegal engine {engine}")
        if present & ~command.complete:
            raise ValueError(f"word {at}: {command.name}: illegal present {present:#x}")
        if engine not in self._last and present != command.complete:
            raise ValueError(
                f"word {at}: {command.name}: the first of its engine, but not complete"
            )
        end = at + 1 + present.bit_count()
        if end > len(words):
            raise ValueError(f"word {at}: {command.name} is truncated")
        rest = iter(words[at + 1 : end])
        whole = [
            int(next(rest)) if present >> i & 1 else self._last[engine][i]
            for i in range(command.words - 1)
        ]
        number = sum(w << (64 * i) for i, w in enumerate([int(words[at]), *whole]))
        out: dict[str, int] = {}
        for f, at_bit in command.places.values():
            value = number >> at_bit & ((1 << f.bits) - 1)
            if f.signed and value > f.high:
                value -= 1 << f.bits
            # What is no member is refused as any other value beyond a limit.
            if f.enum is not None and value in f.enum.__members__.values():
                value = f.enum(value)
            elif f.enum is not None and not f.limits:
                raise ValueError(f"word {at}: {command.name}: illegal {f.name} {value}")
            out[f.name] = value
        if whole:
            self._last[engine] = whole
        return out, end


def command_at(words: Sequence[int], index: int) -> Mapping[str, int]:
    """The fields of command ``index`` of a stream. Raises ``ValueError`` like a
    :class:`Decoder`."""
    decoder, at = Decoder(), 0
    fields: Mapping[str, int] = {}
    for _ in range(index + 1):
        fields, at = decoder.decode(words, at)
    return fields
