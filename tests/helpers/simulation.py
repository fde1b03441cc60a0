"""Amaranth designs, elaborated once and simulated any number of times; streams and inputs.

What a simulation costs is settling the design, which every ``ctx.set`` of a testbench does:
:class:`Inputs` sets many signals at the price of one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from typing import Any

from amaranth.hdl import Cat, Elaboratable, Value
from amaranth.sim import Simulator

Bench = Callable[[Any], Coroutine[Any, Any, None]]
"""An ``async`` function of the simulator's context."""


class Simulation:
    """The simulator of ``dut``, for any number of runs."""

    def __init__(self, dut: Elaboratable):
        self.dut = dut
        self._testbenches: list[tuple[Bench, bool]] = []
        self._processes: list[Bench] = []
        self._slots = [0, 0]
        """Testbenches and processes that the simulator has; those without a bench end at once."""
        self._started = False
        self._simulator = Simulator(dut)
        self._simulator.add_clock(1e-6)

    def run(
        self,
        *testbenches: Bench,
        background: tuple[Bench, ...] = (),
        processes: tuple[Bench, ...] = (),
    ) -> None:
        """Simulate from reset until all ``testbenches`` have ended.

        In every cycle ``background`` testbenches act first, then ``testbenches``, each kind in
        order. ``processes`` act at clock edges: they see what the design's registers see.
        """
        self._testbenches = [(b, False) for b in background] + [(b, True) for b in testbenches]
        self._processes = list(processes)
        if self._started:
            self._simulator.reset()
        self._started = True
        for i in range(self._slots[0], len(self._testbenches)):
            bench = functools.partial(self._play_testbench, i)
            self._simulator.add_testbench(bench, background=True)
        for i in range(self._slots[1], len(self._processes)):
            self._simulator.add_process(functools.partial(self._play_process, i))
        self._slots = [
            max(self._slots[0], len(self._testbenches)),
            max(self._slots[1], len(self._processes)),
        ]
        self._simulator.run()

    async def _play_testbench(self, i: int, ctx: Any) -> None:
        if i < len(self._testbenches):
            bench, critical = self._testbenches[i]
            if critical:
                with ctx.critical():
                    await bench(ctx)
            else:
                await bench(ctx)

    async def _play_process(self, i: int, ctx: Any) -> None:
        if i < len(self._processes):
            await self._processes[i](ctx)


@functools.cache
def simulation(kind: Callable[..., Elaboratable], *arguments: Any, **options: Any) -> Simulation:
    """The simulation of ``kind(*arguments, **options)``, one in this process."""
    return Simulation(kind(*arguments, **options))


class Inputs:
    """Inputs of a design that a testbench sets together."""

    def __init__(self, *signals: Any):
        values = [Value.cast(signal) for signal in signals]
        self._all = Cat(*values)
        self._widths = [len(value) for value in values]

    def set(self, ctx: Any, *values: int) -> None:
        """Give every input, in order, a value (of views: their bits)."""
        number = at = 0
        for value, width in zip(values, self._widths, strict=True):
            number |= (int(value) & ((1 << width) - 1)) << at
            at += width
        ctx.set(self._all, number)


# Streams ------------------------------------------------------------------------------------------


async def put(ctx: Any, stream: Any, payload: Any) -> None:
    """Offer ``payload`` until it is taken."""
    ctx.set(stream.payload, payload)
    ctx.set(stream.valid, 1)
    await ctx.tick().until(stream.ready)
    ctx.set(stream.valid, 0)


async def get(ctx: Any, stream: Any) -> Any:
    """Take the next payload."""
    ctx.set(stream.ready, 1)
    payload, *_ = await ctx.tick().sample(stream.payload).until(stream.valid)
    ctx.set(stream.ready, 0)
    return payload


async def expect(ctx: Any, stream: Any, payload: Any) -> None:
    """Take the next payload and assert that it is this one."""
    taken = await get(ctx, stream)
    assert taken == payload, f"{taken!r}, not {payload!r}"
