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
from systole.hw.window.rows import RowSequencer, is_row, row_layout
from systole.hw.window.walk import (
    TapWalk,
    WalkSetup,
    following_pass,
    is_last,
    prepared_layout,
    spans,
)
from systole.hw.window.words import SourceWords
from systole.isa import Config, Opcode, WindowOp
from systole.isa.commands import ADDRESS_BITS
from systole.isa.timing import window_modes


class Kind(enum.Enum, shape=2):
    """What the word of a token is."""

    PIXEL = 0
    WEIGHT = 1
    PARAMS = 2
    SEGMENT = 3


def token_layout(config: Config) -> data.StructLayout:
    """A source word (read from ``addr``, or ``pad`` unless ``read``) and what to do with it.

    ``number``: which pass over the block it belongs to, and so which channels of the word.
    ``emits``: it completes a word of the result. ``index``: of its word in the line memory.
    ``params``: its index among the words of parameters. ``is_row``: it is one of a row operation,
    whatever ``kind`` says, and keeps the word before unless ``read``."""
    what = {
        "pixel": pixel_layout(),
        "weight": weight_layout(),
        "params": range(config.pass_param_words),
        "segment": segment_layout(config),
    }
    is_row = {}
    if config.row_ops:
        what["row"] = row_layout(config)
        is_row["is_row"] = 1
    return data.StructLayout(
        {
            **is_row,
            "kind": Kind,
            "read": 1,
            "addr": ADDRESS_BITS,
            "number": range(config.window_passes),
            "emits": 1,
            "index": INDEX_BITS,
            "what": data.UnionLayout(what),
        }
    )


class TokenIssue(wiring.Component):
    """Turns WINDOW commands into tokens, one a cycle, and holds three until they are taken.

    ::

        command -> WalkSetup -> TapWalk -> SourceWords -> states -> checked -> tokens
                   (next one)   (this one)

    The states issue, for every pass over a channel block, its weights, its parameters, the words of
    its walk and, for IM2COL, what remains of a pixel's last run::

        BEGIN -> [WEIGHTS ->] [PARAMETERS ->] WALK [-> FLUSH -> WALK] -> next block or BEGIN

    Of row operations, all is issued in ROWS, as :class:`~hw.window.rows.RowSequencer` has it, but
    for the blocks' parameters.

    * ``command``: one is prepared while the one before is at work.
    * ``tokens``: in order. ``blocked``: the word of the token on offer was still to be written in
      the cycle before.
    * ``checks``: whether the word ``check`` is still to be written must be said by ``clash``, in
      the same cycle; with ``follows`` that of the token on offer is among those to be written.
    * ``current``: the command whose tokens are issued. It changes two cycles after the last token
      of the command before it was taken, but only if the two agree in path and
      :func:`~systole.isa.timing.window_modes`, or if ``drained`` was high: no result was under way.
    * ``begun``: pulses in the first cycle of ``current``.
    * ``stored``: the weights of ``current`` go into the line memory.
    * ``params_taken``: the block's parameters have left the pipeline's front for the
      requantisation; the next block's may be read.
    * ``row_taken``, ``rows_complete``: with row operations, as for the sequencer.
    """

    command: stream.Interface
    tokens: stream.Interface
    blocked: Signal
    checks: Signal
    check: Signal
    follows: Signal
    clash: Signal
    current: data.View
    begun: Signal
    stored: Signal
    drained: Signal
    params_taken: Signal
    row_taken: Signal
    rows_complete: Signal

    def __init__(self, config: Config):
        self.config = config
        rows = {"row_taken": In(1), "rows_complete": In(1)} if config.row_ops else {}
        super().__init__(
            {
                "command": In(stream.Signature(command_layout(Opcode.WINDOW))),
                "tokens": Out(stream.Signature(token_layout(config))),
                "blocked": Out(1),
                "checks": Out(1),
                "check": Out(ADDRESS_BITS),
                "follows": Out(1),
                "clash": In(1),
                "current": Out(prepared_layout(config)),
                "begun": Out(1),
                "stored": Out(1),
                "drained": In(1),
                "params_taken": In(1),
                **rows,
            }
        )
        self._setup = WalkSetup(config)
        self._walk = TapWalk(config)
        self._words = SourceWords(config)
        self._rows = RowSequencer(config) if config.row_ops else None
        # The command at hand, and the one that has been prepared, is a row operation.
        self._is_row, self._row_follows = Signal(), Signal()
        # The token that is issued, and whether there is room for it.
        self._issued = record(token_layout(config), reset_less=True)
        self._push = Signal()
        self._has_checked = Signal()  # the first register has a token
        self._room = Signal()
        # The command at hand.
        self._im2col = Signal()
        self._again = Signal()
        self._blocks_left = Signal(self.current.cmd.blocks.shape())
        self._pass = Signal(range(config.window_passes))
        self._weight_addr = Signal(ADDRESS_BITS)
        self._block_weights = Signal(ADDRESS_BITS)
        self._params_addr = Signal(ADDRESS_BITS)
        self._index = Signal(INDEX_BITS)  # of the tap, or of the column in the region's row
        # the weights' place in the window
        self._slot_x = Signal(3)
        self._slot_y = Signal(3)
        self._params_index = Signal(range(config.pass_param_words))
        self._params_held = Signal()  # parameters wait in the pipeline to be taken over
        # In WALK, a word of the walk comes next, not weights that are read again. A register of its
        # own: the walk's conditions stand behind it.
        self._walking = Signal()
        # IM2COL: bytes of the word being collected before and after the segment.
        self._fill = Signal(range(config.rows))
        self._stop = Signal(range(2 * config.rows))
        self._unrotated = Signal(signed(len(self._fill) + 1))
        self._flush_is_end = Signal()

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.submodules.setup = setup = self._setup
        m.submodules.walk = walk = self._walk
        m.submodules.words = words = self._words
        if self._rows is not None:
            m.submodules.rows = rows = self._rows
            m.d.comb += [
                rows.cmd.eq(walk.current.cmd),
                rows.start.eq(self.begun & self._is_row),
                rows.step.eq(rows.valid & self._room),
                rows.taken.eq(self.row_taken),
                rows.complete.eq(self.rows_complete),
            ]
        connect(m, flipped(self.command), setup.cmd)
        m.d.comb += [
            walk.prepared.eq(setup.prepared),
            walk.start.eq(setup.take),
            walk.step.eq(words.takes),
            words.current.eq(walk.current),
            words.next_tap.eq(walk.tap),
            words.start.eq(setup.take),
            words.step.eq(self._walking & words.valid & self._room),
            self.current.eq(walk.current),
            self._im2col.eq(walk.current.cmd.op == WindowOp.IM2COL),
        ]
        m.d.sync += self.begun.eq(setup.take)
        self._hold_tokens(m)
        may_follow = self._compare_modes(m)
        _, stored, again = self._weights_of(setup.prepared)
        with m.If(setup.take):
            m.d.sync += [self.stored.eq(stored), self._again.eq(again)]
            if self._rows is not None:
                m.d.sync += self._is_row.eq(self._row_follows)
        m.d.comb += [
            self._stop.eq(self._fill + words.tap.bytes),
            self._unrotated.eq(words.tap.byte - self._fill),
        ]

        with m.FSM():
            with m.State("BEGIN"), m.If(setup.ready & may_follow):
                self._take_command(m)
                self._begin_block(m, setup.prepared)
                if self._rows is not None:
                    with m.If(self._row_follows):
                        m.next = "ROWS"
            with m.State("WEIGHTS"):
                self._read_weight(m)
                with m.If(self._room):
                    self._next_weight(m)
            with m.State("PARAMETERS"):
                self._read_parameters(m)
            if self._rows is not None:
                with m.State("ROWS"):
                    self._issue_rows(m, self._rows)
            with m.State("WALK"):
                with m.If(~self._walking):
                    self._read_weight(m)
                    with m.If(self._room):
                        m.d.sync += self._walking.eq(1)
                with m.Elif(words.valid):
                    self._issue_word(m)
                    with m.If(self._room & ~words.prefetch):
                        self._advance(m)
                        self._leave_walk(m)
            with m.State("FLUSH"):
                self._flush(m)
        with m.If(self.params_taken):
            m.d.sync += self._params_held.eq(0)
        return m

    def _hold_tokens(self, m: Module) -> None:
        """Three registers: one for the time in which a token's word is looked for among those to be
        written, the token on offer, and one behind it, so that it is known early whether there is
        room."""
        tokens, has_checked, blocked = self.tokens, self._has_checked, self.blocked
        layout = tokens.payload.shape()
        checked, first, second = (
            record(layout, name=n, reset_less=True) for n in ("checked", "first", "second")
        )
        has_second, second_blocked, moves = Signal(), Signal(), Signal()
        m.d.comb += [
            tokens.payload.eq(first),
            self._room.eq(~has_second & ~blocked),
            moves.eq(has_checked & self._room),
            self.checks.eq(blocked | (has_checked & checked.read)),
            self.check.eq(Mux(blocked, tokens.payload.addr, checked.addr)),
            self.follows.eq(tokens.valid & ~blocked & tokens.payload.emits),
        ]
        with m.If(self._room):
            m.d.sync += has_checked.eq(self._push)
            with m.If(self._push):
                m.d.sync += checked.eq(self._issued)
        with m.If(~tokens.valid | tokens.ready):
            m.d.sync += [
                tokens.valid.eq(has_second | moves),
                blocked.eq(Mux(has_second, second_blocked, moves & self.clash)),
                has_second.eq(0),
            ]
            with m.If(has_second):
                m.d.sync += first.eq(second)
            with m.Elif(moves):
                m.d.sync += first.eq(checked)
        with m.Elif(moves):
            m.d.sync += [has_second.eq(1), second.eq(checked), second_blocked.eq(self.clash)]
        with m.Elif(blocked):
            m.d.sync += blocked.eq(self.clash)

    def _compare_modes(self, m: Module) -> Value:
        """Find whether the next command may follow the current one now."""
        prepared, current = self._setup.prepared, self.current
        modes = window_modes(self.config)
        same = Signal()
        drained = Signal()  # nothing was under way in the cycle before, nor on its way there
        m.d.sync += drained.eq(self.drained & ~self._has_checked & ~self.tokens.valid)
        with m.If(self._setup.decided):
            equal = [prepared.cmd[f] == current.cmd[f] for f in modes]
            if self.config.row_ops:
                equal.append(~self._is_row)
                m.d.sync += self._row_follows.eq(is_row(prepared.cmd))
            m.d.sync += same.eq(Cat(prepared.fast == current.fast, *equal).all())
        return ~self._has_checked & ~self.tokens.valid & (drained | same)

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
            self._pass.eq(0),
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
            m.d.sync += self._walking.eq(1)
            m.next = "WALK"
        with m.Else():
            m.next = "PARAMETERS"

    def _read_weight(self, m: Module) -> None:
        """Issue the next word of weights."""
        issued = self._issued
        m.d.comb += [
            self._push.eq(1),
            issued.kind.eq(Kind.WEIGHT),
            issued.number.eq(self._pass),
            issued.read.eq(1),
            issued.addr.eq(self._weight_addr),
            issued.index.eq(self._index),
            issued.what.weight.store.eq(self.stored),
            issued.what.weight.x.eq(self._slot_x),
            issued.what.weight.y.eq(self._slot_y),
        ]
        with m.If(self._room):
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
        issued = self._issued
        m.d.comb += [
            self._push.eq(~self._params_held),
            issued.kind.eq(Kind.PARAMS),
            issued.number.eq(self._pass),
            issued.read.eq(1),
            issued.addr.eq(self._params_addr),
            issued.what.params.eq(self._params_index),
        ]
        with m.If(self._room & self._push):
            m.d.sync += [
                self._params_addr.eq(self._params_addr + 1),
                self._params_index.eq(self._params_index + 1),
            ]
            with m.If(self._params_index == self.config.pass_param_words - 1):
                m.d.sync += [self._params_held.eq(1), self._walking.eq(~self._again)]
                m.next = "WALK"
                if self._rows is not None:
                    with m.If(self._is_row):
                        m.d.comb += self._rows.granted.eq(1)
                        m.d.sync += self._walking.eq(0)
                        m.next = "ROWS"

    def _issue_rows(self, m: Module, rows: RowSequencer) -> None:
        """Issue the next token of a row operation, or go to a block's parameters."""
        issued = self._issued
        m.d.comb += [
            self._push.eq(rows.valid),
            issued.is_row.eq(1),
            issued.kind.eq(Kind.PARAMS),
            issued.number.eq(rows.number),
            issued.read.eq(rows.read),
            issued.addr.eq(Mux(rows.constant, self._params_addr, rows.addr)),
            issued.emits.eq(rows.emits),
            issued.what.row.eq(rows.row),
        ]
        with m.If(rows.step & rows.constant):
            m.d.sync += self._params_addr.eq(self._params_addr + 1)
        with m.If(rows.done):
            m.next = "BEGIN"
        with m.Elif(rows.parameters):
            m.next = "PARAMETERS"

    def _issue_word(self, m: Module) -> None:
        """Issue the word that the walk is at."""
        issued, words, tap = self._issued, self._words, self._words.tap
        pixel = issued.what.pixel
        m.d.comb += [
            self._push.eq(1),
            issued.kind.eq(Mux(self._im2col, Kind.SEGMENT, Kind.PIXEL)),
            issued.number.eq(self._pass),
            issued.read.eq(words.limit != 0),
            issued.addr.eq(words.addr),
            issued.emits.eq(tap.mac & tap.last),
            issued.index.eq(self._index),
        ]
        if self.config.window_by_columns:
            with m.If(self._walk.current.columns):
                newest = self.config.window_kernel - 1
                m.d.comb += issued.index.eq(self._index + tap.column - newest)
        with m.If(self._im2col):
            self._describe_segment(m)
        with m.Else():
            m.d.comb += [
                pixel.mac.eq(tap.mac),
                pixel.part.eq(tap.part),
                pixel.column.eq(tap.column),
                pixel.first.eq(words.first),
                pixel.last.eq(tap.last),
            ]

    def _describe_segment(self, m: Module) -> None:
        """The part of a token that says how IM2COL collects the walk's segment."""
        issued, words, rows = self._issued, self._words, self.config.rows
        segment, unrotated, collects = issued.what.segment, self._unrotated, ~words.prefetch
        emits = collects & (words.tap.last | (self._stop >= rows))
        m.d.comb += [
            issued.emits.eq(emits),
            issued.index.eq(words.tap.line),
            segment.reload.eq(words.reload),
            segment.fetch.eq(words.fetch),
            segment.limit.eq(words.limit),
            segment.split.eq(words.split),
            segment.rotate.eq(Mux(unrotated < 0, unrotated + rows, unrotated)),
            segment.fill.eq(self._fill),
            segment.stop.eq(Mux(collects, self._stop, self._fill)),
            segment.emit.eq(emits),
            segment.last.eq(collects & words.tap.last & (self._stop <= rows)),
        ]

    def _advance(self, m: Module) -> None:
        """What changes with every word of the walk: index, bytes collected, weights to read."""
        tap, fast, rows = self._words.tap, self.current.fast, self.config.rows
        index, fill, stop = self._index, self._fill, self._stop
        m.d.sync += self._walking.eq(~self._again)
        with m.If(~fast | tap.last):
            m.d.sync += index.eq(Mux(Mux(fast, tap.row_end, tap.last), 0, index + 1))
        with m.If(stop > rows):
            m.d.sync += fill.eq(stop - rows)
        with m.Elif(tap.last | (stop == rows)):
            m.d.sync += fill.eq(0)
        with m.Else():
            m.d.sync += fill.eq(stop)
        # Weights that are read again: the block's for the next output, too.
        with m.If(self._again & tap.last & ~tap.block_end):
            m.d.sync += self._weight_addr.eq(self._block_weights)
        with m.If(tap.block_end):
            self._end_pass(m)

    def _end_pass(self, m: Module) -> None:
        """Go back to the block's weights, or on to the next block's."""
        m.d.sync += self._pass.eq(following_pass(self._pass, self.config))
        with m.If(is_last(self._pass, self.config)):
            m.d.sync += [
                self._blocks_left.eq(self._blocks_left - 1),
                self._block_weights.eq(self._weight_addr),
            ]
        with m.Else():
            m.d.sync += self._weight_addr.eq(self._block_weights)

    def _leave_walk(self, m: Module) -> None:
        """Go on to the pixel's last bytes, the next block or the next command, if it is time."""
        tap = self._words.tap
        with m.If(self._im2col & tap.last & (self._stop > self.config.rows)):
            m.d.sync += [self._flush_is_end.eq(tap.block_end), self._walking.eq(0)]
            m.next = "FLUSH"
        with m.Elif(tap.block_end):
            m.d.sync += self._walking.eq(0)
            last_pass = self._im2col | is_last(self._pass, self.config)
            with m.If(last_pass & (self._blocks_left == 0)):
                m.next = "BEGIN"
            with m.Else():
                self._begin_block(m, self._walk.current)

    def _flush(self, m: Module) -> None:
        """IM2COL: issue a token without a word for the pixel's bytes that did not fit."""
        issued, segment = self._issued, self._issued.what.segment
        m.d.comb += [
            self._push.eq(1),
            issued.kind.eq(Kind.SEGMENT),
            issued.emits.eq(1),
            segment.fill.eq(self._fill),
            segment.stop.eq(self._fill),
            segment.emit.eq(1),
            segment.last.eq(1),
        ]
        with m.If(self._room):
            m.d.sync += self._fill.eq(0)
            with m.If(self._flush_is_end):
                m.next = "BEGIN"
            with m.Else():
                m.d.sync += self._walking.eq(1)
                m.next = "WALK"
