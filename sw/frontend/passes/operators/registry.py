"""The table of operators, filled by the modules beside this one."""

from __future__ import annotations

from collections.abc import Callable

from systole.sw.frontend.passes.lower import GraphBuilder
from systole.sw.frontend.passes.values import Node, Value

Handler = Callable[[GraphBuilder, Node], Value]
OPERATORS: dict[tuple[str, str], Handler] = {}
"""By domain and operator type."""

MICROSOFT = "com.microsoft"


def operator(*op_types: str, domain: str = "") -> Callable[[Handler], Handler]:
    """Registers the handler of ``op_types``. Its docstring says what of them is supported."""

    def register(handler: Handler) -> Handler:
        for op_type in op_types:
            OPERATORS[domain, op_type] = handler
        return handler

    return register
