"""The systolic array: weight stationary, with shadow weights loading while the active ones work."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Signal, Value, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from systole.isa import Config
from systole.isa.config import bits_for
from systole.isa.timing import SWAP_LEAD, array_latency, capture_lead


def delayed(m: Module, name: str, value: Value, enable: Value) -> Signal:
    """A register of the array's data path: it holds ``value`` of the last ``enable``."""
    out = Signal(value.shape(), name=name, reset_less=True)
    with m.If(enable):
        m.d.sync += out.eq(value)
    return out


class SystolicArray(wiring.Component):
    """``rows`` x ``cols`` processing elements; one vector in, one vector of column sums out a
    cycle.

    A *cell* is ``cell_rows`` x ``cell_cols`` elements chained between pipeline registers.
    Activations move right and sums move down by one cell a cycle, so the cells of one diagonal
    (cell row + cell column) always act together: valid, swap and capture are one shift register
    each, indexed by diagonal. Each element registers its product; a cell adds up its products one
    cycle after it multiplied.

    Operands are int8; with ``zero_points`` they are of 9 bits, each an int8 less another.

    * ``valid`` with ``x`` (lane 0 lowest): a vector enters. In the cycles between, nothing toggles.
      ``sums[c]`` holds its sum of column ``c`` exactly ``latency(c)`` cycles later, until the next
      vector's.
    * ``capture``: a tile of weights follows, its row ``r`` on ``weights`` (column 0 lowest) ``1 +
      r`` cycles later. Captures start at least ``rows`` cycles apart.
    * ``swap``: the captured tile becomes the active one; the first vector to meet it may enter
      ``SWAP_LEAD`` cycles later, vectors before that still meet the old one.

    The element in row r, cell row i = r // cell_rows and cell column j captures 1 + r + j cycles
    after ``capture`` and swaps 1 + i + j cycles after ``swap``. A capture must come before its swap
    in every element, and not before the swap of the tile it replaces:

    * ``swap`` at least rows - rows / cell_rows + 1 cycles after ``capture``, set by the last row
      (with cells of one row, the swap may follow the capture wave directly); ``capture_lead`` is
      that or more;
    * the next ``capture`` no earlier than in the cycle of ``swap``, set by row 0.
    """

    SWAP_LEAD = SWAP_LEAD

    x: Signal
    valid: Signal
    swap: Signal
    weights: Signal
    capture: Signal
    sums: list[Signal]

    def __init__(self, config: Config):
        self.config = config
        self.cell_row_count = config.rows // config.cell_rows
        self.cell_col_count = config.cols // config.cell_cols
        self.capture_lead = capture_lead(config)
        self.bits = config.operand_bits
        self.sum_width = 8 + self.bits + bits_for(config.rows)
        super().__init__(
            {
                "x": In(self.bits * config.rows),
                "valid": In(1),
                "swap": In(1),
                "weights": In(self.bits * config.cols),
                "capture": In(1),
                "sums": Out(signed(self.sum_width)).array(config.cols),
            }
        )

    def latency(self, col: int) -> int:
        """Cycles from a vector to its sum of column ``col``."""
        return array_latency(self.config, col)

    def _activations(self, m: Module, valid_wave: Value) -> list[list[Value]]:
        """The activations that each row meets in each cell column."""
        activations: list[list[Value]] = []
        for r in range(self.config.rows):
            i = r // self.config.cell_rows
            value: Value = self.x.word_select(r, self.bits).as_signed()
            for d in range(i):
                value = delayed(m, f"skew_{r}_{d}", value, valid_wave[d])
            activations.append([value])
            for j in range(self.cell_col_count - 1):
                value = delayed(m, f"x_{r}_{j}", value, valid_wave[i + j])
                activations[r].append(value)
        return activations

    def _product(self, a: Value, b: Value) -> Value:
        """``a * b``. A number less a zero point is never the least that its bits hold, so that the
        product of two takes a bit less."""
        product = a * b
        return product[:-1].as_signed() if self.config.zero_points else product

    def elaborate(self, platform) -> Module:
        m = Module()
        rows, cols = self.config.rows, self.config.cols
        cell_rows, cell_cols = self.config.cell_rows, self.config.cell_cols
        down, across = self.cell_row_count, self.cell_col_count

        # Bit d: the wave is at diagonal d.
        valid_wave = Signal(down + across)
        swap_wave = Signal(down + across - 1)
        capture_wave = Signal(rows + across - 1)
        later = Signal(down + across - 1)
        m.d.sync += later.eq(valid_wave)
        m.d.comb += valid_wave.eq(Cat(self.valid, later))
        m.d.sync += swap_wave.eq(Cat(self.swap, swap_wave))
        m.d.sync += capture_wave.eq(Cat(self.capture, capture_wave))

        activations = self._activations(m, valid_wave)
        for c in range(cols):
            j = c // cell_cols
            weight = self.weights.word_select(c, self.bits).as_signed()
            for d in range(j):
                # A row of weights is on this column's bus while the wave is in its first cells.
                weight = delayed(m, f"bus_{c}_{d}", weight, capture_wave[d : d + rows].any())
            total: Value | int = 0
            for i in range(down):
                for r in range(i * cell_rows, (i + 1) * cell_rows):
                    shadow = delayed(m, f"shadow_{r}_{c}", weight, capture_wave[r + j])
                    active = delayed(m, f"weight_{r}_{c}", shadow, swap_wave[i + j])
                    product = self._product(activations[r][j], active)
                    total += delayed(m, f"product_{r}_{c}", product, valid_wave[i + j])
                partial = Signal(signed(self.sum_width), name=f"sum_{i}_{c}", reset_less=True)
                with m.If(valid_wave[i + j + 1]):
                    m.d.sync += partial.eq(total)
                total = partial
            m.d.comb += self.sums[c].eq(total)
        return m
