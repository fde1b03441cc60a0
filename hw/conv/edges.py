"""The array's edges, where zero points are taken off what enters."""

from __future__ import annotations

from amaranth.hdl import Module, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from systole.hw.conv.sequencer import TAG
from systole.isa import Config


class ArrayEdges(wiring.Component):
    """A stage in front of the array, for ``zero_points``: activations and weights less their zero
    points, in lanes of ``operand_bits``.

    Everything that enters the array, or goes with it, is a cycle later (``EDGE_STAGES``): ``x``
    with ``valid`` and ``tag``, ``weights`` with ``capture``, and ``swap``. So nothing changes
    between them. ``input_zero`` comes with ``x``, ``weight_zero`` with ``weights``.
    """

    x: Signal
    valid: Signal
    tag: data.View
    input_zero: Signal
    swap: Signal
    weights: Signal
    weight_zero: Signal
    capture: Signal
    o_x: Signal
    o_valid: Signal
    o_tag: data.View
    o_swap: Signal
    o_weights: Signal
    o_capture: Signal

    def __init__(self, config: Config):
        self.config = config
        super().__init__(
            {
                "x": In(8 * config.rows),
                "valid": In(1),
                "tag": In(TAG),
                "input_zero": In(signed(8)),
                "swap": In(1),
                "weights": In(8 * config.cols),
                "weight_zero": In(signed(8)),
                "capture": In(1),
                "o_x": Out(config.operand_bits * config.rows),
                "o_valid": Out(1),
                "o_tag": Out(TAG),
                "o_swap": Out(1),
                "o_weights": Out(config.operand_bits * config.cols),
                "o_capture": Out(1),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        m.d.sync += [
            self.o_valid.eq(self.valid),
            self.o_swap.eq(self.swap),
            self.o_capture.eq(self.capture),
        ]
        with m.If(self.valid):
            m.d.sync += self.o_tag.eq(self.tag)
            self._subtract(m, self.o_x, self.x, self.input_zero)
        # The weight buffer's word stands still when there is none to capture.
        self._subtract(m, self.o_weights, self.weights, self.weight_zero)
        return m

    def _subtract(self, m: Module, to: Signal, word: Signal, zero: Signal) -> None:
        """Every lane of a word less its zero point, into a register."""
        bits = self.config.operand_bits
        for lane in range(len(word) // 8):
            less = word.word_select(lane, 8).as_signed() - zero
            m.d.sync += to.word_select(lane, bits).eq(less)
