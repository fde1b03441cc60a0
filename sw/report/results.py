"""What a benchmark measures of one network on one configuration."""

from __future__ import annotations

from dataclasses import dataclass

from systole.sw.compiler import Optimise
from systole.sw.report.layers import LayerReport, utilisation
from systole.sw.runtime.program import Program
from systole.sw.simulate.cycles import Prediction


@dataclass(frozen=True)
class Measurement:
    """One network on one configuration; ``cycles`` None: only predicted."""

    name: str
    program: Program
    optimise: Optimise
    """How its schedule was searched for."""
    minimum: int
    """Bytes that must cross the memory bus: weights, inputs and outputs, each once."""
    predicted: Prediction
    cycles: int | None = None
    read_bytes: int = 0
    write_bytes: int = 0
    rows: tuple[LayerReport, ...] = ()
    rate: float = 0.0
    """Simulated cycles per second."""
    mismatches: int = 0
    """Elements that differ from the golden model."""

    @property
    def macs(self) -> int:
        """Useful multiply-accumulates."""
        return sum(layer.macs for layer in self.program.layers)

    @property
    def best(self) -> tuple[int, int, int]:
        """Cycles, bytes read and written: measured, or else predicted."""
        if self.cycles is not None:
            return self.cycles, self.read_bytes, self.write_bytes
        return self.predicted.cycles, self.predicted.read_bytes, self.predicted.write_bytes

    @property
    def utilisation(self) -> float:
        """Useful MACs / (rows x cols x cycles), of the best figure there is."""
        return utilisation(self.macs, self.best[0], self.program.config)
