"""How a value of the model stands on its stored array, through reshapes and transposes.

An ``OnnxView`` is a strided array whose dimensions may each consist of several *atoms* (size,
stride), outermost first. Strides count elements of a contiguous base array; along an atom of stride
0 an element repeats. That closes the pure layout operators: a transpose reorders dimensions, a
reshape regroups atoms, and no data move.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Atom = tuple[int, int]
"""Size and stride."""
Shape = tuple[int, int, int, int]
"""Images, channels, rows and columns of a stored array."""


class LayoutError(ValueError):
    """A layout that strides cannot express."""


def four(shape: Sequence[int]) -> Shape:
    """The shape of an array that has four dimensions."""
    n, c, h, w = shape
    return n, c, h, w


def merge(*groups: Sequence[Atom]) -> tuple[Atom, ...]:
    """The groups' atoms in canonical form: none of size 1, neighbours joined where contiguous."""
    out: list[Atom] = []
    for group in groups:
        for size, stride in group:
            if size == 1:
                continue
            if out and out[-1][1] == size * stride:
                out[-1] = (out[-1][0] * size, stride)
            else:
                out.append((size, stride))
    return tuple(out)


@dataclass(frozen=True)
class OnnxView:
    """An array of ``shape``; ``dims[i]`` are the canonical atoms of dimension i."""

    shape: tuple[int, ...]
    dims: tuple[tuple[Atom, ...], ...]

    @classmethod
    def contiguous(cls, shape: Sequence[int]) -> OnnxView:
        """The base array itself."""
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        atoms = zip(shape, strides, strict=True)
        return cls(tuple(shape), tuple(merge([atom]) for atom in atoms))

    @classmethod
    def of_indices(cls, index: np.ndarray) -> OnnxView | None:
        """The view whose :meth:`indices` are ``index``; None if strides cannot express them."""
        if not index.size or index.flat[0]:
            return None
        dims = []
        for axis in range(index.ndim):
            line = index[tuple(slice(None) if i == axis else 0 for i in range(index.ndim))]
            dims.append(_atoms_of(line))
        view = cls(index.shape, tuple(dims))
        return view if np.array_equal(view.indices(), index) else None

    def transpose(self, perm: Sequence[int]) -> OnnxView:
        return OnnxView(tuple(self.shape[p] for p in perm), tuple(self.dims[p] for p in perm))

    def reshape(self, shape: Sequence[int]) -> OnnxView:
        """Raises :class:`LayoutError` when a new dimension would cut an atom unevenly."""
        if math.prod(shape) != math.prod(self.shape):
            raise LayoutError(f"cannot reshape {list(self.shape)} to {list(shape)}")
        rest = list(merge(*self.dims))
        dims: list[tuple[Atom, ...]] = []
        for need in shape:
            dim: list[Atom] = []
            while need > 1:
                size, stride = rest.pop(0)
                if size > need:
                    if size % need:
                        raise LayoutError(f"cannot trace {list(self.shape)} to {list(shape)}")
                    rest.insert(0, (size // need, stride))
                    size, stride = need, stride * (size // need)
                elif need % size:
                    raise LayoutError(f"cannot trace {list(self.shape)} to {list(shape)}")
                dim.append((size, stride))
                need //= size
            dims.append(merge(dim))
        return OnnxView(tuple(shape), tuple(dims))

    def indices(self) -> np.ndarray:
        """For each element of the value its place in the base array."""
        out: np.ndarray = np.zeros((), np.int32)
        for dim in self.dims:
            axis: np.ndarray = np.zeros(1, np.int32)
            for size, stride in dim:
                axis = np.add.outer(axis, np.arange(size, dtype=np.int32) * stride).reshape(-1)
            out = np.add.outer(out, axis)
        return out

    def repeated(self, shape: Sequence[int]) -> OnnxView:
        """The value broadcast to ``shape``: strides of 0 along axes of size 1 that grow. Raises
        :class:`LayoutError` where it has fewer axes that fit."""
        added = len(shape) - len(self.shape)
        own = [(1, ()) for _ in range(added)] + list(zip(self.shape, self.dims, strict=True))
        if added < 0 or any(size not in (1, s) for (size, _), s in zip(own, shape, strict=True)):
            raise LayoutError(f"cannot broadcast {list(self.shape)} to {list(shape)}")
        dims = (dim if size == s else ((s, 0),) for (size, dim), s in zip(own, shape, strict=True))
        return OnnxView(tuple(shape), tuple(dims))

    @property
    def repeats(self) -> bool:
        """Whether it is broadcast along an axis."""
        return any(stride == 0 for dim in self.dims for _, stride in dim)

    def once(self) -> OnnxView:
        """What :meth:`repeated` was given, with all axes of the result."""
        kept = [all(stride for _, stride in dim) for dim in self.dims]
        shape = tuple(s if keep else 1 for s, keep in zip(self.shape, kept, strict=True))
        return OnnxView(shape, tuple(d if k else () for d, k in zip(self.dims, kept, strict=True)))

    def rebase(self, stored: OnnxView) -> OnnxView:
        """This view in strides of ``stored`` made contiguous; both are views of the same base."""
        contiguous = OnnxView.contiguous([math.prod(s for s, _ in merge(d)) for d in stored.dims])
        pieces = [
            (size, stride, new)
            for dim, new_dim in zip(stored.dims, contiguous.dims, strict=True)
            for (size, stride), new in zip(dim, _split(dim, new_dim), strict=True)
        ]
        return OnnxView(self.shape, tuple(merge(_relabel(dim, pieces)) for dim in self.dims))


def _atoms_of(line: np.ndarray) -> tuple[Atom, ...]:
    """The atoms of a dimension whose elements stand at ``line``, which begins with 0, if it has
    any."""
    atoms: list[Atom] = []
    while len(line) > 1:
        # The innermost run of equal steps, which divides the line.
        step = int(line[1])
        uneven = np.flatnonzero(np.diff(line) != step)
        size = int(uneven[0]) + 1 if uneven.size else len(line)
        if size < 2 or len(line) % size:
            size = len(line)
        atoms.insert(0, (size, step))
        line = line[::size]
    return merge(atoms)


def _split(dim: Sequence[Atom], whole: Sequence[Atom]) -> list[int]:
    """New strides of a dimension's atoms, given the one atom they become together."""
    stride = whole[0][1] if whole else 1
    out: list[int] = []
    for size, _ in reversed(dim):
        out.insert(0, stride)
        stride *= size
    return out


def _relabel(dim: Sequence[Atom], pieces: Sequence[tuple[int, int, int]]) -> list[Atom]:
    """The atoms of ``dim`` with the strides that ``pieces`` (size, old, new stride) assign."""
    out: list[Atom] = []
    for size, stride in dim:
        parts: list[Atom] = []
        while size > 1:
            inside = [p for p in pieces if p[1] <= stride < p[1] * p[0]]
            if not inside or stride % inside[0][1]:
                raise LayoutError("the dimension is cut unevenly")
            piece, old, new = inside[0]
            factor = stride // old
            take = min(size, piece // factor)
            if size % take or piece % factor:
                raise LayoutError("the dimension is cut unevenly")
            parts.insert(0, (take, new * factor))
            size, stride = size // take, stride * take
        out += parts
    return out


def input_perm(onnx_shape: Sequence[int], stored: OnnxView) -> tuple[int, ...]:
    """The permutation of a contiguous array of ``onnx_shape`` that lists its elements in the order
    of ``stored``, a view of it. Raises :class:`LayoutError` when there is none."""
    axes = {i: d[0] for i, d in enumerate(OnnxView.contiguous(onnx_shape).dims) if d}
    perm = [i for i in range(len(onnx_shape)) if i not in axes]
    for size, stride in merge(*stored.dims):
        while size > 1:
            end = size * stride
            ends = [i for i, (s, at) in axes.items() if s * at == end and size % s == 0]
            if not ends:
                raise LayoutError("an axis is divided between two that do not follow each other")
            perm.append(ends[0])
            size //= axes.pop(ends[0])[0]
    return tuple(perm)


def output_perm(value: OnnxView) -> tuple[int, ...]:
    """The permutation of an array of ``value``'s shape to the order of its base. Raises
    :class:`LayoutError` when there is none."""
    if any(len(dim) > 1 for dim in value.dims):
        raise LayoutError("an axis joins two that do not follow each other")
    strides = [dim[0][1] if dim else math.inf for dim in value.dims]
    return tuple(sorted(range(len(strides)), key=lambda i: -strides[i]))


def default_layout(view: OnnxView) -> OnnxView:
    """The (N, C, H, W) form of a value by its rank: (N, C, H, W) itself, (N, C, W) with H = 1, a
    matrix of rows and features as (1, features, 1, rows)."""
    d, s = view.dims, view.shape
    if len(s) == 4:
        return view
    if len(s) == 3:
        return OnnxView((s[0], s[1], 1, s[2]), (d[0], d[1], (), d[2]))
    rows = (
        OnnxView(s[:-1], d[:-1]).reshape((math.prod(s[:-1]),))
        if len(s) > 1
        else OnnxView((1,), ((),))
    )
    features = s[-1] if s else 1
    return OnnxView((1, features, 1, rows.shape[0]), ((), d[-1] if s else (), (), rows.dims[0]))
