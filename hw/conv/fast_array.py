"""The systolic array of the fast inner product: one multiplier for every two rows of a column."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Shape, Signal, Value, signed

from systole.hw.conv.array import SystolicArray, delayed
from systole.isa import Config
from systole.isa.config import bits_for


class FastSystolicArray(SystolicArray):
    """The array with the contract of :class:`SystolicArray`, and half of its multipliers.

    Winograd's inner product (1968): of two rows with activations a1, a2 and weights b1, b2,

        a1 b1 + a2 b2 = (a1 + b2) (a2 + b1) - a1 a2 - b1 b2

    The first product takes one multiplier of 9 bits (with ``zero_points``, 10) for each two rows
    and column. The others do not depend on both vector and weights. ``alpha`` = sum of a1 a2 is of
    the vector alone: ``rows / 2`` multipliers left of the first column, and the sum passes along
    the feet of the columns.
    ``beta`` = sum of b1 b2 is of a column's weights alone: one multiplier a column, at the bus on
    which they arrive, and the sum becomes active with the tile. Both are subtracted at the foot.
    Sums between may wrap: the column's sum is exact modulo 2 ** ``sum_width``, which holds it.

    A cell is one of ``cell_rows`` / 2 multipliers by ``cell_cols``. A vector that meets a cell on
    diagonal d in cycle n has its operands added by n + 1, multiplied by n + 2, summed by n + 3; the
    foot takes one cycle more than the last cell. ``beta`` is complete one cycle before the earliest
    swap reaches the foot, and is held apart from the next tile's, which is being summed by then.
    """

    def elaborate(self, platform) -> Module:
        m = Module()
        rows, down, across = self.config.rows, self.cell_row_count, self.cell_col_count

        # Bit d: the wave is at diagonal d. The waves go on behind the last cell, to the foot.
        self._valid = Signal(down + across + 2, name="valid_wave")
        self._swap = Signal(down + across + 2, name="swap_wave")
        self._capture = Signal(rows + across + 1, name="capture_wave")
        later = Signal(len(self._valid) - 1)
        m.d.sync += later.eq(self._valid)
        m.d.comb += self._valid.eq(Cat(self.valid, later))
        m.d.sync += self._swap.eq(Cat(self.swap, self._swap))
        m.d.sync += self._capture.eq(Cat(self.capture, self._capture))

        activations = self._activations(m, self._valid)
        alphas = self._alphas(m, [row[0] for row in activations])
        for c in range(self.config.cols):
            j = c // self.config.cell_cols
            weight: Value = self.weights.word_select(c, self.bits).as_signed()
            for d in range(j):
                # A row of weights is on this column's bus while the wave is in its first cells.
                enable = self._capture[d : d + rows].any()
                weight = delayed(m, f"bus_{c}_{d}", weight, enable)
            total = self._column(m, c, [row[j] for row in activations], weight)
            beta = self._beta(m, c, weight)
            foot = Signal(signed(self.sum_width), name=f"foot_{c}", reset_less=True)
            with m.If(self._valid[down + j + 2]):
                m.d.sync += foot.eq(total - (alphas[j] + beta))
            m.d.comb += self.sums[c].eq(foot)
        return m

    @property
    def _edge_shape(self) -> Shape:
        """Holds ``alpha`` and ``beta``."""
        return signed(8 + self.bits + bits_for(self.config.rows // 2))

    def _alphas(self, m: Module, x: list[Value]) -> list[Value]:
        """``alpha`` at the foot of each cell column, with the column's sum."""
        pairs = self.config.cell_rows // 2
        total: Value = Const(0)
        for i in range(self.cell_row_count):
            for p in range(i * pairs, (i + 1) * pairs):
                product = self._product(x[2 * p], x[2 * p + 1])
                total = total + delayed(m, f"alpha_product_{p}", product, self._valid[i])
            partial = Signal(self._edge_shape, name=f"alpha_sum_{i}", reset_less=True)
            with m.If(self._valid[i + 1]):
                m.d.sync += partial.eq(total)
            total = partial
        alphas: list[Value] = []
        for j in range(self.cell_col_count):
            enable = self._valid[self.cell_row_count + 1 + j]
            total = delayed(m, f"alpha_{j}", total, enable)
            alphas.append(total)
        return alphas

    def _beta(self, m: Module, c: int, weight: Value) -> Value:
        """``beta`` of column ``c`` and its active weights, from the column's bus."""
        rows, j = self.config.rows, c // self.config.cell_cols
        wave = self._capture[j:]
        first = delayed(m, f"beta_first_{c}", weight, Cat(wave[0:rows:2]).any())
        enable = Cat(wave[1 : rows + 1 : 2]).any()
        product = delayed(m, f"beta_product_{c}", self._product(first, weight), enable)
        running = Signal(self._edge_shape, name=f"beta_sum_{c}", reset_less=True)
        with m.If(Cat(wave[2 : rows + 2 : 2]).any()):
            m.d.sync += running.eq(Mux(wave[2], 0, running) + product)
        complete = delayed(m, f"beta_shadow_{c}", running, wave[rows + 1])
        return delayed(m, f"beta_{c}", complete, self._swap[self.cell_row_count + j + 2])

    def _column(self, m: Module, c: int, x: list[Value], weight: Value) -> Value:
        """The sum of column ``c`` before its foot, from its activations and its bus."""
        j, pairs = c // self.config.cell_cols, self.config.cell_rows // 2
        total: Value = Const(0)
        for i in range(self.cell_row_count):
            wave = self._valid[i + j :]
            for p in range(i * pairs, (i + 1) * pairs):
                active = []
                for r in (2 * p, 2 * p + 1):
                    shadow = delayed(m, f"shadow_{r}_{c}", weight, self._capture[r + j])
                    active.append(delayed(m, f"weight_{r}_{c}", shadow, self._swap[i + j]))
                left = delayed(m, f"left_{p}_{c}", x[2 * p] + active[1], wave[0])
                right = delayed(m, f"right_{p}_{c}", x[2 * p + 1] + active[0], wave[0])
                product = self._product(left, right)
                total = total + delayed(m, f"product_{p}_{c}", product, wave[1])
            partial = Signal(signed(self.sum_width), name=f"sum_{i}_{c}", reset_less=True)
            with m.If(wave[2]):
                m.d.sync += partial.eq(total)
            total = partial
        return total


def array_of(config: Config) -> SystolicArray:
    """The systolic array of a configuration."""
    return FastSystolicArray(config) if config.fast else SystolicArray(config)
