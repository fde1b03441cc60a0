"""The walk of WINDOW's row operations: which words they read, and what is done with each."""

from __future__ import annotations

from amaranth.hdl import Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, enum, wiring
from amaranth.lib.wiring import In, Out

from systole.hw.bus.interfaces import command_layout
from systole.hw.window.walk import following_pass, is_last
from systole.isa import Config, Opcode, WindowOp
from systole.isa.commands import ADDRESS_BITS, ROW_POSITIONS, TABLE_BYTES
from systole.isa.config import bits_for
from systole.isa.params import EXP_ENTRY_BYTES, NORMALISE_PARAMS


class RowKind(enum.Enum, shape=3):
    """What a token of a row operation is."""

    SKIP = 0
    """Nothing."""
    OWN = 1
    """A word of the command's own parameters."""
    ENTRY = 2
    """An entry of SOFTMAX's table."""
    MASK = 3
    """The mask of the word that follows."""
    LARGEST = 4
    """A word in which the largest element is looked for."""
    SUM = 5
    """A word that adds to the row's sums."""
    HIGH = 6
    """A word of NORMALISE's result, and the upper digit of the row's factor."""
    OUT = 7
    """A word of the result: SOFTMAX's, or NORMALISE's last, with the lower digit."""


def row_layout(config: Config) -> data.StructLayout:
    """What a token of a row operation says beside its word.

    ``last``: of its position in this pass. ``limit``: lanes that count. ``at``: byte of the word in
    which the last byte of an entry is."""
    return data.StructLayout(
        {
            "kind": RowKind,
            "last": 1,
            "limit": range(config.reduced_lanes + 1),
            "at": range(config.rows),
        }
    )


def kept_words(config: Config) -> int:
    """Words of a row operation's own parameters in which there is something."""
    return -(-sum(f.bits for f in NORMALISE_PARAMS) // (8 * config.rows))


def is_row(cmd: data.View) -> Value:
    """It is a row operation."""
    return (cmd.op == WindowOp.SOFTMAX) | (cmd.op == WindowOp.NORMALISE)


class RowSequencer(wiring.Component):
    """Walks over the words of SOFTMAX and NORMALISE, one token a cycle.

    ``start``: ``cmd`` is a row operation, as it will be until ``done``. While
    ``valid`` is high, the other outputs describe a token; ``step`` goes on to the next.

    * ``read``: it brings a word, from ``addr``, or, with ``constant``, the next of the parameters.
      A token without keeps the word before.
    * ``number``: the pass over the block. ``emits``: it makes a word of the result.
    * ``parameters``: before the next token, those of a block must be read (NORMALISE). ``granted``
      says that they are.
    * ``taken``, ``complete``: as for :class:`~hw.window.row_lanes.RowLanes`. The last token of a
      row waits until the sums of the row before have been taken; each pass until the numbers of the
      pass before are complete.

    First the parameters and SOFTMAX's table, an entry a cycle; then the passes over all positions.
    In all but the last, positions are the outer loop, blocks (and in each ``window_passes``) the
    inner one; in the last it is the other way round, as for other operations. A word takes two
    cycles where there is a mask, and in the last pass of NORMALISE.
    """

    cmd: data.View
    start: Signal
    step: Signal
    granted: Signal
    taken: Signal
    complete: Signal
    valid: Signal
    read: Signal
    constant: Signal
    addr: Signal
    number: Signal
    emits: Signal
    row: data.View
    parameters: Signal
    done: Signal

    def __init__(self, config: Config):
        self.config = config
        super().__init__(
            {
                "cmd": In(command_layout(Opcode.WINDOW)),
                "start": In(1),
                "step": In(1),
                "granted": In(1),
                "taken": In(1),
                "complete": In(1),
                "valid": Out(1),
                "read": Out(1),
                "constant": Out(1),
                "addr": Out(ADDRESS_BITS),
                "number": Out(range(config.window_passes)),
                "emits": Out(1),
                "row": Out(row_layout(config)),
                "parameters": Out(1),
                "done": Out(1),
            }
        )
        self._softmax = Signal()
        # The pass.
        self._kind = Signal(RowKind)
        self._is_output = Signal()
        self._issuing = Signal()  # there is a token, unless something is waited for
        self._word = Signal()  # the token is its word's last
        self._owed = Signal()  # a row's sums have not been taken
        self._takes_two = Signal()  # tokens for a word
        # Where it is.
        self._positions_left = Signal(range(ROW_POSITIONS))
        self._blocks_left = Signal(self.cmd.blocks.shape())
        self._pass = Signal(range(config.window_passes))
        self._last_position, self._last_block = Signal(), Signal()
        # The word ends the inner loop; the next is at another position. Registers, as all that is
        # found for the next word stands behind them.
        self._inner_end, self._by_position = Signal(), Signal()
        self._row_end = Signal()  # the word is its position's last in this pass
        # Of the word at hand, and of the first of the inner loop: its address, that of its mask,
        # channels from its first on that count.
        bits = (self.cmd.blocks.shape().width + bits_for(config.rows)) + 2
        shapes = {"source": ADDRESS_BITS, "mask": ADDRESS_BITS, "left": signed(bits)}
        self._here, self._first = (
            {name: Signal(shape, name=f"{name}_{where}") for name, shape in shapes.items()}
            for where in ("here", "first")
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        count = Signal(range(max(self.config.row_param_words, TABLE_BYTES)))
        waits = self.parameters | (self._owed & self._word & self._row_end)
        m.d.comb += [self.number.eq(self._pass), self.valid.eq(self._issuing & ~waits)]
        m.d.sync += self._softmax.eq(self.cmd.op == WindowOp.SOFTMAX)
        with m.If(self.taken):
            m.d.sync += self._owed.eq(0)
        with m.FSM():
            with m.State("IDLE"):
                m.d.sync += count.eq(0)
                with m.If(self.start):
                    m.d.sync += self._issuing.eq(1)
                    m.next = "OWN"
            with m.State("OWN"):
                own = Mux(count < kept_words(self.config), RowKind.OWN, RowKind.SKIP)
                m.d.comb += [
                    *(s.eq(1) for s in (self.read, self.constant)),
                    self.row.kind.eq(own),
                ]
                with m.If(self.step):
                    m.d.sync += count.eq(count + 1)
                    with m.If(count == self.config.row_param_words - 1):
                        m.d.sync += count.eq(0)
                        m.d.sync += [
                            self._kind.eq(Mux(self._softmax, RowKind.LARGEST, RowKind.SUM)),
                            self._issuing.eq(self._softmax),
                        ]
                        m.next = "BEGIN"
                        with m.If(self._softmax):
                            m.next = "TABLE"
            with m.State("TABLE"):
                self._read_table(m, count)
                with m.If(self.step & (count == TABLE_BYTES - 1)):
                    m.d.sync += self._issuing.eq(0)
                    m.next = "BEGIN"
            with m.State("BEGIN"):
                self._begin(m)
                m.next = "ROWS"
            with m.State("ROWS"):
                self._walk(m)
            with m.State("WAIT"), m.If(self.complete):
                largest = self._kind == RowKind.LARGEST
                m.d.sync += self._kind.eq(Mux(largest, RowKind.SUM, RowKind.OUT))
                m.next = "BEGIN"
        return m

    def _begin(self, m: Module) -> None:
        """Begin a pass with its first word."""
        starts = {"source": self.cmd.src, "mask": self.cmd.weights, "left": self.cmd.features}
        output = self._kind == RowKind.OUT
        takes_two = Mux(self._softmax, self.cmd.masked, output)
        m.d.sync += [
            self._issuing.eq(1),
            self._is_output.eq(output),
            self._takes_two.eq(takes_two),
            self._word.eq(~takes_two),
            self.parameters.eq(output & ~self._softmax),
            self._positions_left.eq(self.cmd.out_w - 1),
            self._blocks_left.eq(self.cmd.blocks - 1),
            *(each[name].eq(v) for each in (self._here, self._first) for name, v in starts.items()),
        ]
        single = (self.cmd.blocks == 1) & (self.config.window_passes == 1)
        self._set_ends(m, self.cmd.out_w == 1, single, output)

    def _set_ends(self, m: Module, position: Value, block: Value, output: Value) -> None:
        """Whether the next word is at the last position and in the last pass over the last
        block."""
        inner_end = Mux(output, position, block)
        m.d.sync += [
            self._last_position.eq(position),
            self._last_block.eq(block),
            self._inner_end.eq(inner_end),
            self._by_position.eq(output ^ inner_end),
            self._row_end.eq(output | inner_end),
        ]

    def _read_table(self, m: Module, count: Signal) -> None:
        """Issue the next entry of the table, with the word in which it ends, if that is new."""
        rows = self.config.rows
        first = EXP_ENTRY_BYTES - 2  # the highest byte of an entry is not looked at
        at, same = Signal(range(rows), init=first), Signal()
        following = Signal(range(rows + EXP_ENTRY_BYTES))
        m.d.comb += [
            following.eq(at + EXP_ENTRY_BYTES),
            self.read.eq(~same),
            self.constant.eq(~same),
            self.row.kind.eq(RowKind.ENTRY),
            self.row.at.eq(at),
        ]
        with m.If(self.step):
            m.d.sync += [
                count.eq(count + 1),
                same.eq(following < rows),
                at.eq(Mux(following < rows, following, following - rows)),
            ]
            with m.If(count == TABLE_BYTES - 1):
                m.d.sync += [at.eq(first), same.eq(0)]

    def _walk(self, m: Module) -> None:
        """Issue the token at hand, and go on to the next."""
        output, here, inner_end = self._is_output, self._here, self._inner_end
        outer_end, word = Signal(), self._word
        lanes = self.config.reduced_lanes
        limit = Mux(here["left"] < 0, 0, Mux(here["left"] > lanes, lanes, here["left"]))
        first_kind = Mux(self._softmax, RowKind.MASK, RowKind.HIGH)
        m.d.comb += [
            outer_end.eq(Mux(output, self._last_block, self._last_position)),
            self.row.kind.eq(Mux(word, self._kind, first_kind)),
            self.row.last.eq(word & self._row_end),
            self.row.limit.eq(limit),
            self.read.eq(self._softmax | ~self._takes_two | ~word),
            self.addr.eq(Mux(self._softmax & ~word, here["mask"], here["source"])),
            self.emits.eq(output & word),
        ]
        with m.If(self.granted):
            m.d.sync += self.parameters.eq(0)
        with m.If(self.step):
            m.d.sync += word.eq(~self._takes_two | ~word)
            with m.If(word):
                self._advance(m)
                self._count(m)
                with m.If(inner_end):
                    m.d.sync += self.parameters.eq(output & ~self._softmax & ~outer_end)
                    with m.If(outer_end):
                        m.d.comb += self.done.eq(output)
                        m.d.sync += self._issuing.eq(0)
                        m.next = "WAIT"
                        with m.If(output):
                            m.next = "IDLE"
                with m.If(self.row.last & (self._kind == RowKind.SUM)):
                    m.d.sync += self._owed.eq(1)

    def _count(self, m: Module) -> None:
        """Positions, blocks and the passes over them."""
        cmd, config, output = self.cmd, self.config, self._is_output
        position, block = Signal(), Signal()  # the next is the last
        m.d.comb += [position.eq(self._last_position), block.eq(self._last_block)]
        with m.If(output | self._inner_end):
            left, last = self._positions_left, self._last_position
            m.d.comb += position.eq(Mux(last, cmd.out_w == 1, left == 1))
            m.d.sync += left.eq(Mux(last, cmd.out_w, left) - 1)
        with m.If(~output | self._inner_end):
            left, last = self._blocks_left, self._last_block
            if config.window_passes > 1:
                m.d.comb += block.eq((left == 0) & (self._pass == config.window_passes - 2))
            else:
                m.d.comb += block.eq(Mux(last, cmd.blocks == 1, left == 1))
            m.d.sync += self._pass.eq(following_pass(self._pass, config))
            with m.If(is_last(self._pass, config)):
                m.d.sync += left.eq(Mux(last, cmd.blocks, left) - 1)
        self._set_ends(m, position, block, output)

    def _advance(self, m: Module) -> None:
        """Addresses and channels of the next word."""
        cmd, last_pass = self.cmd, is_last(self._pass, self.config)
        for name, position, block in (
            ("source", Const(1), Mux(last_pass, cmd.src_block, 0)),
            ("mask", cmd.mask_step, Mux(last_pass, cmd.mask_block, 0)),
            ("left", cmd.causal & self._softmax, Const(-self.config.reduced_lanes)),
        ):
            here, first = self._here[name], self._first[name]
            following = Signal(here.shape(), name=f"following_{name}")
            m.d.comb += following.eq(
                Mux(self._inner_end, first, here) + Mux(self._by_position, position, block)
            )
            m.d.sync += here.eq(following)
            with m.If(self._inner_end):
                m.d.sync += first.eq(following)
