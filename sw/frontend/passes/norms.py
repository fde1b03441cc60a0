"""Normalisations written out: the nodes that a LayerNormalization of old opsets, or an
RMSNormalization, consists of, found as one.

x - mean(x), its square, the mean of that, plus epsilon, the root, the quotient; then a product with
constants and a sum, if they follow. For an RMSNormalization nothing is taken off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir


@dataclass(frozen=True)
class Norm:
    """A normalisation of several nodes."""

    nodes: tuple[ir.Node, ...]
    """All of them; the last gives the result, and nothing else reads those of the others."""
    x: ir.Value
    axis: int
    """As the model has it: may be negative."""
    epsilon: float
    centred: bool
    gain: np.ndarray
    """Broadcast to the result."""
    shift: np.ndarray


def find_norms(graph: ir.Graph | ir.GraphView) -> list[Norm]:
    """All normalisations written out in a graph, in its order."""
    found = (_norm(node) for node in graph if node.op_type in ("Div", "Mul"))
    return [norm for norm in found if norm is not None]


def _norm(last: ir.Node) -> Norm | None:
    """The normalisation that ends with ``last``, its quotient, and with what follows."""
    for number, root in _quotients(last):
        nodes = [last]
        variance = _behind_root(root, nodes)
        if variance is None:
            continue
        mean_of, epsilon = variance
        norm = _of_variance(number, mean_of, epsilon, nodes)
        if norm is not None and _is_closed(norm):
            return _with_affine(norm)
    return None


def _quotients(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Dividend and divisor, in both orders where the node multiplies by a reciprocal."""
    a, b = node.inputs[:2]
    if a is None or b is None:
        return
    if node.op_type == "Div":
        yield a, b
    else:
        yield a, b
        yield b, a


def _behind_root(root: ir.Value, nodes: list[ir.Node]) -> tuple[ir.Value, float] | None:
    """The value whose root (of a Div), or the root's reciprocal (of a Mul), ``root`` is, without
    the epsilon that is added, and that. Its nodes join ``nodes``."""
    node = root.producer()
    if nodes[0].op_type == "Mul":
        if node is None or node.op_type != "Reciprocal":
            return None
        nodes.append(node)
        root = _input(node, 0)
        node = root.producer()
    if node is None or node.op_type != "Sqrt":
        return None
    nodes.append(node)
    total = _input(node, 0).producer()
    if total is None or total.op_type != "Add":
        return None
    nodes.append(total)
    for value, constant in ((0, 1), (1, 0)):
        epsilon = _constant(_input(total, constant))
        if epsilon is not None and epsilon.size == 1:
            return _input(total, value), float(epsilon.reshape(()))
    return None


def _of_variance(
    number: ir.Value, variance: ir.Value, epsilon: float, nodes: list[ir.Node]
) -> Norm | None:
    """The normalisation whose variance is ``variance``, of the dividend ``number``."""
    mean = _mean(variance)
    if mean is None:
        return None
    squares, axis, of_squares = mean
    square = squares.producer()
    if square is None or square.op_type not in ("Pow", "Mul"):
        return None
    base, exponent = _input(square, 0), _input(square, 1)
    power = _constant(exponent)
    if square.op_type == "Mul" and base is not exponent:
        return None
    if square.op_type == "Pow" and (power is None or power.size != 1 or power.reshape(()) != 2):
        return None
    nodes += [of_squares, square]
    one, none = np.ones(()), np.zeros(())
    centre = _centred(base, axis)
    if centre is None:
        if base is not number:
            return None
        return Norm(
            nodes=tuple(nodes[::-1]),
            x=number,
            axis=axis,
            epsilon=epsilon,
            centred=False,
            gain=one,
            shift=none,
        )
    x, own = centre
    if base is not number:
        # The difference written twice.
        again = _centred(number, axis)
        if again is None or again[0] is not x:
            return None
        own += [node for node in again[1] if node not in own]
    return Norm(
        nodes=(*own[::-1], *nodes[::-1]),
        x=x,
        axis=axis,
        epsilon=epsilon,
        centred=True,
        gain=one,
        shift=none,
    )


def _centred(value: ir.Value, axis: int) -> tuple[ir.Value, list[ir.Node]] | None:
    """What ``value`` is without its mean along ``axis`` taken off, and the nodes that do that."""
    node = value.producer()
    if node is None or node.op_type != "Sub":
        return None
    x, mean = _input(node, 0), _mean(_input(node, 1))
    if mean is None or mean[0] is not x or mean[1] != axis:
        return None
    return x, [node, mean[2]]


def _mean(value: ir.Value) -> tuple[ir.Value, int, ir.Node] | None:
    """What ``value`` is the mean of along one axis, the axis, and the node."""
    node = value.producer()
    if node is None or node.op_type != "ReduceMean":
        return None
    keeps = node.attributes.get("keepdims")
    if keeps is not None and keeps.as_int() == 0:
        return None
    given = node.attributes.get("axes")
    if given is not None:
        axes = list(given.as_ints())
    else:
        constant = _constant(node.inputs[1]) if len(node.inputs) > 1 else None
        axes = [] if constant is None else constant.reshape(-1).tolist()
    return (_input(node, 0), int(axes[0]), node) if len(axes) == 1 else None


def _with_affine(norm: Norm) -> Norm:
    """With the product and the sum with constants that follow."""
    for op_type in ("Mul", "Add"):
        (result,) = norm.nodes[-1].outputs
        uses = result.uses()
        if result.is_graph_output() or len(uses) != 1:
            continue
        (user, place) = next(iter(uses))
        other = _constant(user.inputs[1 - place]) if user.op_type == op_type else None
        rank = None if result.shape is None else len(result.shape)
        if other is None or other.dtype.kind != "f" or rank is None or other.ndim > rank:
            continue
        nodes = (*norm.nodes, user)
        if op_type == "Mul":
            norm = replace(norm, nodes=nodes, gain=other)
        else:
            norm = replace(norm, nodes=nodes, shift=other)
    return norm


def _is_closed(norm: Norm) -> bool:
    """Whether nothing but its own nodes reads what all but the last compute."""
    inside = set(norm.nodes)
    return all(
        not value.is_graph_output() and all(user in inside for user, _ in value.uses())
        for node in norm.nodes[:-1]
        for value in node.outputs
    )


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None, "onnxruntime checked the model"
    return value


def _constant(value: ir.Value | None) -> np.ndarray | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()
