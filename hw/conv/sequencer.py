"""The two sequencers of the CONV engine: weights into the array, activations through it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

from amaranth.hdl import Module, Mux, ShapeLike, Signal, Value, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from systole.hw.bus.interfaces import (
    ReadInterface,
    ScratchpadRead,
    command_layout,
)
from systole.hw.conv.array import SystolicArray
from systole.isa import Config, Opcode
from systole.isa.commands import ACC_ADDRESS_BITS, ADDRESS_BITS
from systole.isa.timing import ACCUMULATE_LATENCY

if TYPE_CHECKING:
    from amaranth.hdl._ast import Assign

CONV = command_layout(Opcode.CONV)

COORDINATE = signed(26)
"""Holds every column or row a CONV can name: +-2^15 + 2^16 * 2^8 + 2^6 * 2^8."""

TAG = data.StructLayout({"acc": ACC_ADDRESS_BITS, "overwrite": 1, "last": 1})
"""What travels with a vector: its accumulator word, whether it overwrites it, and whether it is the
last vector of its command."""


COPIED = (
    *("accumulate", "acc", "blocks", "src_block", "in_w", "in_h", "x0", "y0", "out_w", "out_h"),
    *("kernel_w", "kernel_h", "stride_x", "stride_y", "dilation_x", "dilation_y", "pad"),
)
"""Fields of CONV that the activation sequencer keeps as they are."""
LOOPS = ("blocks", "kernel_h", "kernel_w", "out_h", "out_w")
"""Fields of CONV that count its loops, outermost first."""
POINTS = ("vector", "row", "tile", "taps", "block")
"""Addresses of the current vector and of the points that the loops return to, innermost first."""


def registers(prefix: str, **shapes: ShapeLike) -> SimpleNamespace:
    """One register for each name. They hold data qualified by a valid bit elsewhere: no reset."""
    return SimpleNamespace(
        **{
            name: Signal(shape, name=f"{prefix}_{name}", reset_less=True)
            for name, shape in shapes.items()
        }
    )


def fields(*names: str) -> dict[str, ShapeLike]:
    """The shapes of those fields of CONV."""
    return {name: CONV[name].shape for name in names}


class WeightSequencer(wiring.Component):
    """Reads the tiles of each command from the weight buffer into the array's shadow weights.

    Runs one tile ahead of the activations, across commands: the next tile's capture starts as soon
    as the tile before it is swapped in (in that very cycle) and its last row has been read.

    * ``command``: a command is taken as soon as the last tile of the one before it is being read.
    * ``read_en``/``read_addr``: weight buffer read; the word goes to the array in the next cycle.
    * ``capture``: to the array, with the read of a tile's row 0; the other rows follow without a
      gap.
    * ``weight_zero``, with ``zero_points``: of the tile whose words go to the array.
    * ``loaded``: the shadow weights may be swapped in, now or at any later time.
    * ``swap``: they are.
    """

    command: stream.Interface
    read_en: Signal
    read_addr: Signal
    capture: Signal
    weight_zero: Signal
    loaded: Signal
    swap: Signal

    def __init__(self, config: Config, array: SystolicArray):
        self.config = config
        self.capture_lead = array.capture_lead
        zero_points = {"weight_zero": Out(signed(8))} if config.zero_points else {}
        super().__init__(
            {
                **zero_points,
                "command": In(stream.Signature(CONV)),
                "read_en": Out(1),
                "read_addr": Out(ADDRESS_BITS),
                "capture": Out(1),
                "loaded": Out(1),
                "swap": In(1),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        rows = self.config.rows
        command = self.command.p

        active = Signal()
        count = registers("count", **fields("blocks", "kernel_h", "kernel_w"))
        kernel = registers("kernel", **fields("kernel_h", "kernel_w"))
        tile_addr = Signal(ADDRESS_BITS)
        row_addr = Signal(ADDRESS_BITS)
        rows_left = Signal(range(rows))
        shadow_used = Signal()

        start = Signal()
        last_column = count.kernel_w == 1
        last_row = count.kernel_h == 1
        last_tile = last_column & last_row & (count.blocks == 1)
        m.d.comb += [
            start.eq(active & (rows_left == 0) & (~shadow_used | self.swap)),
            self.capture.eq(start),
            self.read_en.eq(start | (rows_left != 0)),
            self.read_addr.eq(Mux(start, tile_addr, row_addr)),
            self.command.ready.eq(~active | (start & last_tile)),
        ]

        with m.If(self.read_en):
            m.d.sync += row_addr.eq(self.read_addr + 1)
        with m.If(rows_left != 0):
            m.d.sync += rows_left.eq(rows_left - 1)

        with m.If(self.swap):
            m.d.sync += [shadow_used.eq(0), self.loaded.eq(0)]
        # `loaded` rises capture_lead cycles after `capture`.
        loading = start if self.capture_lead == 1 else rows_left == rows + 1 - self.capture_lead
        with m.If(loading):
            m.d.sync += self.loaded.eq(1)

        with m.If(start):
            m.d.sync += [
                shadow_used.eq(1),
                rows_left.eq(rows - 1),
                tile_addr.eq(tile_addr + rows),
                count.kernel_w.eq(count.kernel_w - 1),
            ]
            with m.If(last_column):
                m.d.sync += count.kernel_w.eq(kernel.kernel_w)
                m.d.sync += count.kernel_h.eq(count.kernel_h - 1)
                with m.If(last_row):
                    m.d.sync += count.kernel_h.eq(kernel.kernel_h)
                    m.d.sync += count.blocks.eq(count.blocks - 1)
            with m.If(last_tile):
                m.d.sync += active.eq(0)
        if self.config.zero_points:
            self._keep_zero(m, start)
        with m.If(self.command.valid & self.command.ready):
            m.d.sync += [
                active.eq(1),
                tile_addr.eq(command.weights),
                count.blocks.eq(command.blocks),
                count.kernel_h.eq(command.kernel_h),
                count.kernel_w.eq(command.kernel_w),
                kernel.kernel_h.eq(command.kernel_h),
                kernel.kernel_w.eq(command.kernel_w),
            ]
        return m

    def _keep_zero(self, m: Module, start: Signal) -> None:
        """The zero point of the command at hand, and of the tile that is being read: the next
        command is taken while the last tile of the one before is."""
        zero = Signal(signed(8), name="zero", reset_less=True)
        with m.If(start):
            m.d.sync += self.weight_zero.eq(zero)
        with m.If(self.command.valid & self.command.ready):
            m.d.sync += zero.eq(self.command.p.weight_zero)


class ActivationSequencer(wiring.Component):
    """Streams each command's activations from the scratchpad into the array, one vector a cycle.

    No cycle is lost between rows, tiles and commands, unless the scratchpad refuses a read, a
    tile's weights are not ``loaded``, or a command adds to one of the last two words of the command
    before it (``ACCUMULATE_LATENCY`` cycles are lost at most).

    * ``command``: the next command is taken, and its address steps multiplied out, while the
      current one streams.
    * ``swap``: to the array and the weight sequencer, in the cycle in which a tile's first vector
      is requested, which is ``SWAP_LEAD`` cycles before it enters the array.
    * ``x``, ``valid``, ``tag``: the vectors, in the cycle in which they enter the array; with
      ``zero_points``, in that before, with their ``input_zero``.
    """

    command: stream.Interface
    scratchpad: ReadInterface
    loaded: Signal
    swap: Signal
    x: Signal
    valid: Signal
    tag: data.View
    input_zero: Signal

    def __init__(self, config: Config):
        self.config = config
        zero_points = {"input_zero": Out(signed(8))} if config.zero_points else {}
        super().__init__(
            {
                **zero_points,
                "command": In(stream.Signature(CONV)),
                "scratchpad": Out(ScratchpadRead(config)),
                "loaded": In(1),
                "swap": Out(1),
                "x": Out(8 * config.rows),
                "valid": Out(1),
                "tag": Out(TAG),
            }
        )
        # The next command, with all products its addresses need. Addresses are modulo 2^20.
        products = dict.fromkeys(("origin", "stride_row", "dilation_row"), ADDRESS_BITS)
        self._copied = (*COPIED, "input_zero") if config.zero_points else COPIED
        self._prepared = fields(*self._copied) | products
        self._following = registers("following", **self._prepared)
        # The current command, the loop counters (down to 1), and the coordinates and address of the
        # current vector and of the points the loops return to.
        self._current = registers("current", **self._prepared)
        self._count = registers("count", **fields(*LOOPS))
        # Whether a counter is 1, and whether the field that it counts down from is.
        flags = dict.fromkeys(LOOPS, 1)
        self._last = vars(registers("last", **flags))
        self._single = registers("single", **flags)
        self._following_single = registers("following_single", **flags)
        self._x = Signal(COORDINATE)
        self._tile_x = Signal(COORDINATE)
        self._y = Signal(COORDINATE)
        self._tile_y = Signal(COORDINATE)
        self._addr = registers("addr", **dict.fromkeys(POINTS, ADDRESS_BITS))
        self._acc = Signal(ACC_ADDRESS_BITS)
        self._first_vector = Signal()
        self._overwrite = Signal()
        self._active = Signal()
        self._take = Signal()  # the next command becomes the current one
        self._near = Signal()  # its first vectors add to the last words of the one before it
        self._step = Signal()  # the loops go on to the next vector
        # The vector that is asked for: the one that the loops have just left.
        self._vector: dict[str, ShapeLike] = {
            **{"inside": 1, "addr": ADDRESS_BITS, "pad": 8, "first": 1, "near": 1},
            **{"acc": ACC_ADDRESS_BITS, "overwrite": 1, "last": 1},
        }
        if config.zero_points:
            self._vector["input_zero"] = signed(8)
        self._wanted = registers("wanted", **self._vector)
        self._waiting = Signal()  # there is one
        self._hold = Signal()  # it must not go yet
        self._fire = Signal()  # it goes on its way

    def elaborate(self, platform: object) -> Module:
        m = Module()
        self._prepare(m)
        self._want(m)
        self._request(m)
        with m.If(self._step):
            self._next_accumulator(m)
            self._next_vector(m)
        self._keep_apart(m)
        with m.If(self._take):
            self._begin(m)
        self._deliver(m)
        return m

    @property
    def _last_vector(self) -> Value:
        """It is the tile's last."""
        return self._last["out_w"] & self._last["out_h"]

    @property
    def _last_tile(self) -> Value:
        """It is the command's last."""
        return self._last["kernel_w"] & self._last["kernel_h"] & self._last["blocks"]

    def _prepare(self, m: Module) -> None:
        """Take the next command while the current one streams."""
        command, following = self.command.p, self._following
        held, multiplied, valid = Signal(), Signal(), Signal()
        row = Signal(ADDRESS_BITS, reset_less=True)  # first row of the input, without ``src``
        m.d.comb += self.command.ready.eq(~held)
        m.d.sync += [multiplied.eq(self.command.valid & ~held), valid.eq(multiplied | valid)]
        with m.If(self._take):
            m.d.sync += [held.eq(0), valid.eq(0)]
        with m.If(self.command.valid & self.command.ready):
            m.d.sync += held.eq(1)
            m.d.sync += [getattr(following, name).eq(command[name]) for name in self._copied]
            pitch = command.src_pitch
            m.d.sync += [
                following.origin.eq(command.src + command.x0),
                row.eq(command.y0 * pitch),
                following.stride_row.eq(command.stride_y * pitch),
                following.dilation_row.eq(command.dilation_y * pitch),
            ]
        with m.If(multiplied):
            m.d.sync += following.origin.eq(following.origin + row)
            m.d.sync += [
                getattr(self._following_single, name).eq(getattr(following, name) == 1)
                for name in LOOPS
            ]
        ends = self._step & self._last_vector & self._last_tile
        m.d.comb += self._take.eq(valid & (~self._active | ends))

    def _want(self, m: Module) -> None:
        """The vector that the loops have reached, and whether it lies inside the input, into the
        registers of the one that is asked for. If that one has to wait, so does this one, in
        ``spare``: so the loops need not know in the same cycle."""
        current, wanted = self._current, self._wanted
        full = Signal()
        spare = registers("spare", **self._vector)
        new = {
            "inside": (self._x.as_unsigned() < current.in_w)
            & (self._y.as_unsigned() < current.in_h),
            "addr": self._addr.vector,
            "pad": current.pad,
            "first": self._first_vector,
            "near": self._near & self._first_vector,
            "acc": self._acc,
            "overwrite": self._overwrite,
            "last": self._last_vector & self._last_tile,
        }
        if self.config.zero_points:
            new["input_zero"] = current.input_zero
        moves = (full | self._step) & (~self._waiting | self._fire)
        m.d.comb += self._step.eq(self._active & ~full)
        m.d.sync += full.eq((full | self._step) & self._waiting & ~self._fire)
        with m.If(self._step):
            m.d.sync += [getattr(spare, name).eq(value) for name, value in new.items()]
        with m.If(self._fire):
            m.d.sync += self._waiting.eq(0)
        with m.If(moves):
            m.d.sync += self._waiting.eq(1)
            with m.If(full):
                m.d.sync += [getattr(wanted, name).eq(getattr(spare, name)) for name in new]
            with m.Else():
                m.d.sync += [getattr(wanted, name).eq(value) for name, value in new.items()]
        # The vector before goes at the latest as this one comes.
        hold = Signal(ACCUMULATE_LATENCY)
        m.d.comb += self._hold.eq(hold[0])
        m.d.sync += hold.eq(hold >> 1)
        with m.If(moves & Mux(full, spare.near, new["near"])):
            m.d.sync += hold.eq(~0)

    def _request(self, m: Module) -> None:
        """Ask for the wanted vector unless it lies outside the input."""
        wanted, request = self._wanted, Signal()
        m.d.comb += [
            request.eq(self._waiting & (~wanted.first | self.loaded) & ~self._hold),
            self.scratchpad.valid.eq(request & wanted.inside),
            self.scratchpad.addr.eq(wanted.addr),
            self._fire.eq(request & (~wanted.inside | self.scratchpad.ready)),
            self.swap.eq(self._fire & wanted.first),
        ]

    def _keep_apart(self, m: Module) -> None:
        """Mark a command whose first vectors add to words that the last ones of the command before
        it wrote: ``ACCUMULATE_LATENCY`` cycles must lie between them."""
        last_acc = Signal(ACC_ADDRESS_BITS)
        following = self._following
        with m.If(self._step):
            m.d.sync += last_acc.eq(self._acc)
        with m.If(self._take):
            # A tile's words follow each other: those of the vectors of the last cycles end here.
            behind, behind_now = (
                (last - following.acc)[:ACC_ADDRESS_BITS] < ACCUMULATE_LATENCY
                for last in (last_acc, self._acc)
            )
            m.d.sync += self._near.eq(following.accumulate & Mux(self._step, behind_now, behind))

    def _next_accumulator(self, m: Module) -> None:
        m.d.sync += [self._first_vector.eq(self._last_vector), self._near.eq(0)]
        with m.If(self._last_vector):
            m.d.sync += [self._acc.eq(self._current.acc), self._overwrite.eq(0)]
            m.d.sync += self._restart("out_w", "out_h")
        with m.Else():
            m.d.sync += self._acc.eq(self._acc + 1)

    def _next_vector(self, m: Module) -> None:
        """The five loops, the innermost first."""
        current, last, addr = self._current, self._last, self._addr
        columns, rows = (self._x, self._tile_x), (self._y, self._tile_y)
        with m.If(~last["out_w"]):
            m.d.sync += self._advance("out_w")
            m.d.sync += self._x.eq(self._x + current.stride_x)
            m.d.sync += self._go_to(addr.vector + current.stride_x, "vector")
        with m.Elif(~last["out_h"]):
            m.d.sync += self._advance("out_h") + self._restart("out_w")
            m.d.sync += [self._x.eq(self._tile_x), self._y.eq(self._y + current.stride_y)]
            m.d.sync += self._go_to(addr.row + current.stride_row, "vector", "row")
        with m.Elif(~last["kernel_w"]):
            m.d.sync += self._advance("kernel_w")
            m.d.sync += [x.eq(self._tile_x + current.dilation_x) for x in columns]
            m.d.sync += self._y.eq(self._tile_y)
            m.d.sync += self._go_to(addr.tile + current.dilation_x, "vector", "row", "tile")
        with m.Elif(~last["kernel_h"]):
            m.d.sync += self._advance("kernel_h") + self._restart("kernel_w")
            m.d.sync += [x.eq(current.x0) for x in columns]
            m.d.sync += [y.eq(self._tile_y + current.dilation_y) for y in rows]
            target = addr.taps + current.dilation_row
            m.d.sync += self._go_to(target, "vector", "row", "tile", "taps")
        with m.Elif(~last["blocks"]):
            m.d.sync += self._advance("blocks") + self._restart("kernel_w", "kernel_h")
            m.d.sync += [x.eq(current.x0) for x in columns]
            m.d.sync += [y.eq(current.y0) for y in rows]
            m.d.sync += self._go_to(addr.block + current.src_block, *POINTS)
        with m.Else():
            m.d.sync += self._active.eq(0)

    def _restart(self, *names: str) -> list[Assign]:
        counts = [getattr(self._count, n).eq(getattr(self._current, n)) for n in names]
        return counts + [self._last[n].eq(getattr(self._single, n)) for n in names]

    def _advance(self, name: str) -> list[Assign]:
        count = getattr(self._count, name)
        return [count.eq(count - 1), self._last[name].eq(count == 2)]

    def _go_to(self, target: Value, *points: str) -> list[Assign]:
        return [getattr(self._addr, point).eq(target) for point in points]

    def _begin(self, m: Module) -> None:
        """The first vector of the next command."""
        following = self._following
        m.d.sync += [self._active.eq(1), self._first_vector.eq(1)]
        m.d.sync += [getattr(self._current, f).eq(getattr(following, f)) for f in self._prepared]
        for name in LOOPS:
            single = getattr(self._following_single, name)
            m.d.sync += [
                getattr(self._count, name).eq(getattr(following, name)),
                getattr(self._single, name).eq(single),
                self._last[name].eq(single),
            ]
        m.d.sync += [x.eq(following.x0) for x in (self._x, self._tile_x)]
        m.d.sync += [y.eq(following.y0) for y in (self._y, self._tile_y)]
        m.d.sync += self._go_to(following.origin, *POINTS)
        m.d.sync += [self._acc.eq(following.acc), self._overwrite.eq(~following.accumulate)]

    def _deliver(self, m: Module) -> None:
        """One cycle after the request the scratchpad's word is here; two cycles after it the vector
        enters the array."""
        fired = Signal()  # the vector before went in the cycle before
        wanted = self._wanted
        fetched = registers("fetched", inside=1, pad=8, tag=TAG)
        m.d.sync += [fired.eq(self._fire), self.valid.eq(fired)]
        with m.If(self._fire):
            m.d.sync += [
                fetched.inside.eq(wanted.inside),
                fetched.pad.eq(wanted.pad),
                *(fetched.tag[name].eq(getattr(wanted, name)) for name, _ in TAG),
            ]
        with m.If(fired):
            pad = fetched.pad.replicate(self.config.rows)
            m.d.sync += self.x.eq(Mux(fetched.inside, self.scratchpad.data, pad))
            m.d.sync += self.tag.eq(fetched.tag)
        if self.config.zero_points:
            zero = Signal(signed(8), name="fetched_zero", reset_less=True)
            with m.If(self._fire):
                m.d.sync += zero.eq(wanted.input_zero)
            with m.If(fired):
                m.d.sync += self.input_zero.eq(zero)
