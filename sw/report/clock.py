"""The clock that times are given for: one that synthesis reached, or one assumed."""

from __future__ import annotations

from dataclasses import dataclass

from systole.hw.synthesis import kept
from systole.isa import Config

ASSUMED_MHZ = 200.0
"""The clock of a configuration that nobody has placed and routed, unless another is given."""


@dataclass(frozen=True)
class Clock:
    """A clock and where it comes from."""

    mhz: float
    source: str = "assumed"
    """``assumed``, or what reached it: ``placed and routed on LFE5U-85F-6``."""

    def __str__(self) -> str:
        if self.source == "assumed":
            return f"an assumed clock of {self.mhz:g} MHz"
        return f"{self.mhz:g} MHz ({self.source})"


def clock_of(config: Config, mhz: float | None = None) -> Clock:
    """The clock of a configuration: ``mhz`` if given; else what the whole chip reached, if ``make
    synth`` has placed and routed it; else ``ASSUMED_MHZ``."""
    if mhz is not None:
        return Clock(mhz)
    routed = kept.routed_chip(config)
    if routed is None:
        return Clock(ASSUMED_MHZ)
    reached, device = routed
    return Clock(round(reached, 1), f"placed and routed on {device}")
