"""The front of the WINDOW engine: turns commands into tokens."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, Value, signed
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from systole.hw.bus.interfaces import (
    command_layout,
    record,
)
from systole.hw.window.im2col import segment_layout
from systole.hw.window.lines import INDEX_BITS, pixel_layout, weight_layout
from systole.hw.window.walk import TapWalk, WalkSetup, prepared_layout, spans
from systole.isa import Config, Opcode, WindowOp
from systole.isa.commands import ADDRESS_BITS
from systole.isa.params import PARAM_BYTES
from systole.isa.timing import window_modes


class Kind(enum.Enum, shape=2):
    """What the word of a token is."""

    PIXEL = 0
    WEIGHT = 1
    PARAMS = 2
    SEGMENT = 3


def token_layout(config: Config) -> data.StructLayout:
    """A source word (read from ``addr``, or ``pad`` unless ``read``) and what to do with it.

    ``emits``: it completes a word of the result. ``params``: its index among the words of
    parameters."""
    return data.StructLayout(
        {
            "kind": Kind,
            "read": 1,
            "addr": ADDRESS_BITS,
            "emits": 1,
            "pixel": pixel_layout(),
            "weight": weight_layout(),
            "params": range(PARAM_BYTES),
            "segment": segment_layout(config),
        }
    )


class TokenIssue(wiring.Component):
    """Turns WINDOW commands into tokens, one a cycle, and holds the next token until it is taken.

    ::

        command -> WalkSetup -> TapWalk -> states -> tokens
                   (next one)   (this one)

    The states issue, for every channel block, its weights, its parameters, the words of its walk
    and, for IM2COL, what remains of a pixel's last run::

        BEGIN -> [WEIGHTS ->] [PARAMETERS ->] WALK [-> FLUSH -> WALK] -> next block or BEGIN

    * ``command``: one is prepared while the one before is at work.
    * ``tokens``: in order.
    * ``current``: the command whose tokens are issued. It changes one cycle after the last token of
      the command before it was offered, but only if the two agree in path and
      :func:`~systole.isa.timing.window_modes`, or if ``drained`` was high: no result was under way.
    * ``begun``: pulses in the first cycle of ``current``. ``clear_weights``: and the window's
      weights do not belong to results under way.
    * ``stored``: the weights of ``current`` go into the line memory.
    * ``params_taken``: the block's parameters have left the pipeline's front for the
      requantisation; the next block's may be read.
    """

    command: stream.Interface
    tokens: stream.Interface
    current: data.View
    begun: Signal
    clear_weights: Signal
    stored: Signal
    drained: Signal
    params_taken: Signal

    def __init__(self, config: Config):
        self.config = config
        super().__init__(
            {
                "command": In(stream.Signature(command_layout(Opcode.WINDOW))),
                "tokens": Out(stream.Signature(token_layout(config))),
                "current": Out(prepared_layout(config)),
                "begun": Out(1),
                "clear_weights": Out(1),
                "stored": Out(1),
                "drained": In(1),
                "params_taken": In(1),
            }
        )
        self._setup = WalkSetup(config)
        self._walk = TapWalk(config)
        # The token register and what goes into it next.
        self._following = record(token_layout(config))
        self._push = Signal()
        self._free = Signal()
        # The command at hand.
        self._im2col = Signal()
        self._again = Signal()
        self._blocks_left = Signal(self.current.cmd.blocks.shape())
        self._weight_addr = Signal(ADDRESS_BITS)
        self._block_weights = Signal(ADDRESS_BITS)
        self._params_addr = Signal(ADDRESS_BITS)
        self._index = Signal(INDEX_BITS)  # of the tap, or of the column in the region's row
        # the weights' place in the window
        self._slot_x = Signal(3)
        self._slot_y = Signal(3)
        self._params_index = Signal(range(PARAM_BYTES))
        self._params_held = Signal()  # parameters wait in the pipeline to be taken over
        self._weight_first = Signal()  # weights are read again: the tap's come next
        # IM2COL: bytes of the word being collected before and after the segment.
        self._fill = Signal(range(config.rows))
        self._stop = Signal(range(2 * config.rows))
        self._unrotated = Signal(signed(len(self._fill) + 1))
        self._flush_is_end = Signal()
        # Whether the next command may follow.
        self._same = Signal()
        self._empty = Signal()

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.setup = setup = self._setup
        m.submodules.walk = walk = self._walk
        connect(m, flipped(self.command), setup.cmd)
        m.d.comb += [
            walk.prepared.eq(setup.prepared),
            walk.start.eq(setup.take),
            self.current.eq(walk.current),
            self._im2col.eq(walk.current.cmd.op == WindowOp.IM2COL),
        ]
        m.d.sync += self.begun.eq(setup.take)
        self._hold_token(m)
        self._compare_modes(m)
        _, stored, again = self._weights_of(walk.current)
        m.d.comb += [self.stored.eq(stored), self._again.eq(again)]
        m.d.comb += [
            self._stop.eq(self._fill + walk.count),
            self._unrotated.eq(walk.byte - self._fill),
        ]

        with m.FSM():
            with m.State("BEGIN"), m.If(setup.ready & self._free & (self._empty | self._same)):
                self._take_command(m)
                self._begin_block(m, setup.prepared)
            with m.State("WEIGHTS"):
                self._read_weight(m)
                with m.If(self._free):
                    self._next_weight(m)
            with m.State("PARAMETERS"):
                self._read_parameters(m)
            with m.State("WALK"):
                with m.If(self._again & self._weight_first):
                    self._read_weight(m)
                    with m.If(self._free):
                        m.d.sync += self._weight_first.eq(0)
                with m.Else():
                    self._issue_word(m)
                    with m.If(self._free):
                        self._advance(m)
                        self._leave_walk(m)
            with m.State("FLUSH"):
                self._flush(m)
        with m.If(self.params_taken):
            m.d.sync += self._params_held.eq(0)
        return m

    def _hold_token(self, m: Module) -> None:
        """The register of the token on offer."""
        tokens = self.tokens
        m.d.comb += self._free.eq(~tokens.valid | tokens.ready)
        with m.If(self._free):
            m.d.sync += tokens.valid.eq(self._push)
            with m.If(self._push):
                m.d.sync += tokens.payload.eq(self._following)

    def _compare_modes(self, m: Module) -> None:
        """Find whether the next command may follow the current one at once."""
        prepared, current = self._setup.prepared, self.current
        modes = window_modes(self.config)
        equal = Signal(len(modes) + 1)
        fresh = Signal()  # the command began with an empty pipeline
        with m.If(self._setup.ready):
            m.d.comb += equal.eq(
                Cat(
                    prepared.fast == current.fast,
                    *(prepared.cmd[f] == current.cmd[f] for f in modes),
                )
            )
        m.d.comb += [
            self._same.eq(equal.all()),
            self._empty.eq(~self.tokens.valid & self.drained),
            self.clear_weights.eq(self.begun & fresh),
        ]
        with m.If(self._setup.take):
            m.d.sync += fresh.eq(self._empty)

    def _weights_of(self, command: data.View) -> tuple[Value, Value, Value]:
        """Where a command's weights go: into the window, into the line memory, or into the window
        again before every tap (the general path with too many taps)."""
        weighs = command.cmd.op == WindowOp.DEPTHWISE
        fits = command.taps <= self.config.window_width
        return weighs & command.fast, weighs & ~command.fast & fits, weighs & ~command.fast & ~fits

    def _corner(self, command: data.View) -> tuple[Value, Value]:
        """The window's column and row of the first tap."""
        width = self.config.window_kernel
        column, row = (
            Mux(command.fast, width - size, width - 1)[:3] for size in spans(command, self.config)
        )
        return column, row

    def _take_command(self, m: Module) -> None:
        """Begin the command that has been prepared."""
        prepared = self._setup.prepared
        column, row = self._corner(prepared)
        m.d.comb += self._setup.take.eq(1)
        m.d.sync += [
            self._blocks_left.eq(prepared.cmd.blocks - 1),
            self._weight_addr.eq(prepared.cmd.weights),
            self._block_weights.eq(prepared.cmd.weights),
            self._params_addr.eq(prepared.cmd.params),
            self._index.eq(0),
            self._weight_first.eq(1),
            self._fill.eq(0),
            self._slot_x.eq(column),
            self._slot_y.eq(row),
        ]

    def _begin_block(self, m: Module, command: data.View) -> None:
        """Go to the first state that has tokens for a block of ``command``."""
        in_window, stored, _ = self._weights_of(command)
        with m.If(in_window | stored):
            m.next = "WEIGHTS"
        with m.Elif((command.cmd.op == WindowOp.MAX) | (command.cmd.op == WindowOp.IM2COL)):
            m.next = "WALK"
        with m.Else():
            m.next = "PARAMETERS"

    def _read_weight(self, m: Module) -> None:
        """Issue the next word of weights."""
        following = self._following
        m.d.comb += [
            self._push.eq(1),
            following.kind.eq(Kind.WEIGHT),
            following.read.eq(1),
            following.addr.eq(self._weight_addr),
            following.weight.index.eq(self._index),
            following.weight.store.eq(self.stored),
            following.weight.x.eq(self._slot_x),
            following.weight.y.eq(self._slot_y),
        ]
        with m.If(self._free):
            m.d.sync += self._weight_addr.eq(self._weight_addr + 1)

    def _next_weight(self, m: Module) -> None:
        """Go on to the next tap's weights, or to the parameters."""
        column, row = self._corner(self._walk.current)
        step_x: Value | int = 1
        step_y: Value | int = 1
        if self.config.window_by_columns:
            step_x, step_y = self.current.cmd.dilation_x, self.current.cmd.dilation_y
        m.d.sync += self._index.eq(self._index + 1)
        with m.If(self._slot_x == self.config.window_kernel - 1):
            m.d.sync += [self._slot_x.eq(column), self._slot_y.eq(self._slot_y + step_y)]
        with m.Else():
            m.d.sync += self._slot_x.eq(self._slot_x + step_x)
        with m.If(self._index == self._walk.current.taps - 1):
            m.d.sync += [self._index.eq(0), self._slot_y.eq(row)]
            m.next = "PARAMETERS"

    def _read_parameters(self, m: Module) -> None:
        """Issue the block's parameters, once those of the block before have been taken."""
        following = self._following
        m.d.comb += [
            self._push.eq(~self._params_held),
            following.kind.eq(Kind.PARAMS),
            following.read.eq(1),
            following.addr.eq(self._params_addr),
            following.params.eq(self._params_index),
        ]
        with m.If(self._free & self._push):
            m.d.sync += [
                self._params_addr.eq(self._params_addr + 1),
                self._params_index.eq(self._params_index + 1),
            ]
            with m.If(self._params_index == PARAM_BYTES - 1):
                m.d.sync += self._params_held.eq(1)
                m.next = "WALK"

    def _issue_word(self, m: Module) -> None:
        """Issue the word that the walk is at."""
        following, walk = self._following, self._walk
        m.d.comb += [
            self._push.eq(1),
            walk.step.eq(self._free),
            following.kind.eq(Mux(self._im2col, Kind.SEGMENT, Kind.PIXEL)),
            following.read.eq(walk.limit != 0),
            following.addr.eq(walk.addr),
            following.emits.eq(Mux(self._im2col, following.segment.emit, walk.mac & walk.last)),
            following.pixel.index.eq(Mux(self._im2col, walk.line, self._index)),
            following.pixel.mac.eq(walk.mac),
            following.pixel.part.eq(walk.part),
            following.pixel.first.eq(walk.first),
            following.pixel.last.eq(walk.last),
        ]
        if self.config.window_by_columns:
            with m.If(walk.current.columns):
                newest = self.config.window_kernel - 1
                m.d.comb += following.pixel.index.eq(self._index + walk.column - newest)
            m.d.comb += following.pixel.column.eq(walk.column)
        self._describe_segment(m)

    def _describe_segment(self, m: Module) -> None:
        """The part of a token that says how IM2COL collects the walk's segment."""
        segment, walk, rows = self._following.segment, self._walk, self.config.rows
        unrotated = self._unrotated
        m.d.comb += [
            segment.reload.eq(walk.reload),
            segment.fetch.eq(walk.fetch),
            segment.limit.eq(walk.limit),
            segment.split.eq(walk.split),
            segment.rotate.eq(Mux(unrotated < 0, unrotated + rows, unrotated)),
            segment.fill.eq(self._fill),
            segment.stop.eq(self._stop),
            segment.emit.eq(walk.last | (self._stop >= rows)),
            segment.last.eq(walk.last & (self._stop <= rows)),
        ]

    def _advance(self, m: Module) -> None:
        """What changes with every word of the walk: index, bytes collected, weights to read."""
        walk, fast, rows = self._walk, self.current.fast, self.config.rows
        index, fill, stop = self._index, self._fill, self._stop
        m.d.sync += self._weight_first.eq(1)
        with m.If(~fast | walk.last):
            m.d.sync += index.eq(Mux(Mux(fast, walk.row_end, walk.last), 0, index + 1))
        with m.If(stop > rows):
            m.d.sync += fill.eq(stop - rows)
        with m.Elif(walk.last | (stop == rows)):
            m.d.sync += fill.eq(0)
        with m.Else():
            m.d.sync += fill.eq(stop)
        # Weights that are read again: the block's for the next output, too.
        with m.If(self._again & walk.last):
            with m.If(walk.block_end):
                m.d.sync += self._block_weights.eq(self._weight_addr)
            with m.Else():
                m.d.sync += self._weight_addr.eq(self._block_weights)

    def _leave_walk(self, m: Module) -> None:
        """Go on to the pixel's last bytes, the next block or the next command, if it is time."""
        walk = self._walk
        with m.If(self._im2col & walk.last & (self._stop > self.config.rows)):
            m.d.sync += self._flush_is_end.eq(walk.block_end)
            m.next = "FLUSH"
        with m.Elif(walk.block_end):
            m.d.sync += self._blocks_left.eq(self._blocks_left - 1)
            with m.If(self._blocks_left == 0):
                m.next = "BEGIN"
            with m.Else():
                self._begin_block(m, walk.current)

    def _flush(self, m: Module) -> None:
        """IM2COL: issue a token without a word for the pixel's bytes that did not fit."""
        following, segment = self._following, self._following.segment
        m.d.comb += [
            self._push.eq(1),
            following.kind.eq(Kind.SEGMENT),
            following.emits.eq(1),
            segment.fill.eq(self._fill),
            segment.stop.eq(self._fill),
            segment.emit.eq(1),
            segment.last.eq(1),
        ]
        with m.If(self._free):
            m.d.sync += self._fill.eq(0)
            with m.If(self._flush_is_end):
                m.next = "BEGIN"
            with m.Else():
                m.next = "WALK"
