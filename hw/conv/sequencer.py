"""The two sequencers of the CONV engine: weights into the array, activations through it."""

from __future__ import annotations

from types import SimpleNamespace

from amaranth.hdl import Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from systole.hw.bus.interfaces import ScratchpadRead, command_layout
from systole.hw.conv.array import SystolicArray
from systole.isa import Config, Opcode

CONV = command_layout(Opcode.CONV)

COORDINATE = signed(26)
"""Holds every column or row a CONV can name: +-2^15 + 2^16 * 2^8 + 2^6 * 2^8."""

TAG = data.StructLayout({"acc": 16, "overwrite": 1, "last": 1})
"""What travels with a vector: its accumulator word, whether it overwrites it, and whether it is the
last vector of its command."""


def registers(prefix: str, **shapes) -> SimpleNamespace:
    """One register for each name. They hold data qualified by a valid bit elsewhere: no reset."""
    return SimpleNamespace(
        **{
            name: Signal(shape, name=f"{prefix}_{name}", reset_less=True)
            for name, shape in shapes.items()
        }
    )


def fields(*names: str) -> dict:
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
    * ``loaded``: the shadow weights may be swapped in, now or at any later time.
    * ``swap``: they are.
    """

    def __init__(self, config: Config, array: SystolicArray):
        self.config = config
        self.capture_lead = array.capture_lead
        super().__init__(
            {
                "command": In(stream.Signature(CONV)),
                "read_en": Out(1),
                "read_addr": Out(20),
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
        tile_addr = Signal(20)
        row_addr = Signal(20)
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


class ActivationSequencer(wiring.Component):
    """Streams each command's activations from the scratchpad into the array, one vector a cycle.

    No cycle is lost between rows, tiles and commands, unless the scratchpad refuses a read, a
    tile's weights are not ``loaded``, or a command adds to the very word the vector just before it
    went to.

    * ``command``: the next command is taken, and its address steps multiplied out, while the
      current one streams.
    * ``swap``: to the array and the weight sequencer, in the cycle in which a tile's first vector
      is requested, which is ``SWAP_LEAD`` cycles before it enters the array.
    * ``x``, ``valid``, ``tag``: the vectors, in the cycle in which they enter the array.
    """

    def __init__(self, config: Config):
        self.config = config
        super().__init__(
            {
                "command": In(stream.Signature(CONV)),
                "scratchpad": Out(ScratchpadRead(config)),
                "loaded": In(1),
                "swap": Out(1),
                "x": Out(8 * config.rows),
                "valid": Out(1),
                "tag": Out(TAG),
            }
        )

    def elaborate(self, platform) -> Module:
        m = Module()
        command = self.command.p

        # The next command, with all products its addresses need. Addresses are modulo 2^20.
        copied = ("accumulate", "acc", "blocks", "src_block", "in_w", "in_h", "x0", "y0", "out_w")
        copied += ("out_h", "kernel_w", "kernel_h", "stride_x", "stride_y", "dilation_x")
        copied += ("dilation_y", "pad")
        prepared = fields(*copied) | {"origin": 20, "stride_row": 20, "dilation_row": 20}
        following = registers("following", **prepared)
        following_valid = Signal()
        take = Signal()
        m.d.comb += self.command.ready.eq(~following_valid)
        with m.If(take):
            m.d.sync += following_valid.eq(0)
        with m.If(self.command.valid & self.command.ready):
            m.d.sync += following_valid.eq(1)
            m.d.sync += [getattr(following, name).eq(command[name]) for name in copied]
            pitch = command.src_pitch
            m.d.sync += [
                following.origin.eq(command.src + command.y0 * pitch + command.x0),
                following.stride_row.eq(command.stride_y * pitch),
                following.dilation_row.eq(command.dilation_y * pitch),
            ]

        # The current command, the loop counters (down to 1), and the coordinates and address of the
        # current vector and of the points the loops return to.
        current = registers("current", **prepared)
        count = registers("count", **fields("blocks", "kernel_h", "kernel_w", "out_h", "out_w"))
        active = Signal()
        x, tile_x = Signal(COORDINATE), Signal(COORDINATE)
        y, tile_y = Signal(COORDINATE), Signal(COORDINATE)
        addr = registers("addr", vector=20, row=20, tile=20, taps=20, block=20)
        acc, first_vector, overwrite = Signal(16), Signal(), Signal()

        inside = Signal()
        request, fire = Signal(), Signal()
        fired = Signal()
        fired_acc = Signal(16)
        # A vector reads its accumulators in the cycle in which the one before it writes its own.
        # Only a tile's first vector can meet the word of the one before it.
        conflict = first_vector & fired & ~overwrite & (acc == fired_acc)
        m.d.comb += [
            inside.eq((x.as_unsigned() < current.in_w) & (y.as_unsigned() < current.in_h)),
            request.eq(active & (~first_vector | self.loaded) & ~conflict),
            self.scratchpad.valid.eq(request & inside),
            self.scratchpad.addr.eq(addr.vector),
            fire.eq(request & (~inside | self.scratchpad.ready)),
            self.swap.eq(fire & first_vector),
        ]

        last = {name: Signal(name=f"last_{name}") for name in vars(count)}
        for name, register in vars(count).items():
            m.d.comb += last[name].eq(register == 1)
        last_vector = last["out_w"] & last["out_h"]
        last_tile = last["kernel_w"] & last["kernel_h"] & last["blocks"]

        def restart(*names: str):
            return [getattr(count, name).eq(getattr(current, name)) for name in names]

        def advance(name: str):
            return getattr(count, name).eq(getattr(count, name) - 1)

        def go_to(target, *points: str):
            return [getattr(addr, point).eq(target) for point in points]

        with m.If(fire):
            m.d.sync += [fired_acc.eq(acc), first_vector.eq(last_vector)]
            with m.If(last_vector):
                m.d.sync += [acc.eq(current.acc), overwrite.eq(0)]
                m.d.sync += restart("out_w", "out_h")
            with m.Else():
                m.d.sync += acc.eq(acc + 1)
            with m.If(~last["out_w"]):
                m.d.sync += [advance("out_w"), x.eq(x + current.stride_x)]
                m.d.sync += go_to(addr.vector + current.stride_x, "vector")
            with m.Elif(~last["out_h"]):
                m.d.sync += [advance("out_h"), restart("out_w")]
                m.d.sync += [x.eq(tile_x), y.eq(y + current.stride_y)]
                m.d.sync += go_to(addr.row + current.stride_row, "vector", "row")
            with m.Elif(~last["kernel_w"]):
                m.d.sync += advance("kernel_w")
                m.d.sync += [p.eq(tile_x + current.dilation_x) for p in (x, tile_x)]
                m.d.sync += y.eq(tile_y)
                m.d.sync += go_to(addr.tile + current.dilation_x, "vector", "row", "tile")
            with m.Elif(~last["kernel_h"]):
                m.d.sync += [advance("kernel_h"), restart("kernel_w")]
                m.d.sync += [p.eq(current.x0) for p in (x, tile_x)]
                m.d.sync += [p.eq(tile_y + current.dilation_y) for p in (y, tile_y)]
                to = addr.taps + current.dilation_row
                m.d.sync += go_to(to, "vector", "row", "tile", "taps")
            with m.Elif(~last["blocks"]):
                m.d.sync += [advance("blocks"), restart("kernel_w", "kernel_h")]
                m.d.sync += [p.eq(current.x0) for p in (x, tile_x)]
                m.d.sync += [p.eq(current.y0) for p in (y, tile_y)]
                m.d.sync += go_to(addr.block + current.src_block, *vars(addr))
            with m.Else():
                m.d.sync += active.eq(0)

        m.d.comb += take.eq(following_valid & (~active | (fire & last_vector & last_tile)))
        with m.If(take):
            m.d.sync += [active.eq(1), first_vector.eq(1)]
            m.d.sync += [getattr(current, f).eq(getattr(following, f)) for f in prepared]
            m.d.sync += [getattr(count, f).eq(getattr(following, f)) for f in vars(count)]
            m.d.sync += [p.eq(following.x0) for p in (x, tile_x)]
            m.d.sync += [p.eq(following.y0) for p in (y, tile_y)]
            m.d.sync += go_to(following.origin, *vars(addr))
            m.d.sync += [acc.eq(following.acc), overwrite.eq(~following.accumulate)]

        # One cycle later the scratchpad's word is here; two cycles later the vector enters the
        # array.
        fetched = registers("fetched", inside=1, pad=8, tag=TAG)
        m.d.sync += [fired.eq(fire), self.valid.eq(fired)]
        with m.If(fire):
            m.d.sync += [
                fetched.inside.eq(inside),
                fetched.pad.eq(current.pad),
                fetched.tag.acc.eq(acc),
                fetched.tag.overwrite.eq(overwrite),
                fetched.tag.last.eq(last_vector & last_tile),
            ]
        with m.If(fired):
            pad = fetched.pad.replicate(self.config.rows)
            m.d.sync += self.x.eq(Mux(fetched.inside, self.scratchpad.data, pad))
            m.d.sync += self.tag.eq(fetched.tag)
        return m
