"""Amaranth designs, elaborated once and simulated any number of times."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from typing import Any

from amaranth.hdl import Elaboratable
from amaranth.sim import Simulator

from systole.isa import Config

Bench = Callable[[Any], Coroutine[Any, Any, None]]


class Simulation:
    """Of ``dut``, with as many testbenches as ``background`` has items."""

    def __init__(self, dut: Elaboratable, background: tuple[bool, ...]):
        self.dut = dut
        self._benches: tuple[Bench, ...] = ()
        self._simulator = Simulator(dut)
        self._simulator.add_clock(1e-6)
        for i, behind in enumerate(background):
            self._simulator.add_testbench(functools.partial(self._play, i), background=behind)

    async def _play(self, i: int, ctx: Any) -> None:
        await self._benches[i](ctx)

    def run(self, *benches: Bench) -> None:
        """From reset, with these testbenches."""
        if self._benches:
            self._simulator.reset()
        self._benches = benches
        self._simulator.run()


@functools.cache
def simulation(
    kind: type[Elaboratable], config: Config, background: tuple[bool, ...] = (False,)
) -> Simulation:
    """The one of ``kind(config)`` in this process."""
    return Simulation(kind(config), background)
