"""The device interface: what the driver needs of an accelerator, real, simulated or modelled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType

from systole.isa import Config


class DeviceError(RuntimeError):
    """The device cannot be used (any more); the message says why and what to do."""


class Device(ABC):
    """An accelerator with its DRAM.

    ``config`` is the configuration the hardware was made from. DRAM is bytes 0 to
    ``memory_bytes`` - 1 of the address space the accelerator's AXI manager sees. Time passes only
    in ``read_csr`` and ``write_csr`` (a few cycles) and in ``wait_interrupt``.
    """

    config: Config
    memory_bytes: int

    @abstractmethod
    def write_memory(self, addr: int, data: bytes) -> None:
        """Write DRAM. Raises ``ValueError`` outside it."""

    @abstractmethod
    def read_memory(self, addr: int, n: int) -> bytes:
        """``n`` bytes of DRAM. Raises ``ValueError`` outside it."""

    @abstractmethod
    def write_csr(self, offset: int, value: int) -> None:
        """Write the 32-bit register at byte ``offset``."""

    @abstractmethod
    def read_csr(self, offset: int) -> int:
        """The 32-bit register at byte ``offset``."""

    @abstractmethod
    def wait_interrupt(self, timeout_cycles: int) -> bool:
        """Let time pass until the interrupt line is high: ``True`` at once if it already is,
        ``False`` after ``timeout_cycles`` cycles without."""

    def close(self) -> None:  # noqa: B027
        """Release what the device holds. May be called twice."""

    def check_range(self, addr: int, n: int) -> None:
        """Raises ``ValueError`` unless bytes ``addr`` to ``addr + n - 1`` are DRAM."""
        if addr < 0 or n < 0 or addr + n > self.memory_bytes:
            raise ValueError(
                f"bytes {addr:#x} to {addr + n:#x} lie outside the device's {self.memory_bytes} "
                "bytes of memory"
            )

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
