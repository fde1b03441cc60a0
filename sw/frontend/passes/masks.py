"""Attention masks: what is added to scores in front of a Softmax to keep some of them out, found so
that it need not share a scale with them.

A mask is 0, or so low that the exponential is 0 in float32. Where it follows from an input, its
nodes are followed back: comparisons, logic, choices between constants, and arithmetic with these.
Integer inputs are taken to be 0 or 1, as those are that exporters make masks of.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

MASKED = -1000.0
"""A mask is at most this where it is not 0."""
UNDERFLOW = -104.0
"""The exponential of this is 0 in float32."""
MOST = 4
"""Different numbers that a value may have to be looked at."""

Numbers = frozenset[float]
"""All that the elements of a value can be."""

_LOGICAL: Numbers = frozenset((0.0, 1.0))
_COMPARISONS = (
    *("And", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual"),
    *("Not", "Or", "Xor"),
)
_MOVES = (
    *("Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Tile"),
    *("Transpose", "Unsqueeze"),
)
_ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "Add": lambda a, b: a + b,
    "Max": max,
    "Min": min,
    "Mul": lambda a, b: a * b,
    "Sub": lambda a, b: a - b,
}


@dataclass(frozen=True)
class MaskedSoftmax:
    """A Softmax of scores with masks, and what guards it against rows that are masked whole."""

    nodes: tuple[ir.Node, ...]
    """All of them, in the graph's order; the last gives the result, and nothing else reads those of
    the others, except the Softmax' which the guard reads twice."""
    softmax: ir.Node
    scores: ir.Value
    masks: tuple[ir.Value, ...]
    guarded: bool
    """A row that is masked whole gives zeros."""


def find_masked(
    graph: ir.Graph | ir.GraphView, known: Mapping[str, float] | None = None
) -> list[MaskedSoftmax]:
    """All Softmaxes with masks or a guard, in the graph's order. ``known``: as of
    :func:`computed_masks`, for masks whose nodes are not in the graph."""
    found = (_masked(node, known or {}) for node in graph if node.op_type == "Softmax")
    return [each for each in found if each is not None]


def computed_masks(graph: ir.Graph | ir.GraphView) -> dict[str, float]:
    """The masks of a graph that are no constants, by name: the highest number that masks."""
    return {
        mask.name: highest
        for each in find_masked(graph)
        for mask in each.masks
        if mask.const_value is None and mask.name and (highest := highest_masking(mask)) is not None
    }


def logical_inputs(graph: ir.Graph | ir.GraphView) -> set[str]:
    """Names of the inputs that masks are computed from, which are 0 or 1."""
    names = computed_masks(graph)
    todo = [v for node in graph for v in node.outputs if v.name in names]
    seen = set(todo)
    for value in todo:
        node = value.producer()
        new = [v for v in node.inputs if v is not None and v not in seen] if node else []
        todo += new
        seen.update(new)
    return {v.name for v in graph.inputs if v in seen and v.name}


def choices_as_masks(graph: ir.Graph) -> None:
    """Rewrites Where(condition, scores, low number) in front of a Softmax, and the same the other
    way round, as scores plus a mask; whatever is masked has a share of 0."""
    for softmax in [node for node in graph if node.op_type == "Softmax"]:
        value = softmax.inputs[0]
        node = None if value is None else _alone(value)
        if node is None or node.op_type != "Where":
            continue
        condition, *choices = node.inputs
        for place in (0, 1):
            low = choices[place]
            if low is None or not _masks(_numbers(low, {})) or 0.0 in (_numbers(low, {}) or ()):
                continue
            _as_sum(graph, node, condition, scores=choices[1 - place], low=low, low_first=not place)
            break


def _as_sum(
    graph: ir.Graph,
    node: ir.Node,
    condition: ir.Value | None,
    *,
    scores: ir.Value | None,
    low: ir.Value,
    low_first: bool,
) -> None:
    """Replaces ``node``, a Where, by a sum."""
    (result,) = node.outputs
    if condition is not None and condition.const_value is not None and low.const_value is not None:
        low_where = condition.const_value.numpy() == low_first
        array = np.where(low_where, low.const_value.numpy(), np.float32(0))
        mask = _constant(graph, f"{result.name}:mask", array)
    else:
        none = _constant(graph, f"{result.name}:unmasked", np.zeros((), np.float32))
        chosen = (condition, low, none) if low_first else (condition, none, low)
        choice = ir.node("Where", chosen, name=f"{node.name}:mask")
        (mask,) = choice.outputs
        mask.name = f"{result.name}:mask"
        graph.insert_before(node, choice)
    total = ir.node("Add", (scores, mask), name=node.name)
    graph.insert_before(node, total)
    total.outputs[0].type, total.outputs[0].shape = result.type, result.shape
    ir.convenience.replace_all_uses_with(result, total.outputs[0])
    name = result.name
    graph.remove(node, safe=True)
    total.outputs[0].name = name


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new initialiser."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape))
    value.type = ir.TensorType(tensor.dtype)
    graph.register_initializer(value)
    return value


def highest_masking(mask: ir.Value) -> float | None:
    """The highest number of a mask that masks; None: it masks nothing."""
    low = [number for number in _numbers(mask, {}) or () if number]
    return max(low, default=None)


def _masked(softmax: ir.Node, known: Mapping[str, float]) -> MaskedSoftmax | None:
    value, sums, masks = softmax.inputs[0], [], []
    while value is not None:
        node = _alone(value)
        if node is None or node.op_type != "Add":
            break
        pair = list(node.inputs)
        mask = next((v for v in reversed(pair) if v is not None and _is_mask(v, known)), None)
        if mask is None:
            break
        sums.append(node)
        masks.append(mask)
        value = pair[0] if pair[1] is mask else pair[1]
    guard = _guard(softmax)
    if value is None or not (masks or guard):
        return None
    return MaskedSoftmax((*sums[::-1], softmax, *guard), softmax, value, tuple(masks), bool(guard))


def _is_mask(value: ir.Value, known: Mapping[str, float]) -> bool:
    if value.name in known:
        return True
    return (value.dtype is None or value.dtype.is_floating_point()) and _masks(_numbers(value, {}))


def _masks(numbers: Numbers | None) -> bool:
    return bool(numbers) and all(n == 0 or n <= MASKED for n in numbers or ())


def _guard(softmax: ir.Node) -> tuple[ir.Node, ...]:
    """The nodes that put zeros in place of a Softmax' results that are no numbers; none if there
    are none."""
    (result,) = softmax.outputs
    users = [user for user, _ in result.uses()]
    if result.is_graph_output() or len(users) != 2:
        return ()
    test = next((user for user in users if user.op_type == "IsNaN"), None)
    choice = next((user for user in users if user.op_type == "Where"), None)
    if test is None or choice is None or test.outputs[0].is_graph_output():
        return ()
    condition, replaced, kept = choice.inputs
    read_once = [user for user, _ in test.outputs[0].uses()] == [choice]
    zeros = replaced is not None and _numbers(replaced, {}) == {0.0}
    fits = condition is test.outputs[0] and kept is result and zeros and read_once
    return (test, choice) if fits else ()


def _alone(value: ir.Value) -> ir.Node | None:
    """The node that computes ``value``, if only one other reads it."""
    return value.producer() if len(value.uses()) == 1 and not value.is_graph_output() else None


def _numbers(value: ir.Value, seen: dict[ir.Value, Numbers | None]) -> Numbers | None:
    """What the elements of a value can be; None: not known, or more than MOST numbers."""
    if value not in seen:
        seen[value] = None
        seen[value] = _few(_of_value(value, seen))
    return seen[value]


def _few(numbers: Iterable[float] | None) -> Numbers | None:
    few = None if numbers is None else frozenset(numbers)
    return None if few is None or len(few) > MOST or any(np.isnan(n) for n in few) else few


def _of_value(value: ir.Value, seen: dict[ir.Value, Numbers | None]) -> Iterable[float] | None:
    if value.const_value is not None:
        return [float(n) for n in np.unique(value.const_value.numpy())[: MOST + 1]]
    node = value.producer()
    if node is None:
        logical = value.dtype is not None and (
            value.dtype.is_integer() or value.dtype == ir.DataType.BOOL
        )
        return _LOGICAL if logical else None
    if node.op_type in _COMPARISONS:
        return _LOGICAL
    operands = [None if v is None else _numbers(v, seen) for v in node.inputs]
    if node.op_type == "Cast":
        return _cast(node, operands[0])
    if node.op_type in _MOVES:
        return operands[0]
    if node.op_type == "Where":
        return None if None in operands[1:] else [n for each in operands[1:] for n in each or ()]
    if node.op_type == "Concat":
        return None if None in operands else [n for each in operands for n in each or ()]
    if node.op_type == "Neg":
        return None if operands[0] is None else [-n for n in operands[0]]
    compute = _ARITHMETIC.get(node.op_type)
    if compute is None or None in operands or len(operands) != 2:
        return None
    return list(_pairs(compute, operands[0] or (), operands[1] or ()))


def _pairs(
    compute: Callable[[float, float], float], first: Iterable[float], second: Iterable[float]
) -> Iterator[float]:
    """Of all pairs, in float32, whose lowest number plus a low one is that or minus infinity."""
    with np.errstate(all="ignore"):
        for a, b in itertools.product(first, second):
            yield float(np.float32(compute(a, b)))


def _cast(node: ir.Node, numbers: Numbers | None) -> Iterable[float] | None:
    if numbers is not None and node.attributes["to"].as_int() == ir.DataType.BOOL:
        return [float(n != 0) for n in numbers]
    return numbers
