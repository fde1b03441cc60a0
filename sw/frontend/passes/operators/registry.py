"""The table of operators, filled by the modules beside this one."""

from __future__ import annotations

from collections.abc import Callable

from systole.sw.frontend.passes.state import LoweringState
from systole.sw.frontend.passes.values import Node, Value

Handler = Callable[[LoweringState, Node], Value | tuple[Value, ...]]
"""Computes a node: the value of its output, or of each of its outputs."""
OPERATORS: dict[tuple[str, str], Handler] = {}
"""By domain and operator type."""

MICROSOFT = "com.microsoft"


def operator(*op_types: str, domain: str = "") -> Callable[[Handler], Handler]:
    """Registers the handler of ``op_types``. Its docstring is their documentation for users."""

    def register(handler: Handler) -> Handler:
        for op_type in op_types:
            OPERATORS[domain, op_type] = handler
        return handler

    return register
