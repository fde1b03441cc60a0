"""cocotb module inside the simulator that carries out the requests of :mod:`sim.device`.

Requests and replies are Python objects on one end of a ``multiprocessing`` pipe, whose file
descriptor is in ``SYSTOLE_PIPE``. The simulation stands still between requests.

    request                    reply
    ("write", offset, value)   ("ok", 0)
    ("read", offset)           ("ok", value)
    ("wait", cycles)           ("busy", cycles so far) now and then, in the end ("ok", interrupt)
    ("reset", cycles)          ("ok", 0)
    ("set", {name: value})     ("ok", 0): sets knobs of the memory model
    ("cycles",)                ("ok", cycles simulated)
    ("close",)                 ("ok", 0); the simulation ends

A refused request is answered ("error", message).
"""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection
from typing import Any

import cocotb
from cocotb.clock import Clock
from cocotb.triggers import ReadOnly, RisingEdge, Timer

WRITE, READ, WAIT, RUN, RESET = range(5)
"""Values of host_op in systole_tb.sv."""

FIRST_SLICE = 1000
"""Cycles of a wait until the first sign of life; later ones come every half second or so."""
LONGEST_SLICE = 1 << 24


class Host:
    """The testbench's host port."""

    def __init__(self, dut: Any):
        self.dut = dut

    async def run(self, op: int, *, address: int = 0, data: int = 0) -> None:
        """One operation; returns when it is done, after all of that cycle's effects."""
        dut = self.dut
        dut.host_op.value = op
        dut.host_address.value = address
        dut.host_data.value = data
        dut.host_go.value = 1 - int(dut.host_go.value)
        await dut.host_done.value_change
        # Results change in the same time step as host_done; read them when it has settled.
        await ReadOnly()

    async def csr(self, op: int, offset: int, value: int = 0) -> int:
        await self.run(op, address=offset, data=value)
        if int(self.dut.host_response.value):
            raise ValueError(f"AXI error on CSR access at {offset:#x}")
        result = self.dut.host_result.value
        if not result.is_resolvable:
            raise ValueError(f"register at {offset:#x} reads as {result}")
        return int(result)

    async def wait(self, cycles: int, pipe: Connection) -> int:
        """For the interrupt, in slices, with a sign of life after each."""
        done, slice_ = 0, FIRST_SLICE
        while True:
            step = min(slice_, cycles - done)
            start = time.monotonic()
            await self.run(WAIT, data=step)
            done += step
            if int(self.dut.host_result.value):
                return 1
            if done >= cycles:
                return 0
            if time.monotonic() - start < 0.5:
                slice_ = min(2 * slice_, LONGEST_SLICE)
            pipe.send(("busy", done))
            await Timer(1, "ps")


async def _count(dut: Any) -> None:
    """Count clock edges: the least that a testbench clocked from Python does."""
    cycles = 0
    while True:
        await RisingEdge(dut.clk)
        cycles += 1


@cocotb.test()
async def serve(dut: Any) -> None:
    """Serve requests until ``close`` or until the other end is gone."""
    pipe = Connection(int(os.environ["SYSTOLE_PIPE"]))
    host = Host(dut)
    if os.environ.get("SYSTOLE_PYTHON_CLOCK"):
        Clock(dut.clk, 2, "ns", impl="py").start()
        cocotb.start_soon(_count(dut))
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        # Leave the read-only phase the last operation ended in.
        await Timer(1, "ps")
        result = 0
        try:
            match request:
                case ("write", offset, value):
                    await host.csr(WRITE, offset, value)
                case ("read", offset):
                    result = await host.csr(READ, offset)
                case ("wait", cycles):
                    result = await host.wait(cycles, pipe)
                case ("reset", cycles):
                    await host.run(RESET, data=cycles)
                case ("set", knobs):
                    for name, value in knobs.items():
                        getattr(dut, name).value = value
                    await host.run(RUN)
                case ("cycles",):
                    result = int(dut.cycles.value)
                case ("close",):
                    pipe.send(("ok", 0))
                    return
                case _:
                    raise ValueError(f"unknown request {request!r}")
        except ValueError as e:
            pipe.send(("error", str(e)))
        else:
            pipe.send(("ok", result))
