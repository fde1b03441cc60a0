"""The RTL as a device: a simulator process that serves any number of programs."""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from systole.isa import Config
from systole.sim.build import Simulator, build
from systole.sw.runtime.device import Device, DeviceError

LOG_LINES = 15
"""Lines of the simulator's log that an error message shows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryModel:
    """Behaviour of the DRAM behind the AXI port (``sim/tb/axi_memory.sv``)."""

    read_latency: int = 64
    """Cycles from a read's address to its first beat."""
    write_latency: int = 64
    """Cycles from a write's last beat to its response."""
    rate_beats: int = 1
    rate_cycles: int = 1
    """At most ``rate_beats`` beats in ``rate_cycles`` cycles, in each direction."""
    stall_ar: int = 0
    """Probability, in 1/256, of holding up the AR channel in a cycle; likewise the others."""
    stall_r: int = 0
    stall_aw: int = 0
    stall_w: int = 0
    stall_b: int = 0
    seed: int = 1
    """Seed of the stalls; takes effect at a reset."""
    error_first: int = 0
    error_last: int = 0
    """First and last byte of the range whose beats are answered with ``error_response``."""
    error_response: int = 2
    """2: SLVERR, 3: DECERR."""
    error_read: bool = False
    """Reads are answered so."""
    error_write: bool = False
    """Writes are answered so."""

    @classmethod
    def hostile(cls, seed: int) -> MemoryModel:
        """A memory with random backpressure on every channel."""
        return cls(
            read_latency=20,
            write_latency=10,
            stall_ar=96,
            stall_r=96,
            stall_aw=96,
            stall_w=96,
            stall_b=96,
            seed=seed,
        )


class RtlDevice(Device):
    """The RTL in ``simulator`` (``verilator`` or ``icarus``), in a process of its own.

    ``memory_bytes``: DRAM, taken from the host only where it is touched. ``memory``: its behaviour.
    ``waves``: file to write waveforms to (VCD). ``rtl``: a SystemVerilog file with a module
    ``systole`` to simulate instead of the one generated from ``config``. ``plusargs``: arguments
    for it. ``patience``: wall-clock seconds without a sign of life after which the simulator counts
    as hung.
    ``python_clock``: Verilator only, clocked from Python, to compare speeds. ``start_seed``:
    registers and memories have no value before the reset; in Verilator they are at random, by this
    seed (1 and up), in Icarus unknown.

    Raises :class:`DeviceError`, with the tail of the simulator's log, when the simulator cannot be
    had, ends, hangs, or reports a failed assertion; the device is closed then.
    """

    def __init__(
        self,
        config: Config,
        *,
        simulator: str = "verilator",
        memory_bytes: int = 64 << 20,
        memory: MemoryModel | None = None,
        waves: str | Path | None = None,
        rtl: Path | None = None,
        plusargs: Sequence[str] = (),
        patience: float = 600.0,
        python_clock: bool = False,
        start_seed: int | None = None,
    ):
        self.config = config
        self.memory_bytes = memory_bytes
        self.patience = patience
        self.name = simulator
        self._python_clock = python_clock
        self._plusargs = plusargs
        self._process: subprocess.Popen[bytes] | None = None
        if start_seed is not None and simulator == "verilator":
            random = ["+verilator+rand+reset+2", f"+verilator+seed+{start_seed}"]
            self._plusargs = [*plusargs, *random]
        built = build(
            simulator,
            config,
            waves=waves is not None,
            rtl=rtl,
            python_clock=python_clock,
            undefined=start_seed is not None,
        )
        self._resources = contextlib.ExitStack()
        try:
            self._start(built, waves)
            self.set_memory_model(memory or MemoryModel())
            self.reset()
        except BaseException:
            self._release()
            raise

    def _start(self, built: Simulator, waves: str | Path | None) -> None:
        """Start the process, with the memory, and the pipe to it."""
        self._directory = Path(tempfile.mkdtemp(prefix="systole-"))
        self._resources.callback(shutil.rmtree, self._directory, ignore_errors=True)
        self._log = self._directory / "log"
        backing = self._directory / "memory"
        with open(backing, "w+b") as f:
            f.truncate(self.memory_bytes)
            self._memory = mmap.mmap(f.fileno(), self.memory_bytes)
        self._resources.callback(self._memory.close)
        arguments = [f"+memory={backing}", f"+memory_bytes={self.memory_bytes}", *self._plusargs]
        if waves is not None:
            waves = os.path.abspath(waves)
            verilator = ["--trace", "--trace-file", waves]
            arguments += verilator if self.name == "verilator" else [f"+waves={waves}"]
        self._pipe, remote = multiprocessing.Pipe()
        self._resources.callback(self._pipe.close)
        environment = {
            "COCOTB_TEST_MODULES": "systole.sim.server",
            "COCOTB_RESULTS_FILE": str(self._directory / "results.xml"),
            "COCOTB_LOG_LEVEL": "WARNING",
            "GPI_LOG_LEVEL": "WARNING",
            "SYSTOLE_PIPE": str(remote.fileno()),
            "SYSTOLE_PYTHON_CLOCK": "1" if self._python_clock else "",
        }
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [*built.command, *arguments],
                env=built.environ(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._directory,
                pass_fds=[remote.fileno()],
                process_group=0,  # Ctrl-C in a terminal is for us: we end it.
            )
        remote.close()

    # Device ---------------------------------------------------------------------------------------

    def write_memory(self, addr: int, data: bytes) -> None:
        self.check_range(addr, len(data))
        self._memory[addr : addr + len(data)] = data

    def read_memory(self, addr: int, n: int) -> bytes:
        self.check_range(addr, n)
        return self._memory[addr : addr + n]

    def write_csr(self, offset: int, value: int) -> None:
        self._ask("write", offset, value)

    def read_csr(self, offset: int) -> int:
        return self._ask("read", offset)

    def wait_interrupt(self, timeout_cycles: int) -> bool:
        return bool(self._ask("wait", timeout_cycles))

    def close(self) -> None:
        """End the simulator; raises :class:`DeviceError` if it reports a failure on the way."""
        if self._process is not None:
            self._ask("close")
            try:
                self._process.wait(self.patience)
            except subprocess.TimeoutExpired:
                self._fail("did not end when told to")
            if self._process.returncode:
                self._fail(self._how_it_ended())
            self._release()

    # Beyond Device --------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """The simulator has ended: closed, or failed."""
        return self._process is None

    def set_memory_model(self, memory: MemoryModel) -> None:
        """Change the behaviour of the memory, between programs."""
        self._ask("set", dataclasses.asdict(memory))

    def reset(self, cycles: int = 4) -> None:
        """Hold the reset input for some cycles; the memory's content stays."""
        self._ask("reset", cycles)

    @property
    def cycles(self) -> int:
        """Clock cycles simulated so far."""
        return self._ask("cycles")

    # Talking --------------------------------------------------------------------------------------

    def _ask(self, *request: Any) -> int:
        """The answer to a request. If waiting for it is interrupted, the simulator is ended."""
        try:
            return self._answer(*request)
        except DeviceError:
            raise
        except BaseException:
            self._release()
            raise

    def _answer(self, *request: Any) -> int:
        process = self._process
        if process is None:
            raise DeviceError("the simulator is closed")
        try:
            self._pipe.send(request)
            while True:
                if not self._pipe.poll(self.patience):
                    self._fail(f"gave no sign of life for {self.patience:g} seconds")
                kind, value = self._pipe.recv()
                self._check_assertions()
                if kind == "error":
                    raise DeviceError(value)
                if kind == "ok":
                    return value
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self.patience)
            self._fail(self._how_it_ended())

    def _how_it_ended(self) -> str:
        assert self._process is not None
        code = self._process.returncode
        if code is not None and code < 0:
            return f"died of {signal.Signals(-code).name}"
        return "ended early" if not code else f"ended with status {code}"

    def _check_assertions(self) -> None:
        """Icarus only prints failed assertions, and goes on."""
        if self.name == "icarus" and b"ERROR: " in self._log.read_bytes():
            self._fail("reports a failed assertion")

    def _fail(self, how: str) -> NoReturn:
        """Close the device and raise :class:`DeviceError` with the tail of the simulator's log."""
        self._process_end()
        lines = self._log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        self._release()
        tail = "".join(f"\n  {line}" for line in lines)
        raise DeviceError(
            f"the {self.name} simulator {how}" + (f":{tail}" if tail else "")
        ) from None

    def _process_end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _release(self) -> None:
        self._process_end()
        self._process = None
        self._resources.close()

    def __del__(self) -> None:
        if getattr(self, "_process", None) is not None:
            self._release()
