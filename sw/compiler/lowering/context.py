"""What the lowering of every operator needs: configuration, tensor table, and parts of stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from systole.isa import Config
from systole.isa.numerics import split_ratios, split_scale
from systole.sw.compiler.joins import Part
from systole.sw.compiler.stages import MAX_DIM, POINTWISE, Geometry, Requant, Source
from systole.sw.ir import layout
from systole.sw.ir.graph import Activation, ModelError, Op, Tensor

Size = tuple[int, int]
"""Rows and columns."""

Shape = tuple[int, int, int, int]
"""(N, C, H, W)."""

Split = TypeVar("Split")


@dataclass(frozen=True)
class LoweringContext:
    """The configuration, and the tensors as the operator to be lowered sees them."""

    config: Config
    tensors: Mapping[str, Tensor]
    """The tensor table, by name."""
    packed: frozenset[str]
    """Graph inputs that are kept packed."""
    parts: Mapping[str, tuple[Part, ...]]
    """Virtual tensors, as parts of others (:mod:`~sw.compiler.joins`)."""

    def seeing(self, *tensors: Tensor) -> LoweringContext:
        """The context with new tensors, or with known ones in another shape."""
        return dataclasses.replace(self, tensors={**self.tensors, **{t.name: t for t in tensors}})

    def size(self, name: str) -> Size:
        """Rows and columns of a tensor."""
        return self.tensors[name].shape[2:]

    def source(
        self, name: str, geometries: Iterable[Geometry], size: Size, *, per_group: bool
    ) -> Source:
        """A tensor read through windows as an image of ``size``."""
        t = self.tensors[name]
        return Source(
            tensor=name,
            h=size[0],
            w=size[1],
            blocks=layout.blocks_of(t.shape[1], self.config.rows),
            geometries=tuple(geometries),
            zero=t.zero,
            per_group=per_group,
        )

    def params(self, op: Op, bias: np.ndarray, scale: np.ndarray, group: int) -> np.ndarray:
        """Requantisation parameters, by channel, as scratchpad words (count, rows) of ``group``
        channels each. Raises :class:`ModelError` for a scale out of range."""
        multiplier, shift = _of_node(op, lambda: split_scale(scale))
        return layout.pack_params(bias, multiplier, shift, group, self.config.rows)

    def table(self, activation: Activation | None) -> np.ndarray | None:
        """The table of a fused function as scratchpad words."""
        return None if activation is None else self.table_words(activation.values)

    def table_words(self, values: np.ndarray) -> np.ndarray:
        """256 values as scratchpad words (count, rows)."""
        rows = self.config.rows
        return layout.pad_axis(values.astype(np.int8), 0, rows).reshape(-1, rows)

    def requant(self, op: Op, activation: Activation | None = None) -> Requant:
        """Zero point and clamps of the operator's own result, before a fused function."""
        zero = self.tensors[op.output].zero if activation is None else activation.zero
        return Requant(zero, op.low, op.high)


def ratios(op: Op, *values: float) -> tuple[tuple[int, ...], int]:
    """Ratios of scales as multipliers with a common shift. Raises :class:`ModelError` for ratios
    out of range."""
    return _of_node(op, lambda: split_ratios(*values))


def _of_node(op: Op, split: Callable[[], Split]) -> Split:
    """``split()``; its errors name the node."""
    try:
        return split()
    except ValueError as e:
        raise ModelError(f"node {op.name}: {e}") from None


def flattened(size: Size, geometries: Iterable[Geometry] = ()) -> Size:
    """One row, where every geometry is pointwise and the row is not too long; else ``size``."""
    h, w = size
    if all(g == POINTWISE for g in geometries) and h * w <= MAX_DIM:
        return 1, h * w
    return size


def side_by_side(shape: Shape, size: Size, config: Config) -> tuple[Shape, int]:
    """A tensor as one image of ``size`` that has the blocks of all its images side by side: its
    shape, and the channels that each image takes."""
    per_image = layout.blocks_of(shape[1], config.rows) * config.rows
    return (1, shape[0] * per_image, *size), per_image
