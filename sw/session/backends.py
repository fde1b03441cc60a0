"""Opens the device that a name stands for."""

from __future__ import annotations

from typing import Any

from systole.isa import Config
from systole.sim.device import RtlDevice
from systole.sw.runtime.device import Device
from systole.sw.simulate.commands import CommandDevice

KINDS = ("verilator", "icarus", "commands")
"""What ``open_device`` can open."""


def open_device(
    kind: str, config: Config, *, memory_bytes: int = 64 << 20, **options: Any
) -> Device:
    """Open a device: ``verilator`` or ``icarus`` (the RTL, built and cached on first use;
    ``options`` as for ``sim.device.RtlDevice``) or ``commands`` (the command-level simulator).

    Raises :class:`DeviceError` when it cannot be had, ``ValueError`` on an unknown kind.
    """
    if kind == "commands":
        return CommandDevice(config, memory_bytes=memory_bytes, **options)
    if kind not in KINDS:
        raise ValueError(f"unknown device {kind!r}; known: {', '.join(KINDS)}")
    return RtlDevice(config, simulator=kind, memory_bytes=memory_bytes, **options)
