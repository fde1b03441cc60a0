"""Open dimensions of a model's inputs, and how large a tensor may be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from onnx import TensorShapeProto, ValueInfoProto

from systole.sw.ir.graph import ModelError
from systole.sw.ir.model_file import MAX_ELEMENTS

MAX_BATCH = 1024
"""Images of an input: commands are written out for each."""


def check_size(kind: str, name: str, shape: Sequence[int]) -> None:
    """Raises :class:`ModelError` if a tensor of this shape is too large."""
    elements = math.prod(shape)
    if elements > MAX_ELEMENTS:
        raise ModelError(
            f"{kind} {name!r} needs {elements:,} elements, shape {list(shape)}; at most "
            f"{MAX_ELEMENTS:,} are possible"
        )


def bind_dimensions(
    inputs: Iterable[ValueInfoProto],
    given: Mapping[str, int],
    picture: tuple[int, int] | None = None,
) -> None:
    """Gives every open dimension of ``inputs`` its number, in place.

    ``given``: numbers by the dimension's name, or as ``INPUT:AXIS``. ``picture``: height and width,
    for inputs whose own are open. An open first dimension (the batch) becomes 1. Raises
    :class:`ModelError` for dimensions that stay open, are not positive or too large, and for names
    in ``given`` that no open dimension has."""
    inputs = list(inputs)
    open_names: set[str] = set()
    for value in inputs:
        if not value.type.tensor_type.HasField("shape"):
            raise ModelError(f"input {value.name!r} has no shape; one is needed")
        dims = value.type.tensor_type.shape.dim
        defaults = _defaults(dims, picture)
        for axis, dim in enumerate(dims):
            if not dim.HasField("dim_value"):
                names = _names(value, axis)
                open_names.update(names)
                number = next((given[n] for n in names if n in given), defaults.get(axis))
                if number is not None and number < 1:
                    raise ModelError(f"dimension {names[0]} = {number}: it must be positive")
                if number is not None:
                    dim.dim_value = number
    unknown = sorted(set(given) - open_names)
    if unknown:
        have = ", ".join(sorted(open_names)) or "none"
        raise ModelError(f"no open dimension {unknown[0]}: the model's are {have}")
    for value in inputs:
        _check_bound(value)


def _names(value: ValueInfoProto, axis: int) -> list[str]:
    """The names by which a dimension can be given."""
    name = value.type.tensor_type.shape.dim[axis].dim_param
    return [n for n in (name, f"{value.name}:{axis}") if n]


def _check_bound(value: ValueInfoProto) -> None:
    """Raises :class:`ModelError` unless the input's dimensions are numbers within the limits."""
    dims = value.type.tensor_type.shape.dim
    for axis, dim in enumerate(dims):
        if dim.dim_value < 1:
            shown = dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "open"
            raise ModelError(
                f"input {value.name!r}: dimension {axis} is {shown}; it must be a fixed positive "
                f"number: bind an open one with --dim {_names(value, axis)[0]}=N (only the first, "
                "the batch, may stay open and becomes 1)"
            )
    shape = [dim.dim_value for dim in dims]
    check_size("input", value.name, shape)
    if len(shape) > 2 and shape[0] > MAX_BATCH:
        raise ModelError(
            f"input {value.name!r}: a batch of {shape[0]:,}; at most {MAX_BATCH:,} are possible"
        )


def _defaults(
    dims: Sequence[TensorShapeProto.Dimension], picture: tuple[int, int] | None
) -> dict[int, int]:
    """Numbers of open dimensions that are not given, by axis."""
    if picture is None:
        return {0: 1}
    channels_last = len(dims) == 4 and dims[3].dim_value in (1, 3)
    first = 1 if channels_last else 2
    return {0: 1, first: picture[0], first + 1: picture[1]}
