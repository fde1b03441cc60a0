"""Pass 2's operators. A handler's docstring states what is supported of its operator; anything else
is refused by name, attribute, value and limit. ``OPERATORS`` is the table.
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
]
