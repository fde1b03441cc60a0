"""Why operators run on the host: equal reasons once, with a count."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from systole.sw.compiler.placement import NodePlacement
from systole.sw.frontend.dataflow import CONVERSIONS

QUOTED = re.compile(r"'[^']*'|\d+")
"""What tells equal reasons apart: names and numbers."""


@dataclass(frozen=True)
class HostReason:
    """Operators that run on the host for one reason."""

    ops: dict[str, int]
    """How many of each type."""
    first: str
    """Name of the first of them."""
    reason: str
    """Of the first; those of the others may differ in names and numbers."""
    because: str | None
    """The operator on the host that keeps them from the accelerator, as ``OPERATOR 'name'``: the
    first one's. None: the reason is their own."""
    macs: int
    """Their multiply-accumulates, as far as they are known."""

    @property
    def what(self) -> str:
        """The operators for people."""
        if sum(self.ops.values()) == 1:
            return f"{next(iter(self.ops))} {self.first!r}"
        counts = ", ".join(f"{n} {op}" if n > 1 else op for op, n in self.ops.items())
        return f"{counts} (first {self.first!r})"

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}"


def host_reasons(placements: Iterable[NodePlacement]) -> list[HostReason]:
    """The reasons of what runs on the host, but for conversions without one of their own: first
    those of operators refused themselves, in the order of the first of each, then those that others
    keep from the accelerator, likewise."""
    groups: dict[tuple[str, str], list[NodePlacement]] = {}
    for p in placements:
        follows = p.converts or (p.because is not None and p.op_type in CONVERSIONS)
        if p.host and not follows:
            own = "" if p.because else p.op_type
            groups.setdefault((own, QUOTED.sub("", p.rule)), []).append(p)
    reasons = [_reason(group) for group in groups.values()]
    return sorted(reasons, key=lambda reason: reason.because is not None)


def _reason(group: list[NodePlacement]) -> HostReason:
    return HostReason(
        ops=dict(Counter(p.op_type for p in group)),
        first=group[0].name,
        reason=group[0].rule,
        because=group[0].because,
        macs=sum(p.macs or 0 for p in group),
    )
