"""A graph as text, to read or to compare."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass

import numpy as np

from systole.sw.ir.graph import Graph, Op, Tensor

_SHOWN_ELSEWHERE = ("name", "op_type", "output", "low", "high")


def render(graph: Graph) -> str:
    """The graph, a line for each input, constant, operator and output, in that order.

    An operator's line is ``RESULT = CLASS 'node' (ONNX operators): fields``, where a field with its
    default value is left out and an array is its type and shape."""
    return "\n".join(_lines(graph)) + "\n"


def _lines(graph: Graph) -> Iterator[str]:
    yield f"graph {graph.name!r}"
    for port in graph.inputs:
        yield f"input {port.name!r} ({port.dtype}) -> {_tensor(graph.tensors[port.tensor])}"
    for name in graph.constants:
        yield f"constant {_tensor(graph.tensors[name])}"
    for op in graph.ops:
        yield f"{_tensor(graph.tensors[op.output])} = {_operator(op)}"
    for port in graph.outputs:
        yield f"output {port.name!r} ({port.dtype}) <- {port.tensor!r}"


def _tensor(tensor: Tensor) -> str:
    kind = "uint8" if tensor.unsigned else "int8"
    return f"{tensor.name!r} {kind}{list(tensor.shape)} scale {tensor.scale!s} zero {tensor.zero}"


def _operator(op: Op) -> str:
    shown = [part for part in _fields(op) if part[0] not in _SHOWN_ELSEWHERE]
    if (op.low, op.high) != (-128, 127):
        shown.append(("clamp", f"{op.low}..{op.high}"))
    text = ", ".join(f"{name} {value}" for name, value in shown)
    return f"{type(op).__name__} {op.name!r} ({op.op_type}): {text}"


def _fields(value: object) -> Iterator[tuple[str, str]]:
    """Names and values of a dataclass' fields that differ from their defaults."""
    if not is_dataclass(value):
        return
    for each in fields(value):
        held = getattr(value, each.name)
        if each.default is MISSING or held != each.default:
            yield each.name, _value(held)


def _value(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, np.generic):
        return str(value)
    if is_dataclass(value):
        return "{" + ", ".join(f"{name} {text}" for name, text in _fields(value)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(v) for v in value) + "]"
    return repr(value)
