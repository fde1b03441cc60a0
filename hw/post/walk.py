"""POST's walk over the words of a command: where each comes from and where it goes."""

from __future__ import annotations

from amaranth.hdl import Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from systole.hw.bus.interfaces import command_layout
from systole.isa import Config, Opcode
from systole.isa.commands import ACC_ADDRESS_BITS, ADDRESS_BITS


class PostWalk(wiring.Component):
    """Walks over groups, rows and columns, columns innermost.

    * ``accept``: begins the command in ``head``, which must be in ``cmd`` from the next cycle on.
    * ``step``: goes on to the next word.
    * ``out_word``, ``a_word``, ``b_word``: the current word's scratchpad addresses, ``acc`` its
      accumulator address.
    * ``place``: position of its group in a scratchpad word. ``group``: the group's index in an
      accumulator word.
    * ``group_ends``, ``command_ends``: it is the last of its group, of the command.
      ``last_group``: it belongs to the command's last group.
    """

    head: data.View
    cmd: data.View
    accept: Signal
    step: Signal
    out_word: Signal
    a_word: Signal
    b_word: Signal
    acc: Signal
    place: Signal
    group: Signal
    group_ends: Signal
    command_ends: Signal
    last_group: Signal

    def __init__(self, config: Config):
        self.config = config
        super().__init__(
            {
                "head": In(command_layout(Opcode.POST)),
                "cmd": In(command_layout(Opcode.POST)),
                "accept": In(1),
                "step": In(1),
                "out_word": Out(ADDRESS_BITS),
                "a_word": Out(ADDRESS_BITS),
                "b_word": Out(ADDRESS_BITS),
                "acc": Out(ACC_ADDRESS_BITS),
                "place": Out(range(max(config.word_groups, 2))),
                "group": Out(range(max(config.groups, 2))),
                "group_ends": Out(1),
                "command_ends": Out(1),
                "last_group": Out(1),
            }
        )
        self._row_ends = Signal()
        self._word_ends = Signal()

    def elaborate(self, platform: object) -> Module:
        m = Module()
        head, cmd = self.head, self.cmd
        # Left, the current one included.
        columns, rows = (Signal(16, name=n, reset_less=True) for n in ("columns", "rows"))
        groups = Signal(cmd.groups.shape(), reset_less=True)
        m.d.comb += [
            self._word_ends.eq(self.place == self.config.word_groups - 1),
            self._row_ends.eq(columns == 1),
            self.group_ends.eq(self._row_ends & (rows == 1)),
            self.last_group.eq(groups == 1),
            self.command_ends.eq(self.group_ends & self.last_group),
        ]
        with m.If(self.accept):
            m.d.sync += [
                columns.eq(head.out_w),
                rows.eq(head.out_h),
                groups.eq(head.groups),
                self.place.eq(head.lane),
                self.acc.eq(head.acc),
            ]
        with m.If(self.step):
            m.d.sync += [
                columns.eq(Mux(self._row_ends, cmd.out_w, columns - 1)),
                self.acc.eq(Mux(self.group_ends, cmd.acc, self.acc + 1)),
            ]
            with m.If(self._row_ends):
                m.d.sync += rows.eq(Mux(self.group_ends, cmd.out_h, rows - 1))
            with m.If(self.group_ends):
                m.d.sync += [
                    groups.eq(groups - 1),
                    self.place.eq(Mux(self._word_ends, 0, self.place + 1)),
                ]
        if self.config.groups > 1:
            with m.If(self.accept):
                m.d.sync += self.group.eq(0)
            with m.If(self.step & self.group_ends):
                m.d.sync += self.group.eq(self.group + 1)

        for word, first, step, pitch, block in (
            (self.out_word, head.out, cmd.out_step, cmd.out_pitch, cmd.out_block),
            (self.a_word, head.a, 1, cmd.a_pitch, cmd.a_block),
            (self.b_word, head.b, cmd.b_step, cmd.b_pitch, cmd.b_block),
        ):
            self._walk_tensor(m, word, first=first, step=step, pitch=pitch, block=block)
        return m

    def _walk_tensor(
        self,
        m: Module,
        word: Signal,
        *,
        first: Value,
        step: Value | int,
        pitch: Value,
        block: Value,
    ) -> None:
        """Keep the address of a tensor's current word, by running sums."""
        row, base = (
            Signal(ADDRESS_BITS, name=f"{word.name}_{n}", reset_less=True) for n in ("row", "base")
        )
        with m.If(self.accept):
            m.d.sync += [word.eq(first), row.eq(first), base.eq(first)]
        with m.If(self.step):
            with m.If(~self._row_ends):
                m.d.sync += word.eq(word + step)
            with m.Elif(~self.group_ends):
                m.d.sync += [word.eq(row + pitch), row.eq(row + pitch)]
            with m.Else():
                next_base = (base + Mux(self._word_ends, block, 0))[:ADDRESS_BITS]
                m.d.sync += [word.eq(next_base), row.eq(next_base), base.eq(next_base)]
