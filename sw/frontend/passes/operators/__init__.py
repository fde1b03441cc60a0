"""Pass 2's operators. ``OPERATORS`` is the table of their handlers.

A handler's docstring states what is supported of its operators, one constraint a sentence; it is
the users' documentation (docs/supported-ops.md). Anything else is refused by node, attribute, value
and limit.
"""

from systole.sw.frontend.passes.operators import (
    elementwise,
    functions,
    fused,
    movement,
    pools,
    products,
    quantisation,
    relayout,
    rows,
)
from systole.sw.frontend.passes.operators.registry import OPERATORS

__all__ = [
    "OPERATORS",
    "elementwise",
    "functions",
    "fused",
    "movement",
    "pools",
    "products",
    "quantisation",
    "relayout",
    "rows",
]
