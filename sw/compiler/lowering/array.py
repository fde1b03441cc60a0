"""Array stages: kernels become weight tiles and runs of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from systole.isa import Config
from systole.sw.compiler.lowering.context import LoweringContext, Size
from systole.sw.compiler.stages import (
    ArrayStage,
    Combine,
    Fold,
    Geometry,
    Pass,
    Phase,
    Requant,
    Source,
    WeightRun,
)
from systole.sw.compiler.zeros import fitting_zero
from systole.sw.ir import layout
from systole.sw.ir.graph import Op


class PackedKernel(NamedTuple):
    """A kernel as weight tiles."""

    tiles: np.ndarray
    """int8 (count, kh, kw, rows, cols): the weights plus their zero point, of the tiles that are
    used, column block by column block."""
    zero: int
    """The zero point."""
    used: np.ndarray
    """By column block and channel block: there are weights other than zero."""

    def with_zeros(self, columns: np.ndarray) -> PackedKernel:
        """The same with a tile of zeros in use for each of some column blocks that have none: that
        of the first channel block."""
        used = self.used.copy()
        used[columns, 0] = True
        tiles = np.full((int(used.sum()), *self.tiles.shape[1:]), self.zero, np.int8)
        tiles[self.used[used]] = self.tiles
        return PackedKernel(tiles, self.zero, used)

    def by_column(self) -> list[np.ndarray]:
        """The tiles of each column block."""
        ends = np.cumsum(self.used.sum(axis=1)).tolist()
        return [self.tiles[begin:end] for begin, end in zip([0, *ends], ends)]


@dataclass(frozen=True)
class Permutation:
    """A 1x1 kernel (O, C, 1, 1) that brings channels to other places, each with the same weight."""

    size: tuple[int, int]
    """(O, C)."""
    outputs: np.ndarray
    """Channels of the output; the others get nothing."""
    inputs: np.ndarray
    """The channel of the input that each of these takes."""
    weight: int
    """int8, less a zero point."""

    def packed(self, config: Config, zero: int) -> PackedKernel:
        """Its tiles, without a look at all the zeros among them."""
        columns, blocks = -(-self.size[0] // config.cols), -(-self.size[1] // config.rows)
        used = np.zeros(columns * blocks, bool)
        column, col = np.divmod(self.outputs, config.cols)
        block, row = np.divmod(self.inputs, config.rows)
        taken, number = np.unique(column * blocks + block, return_inverse=True)
        tiles = np.full((len(taken), 1, 1, config.rows, config.cols), zero, np.int8)
        tiles[number, 0, 0, row, col] = self.weight + zero
        used[taken] = self.weight != 0
        return PackedKernel(tiles[: int(used.sum())], zero, used.reshape(columns, blocks))


@dataclass(frozen=True)
class KernelPass:
    """A convolution of one source by a kernel (O, C, kh, kw) of int8 less a zero point."""

    source: int
    """Its number among the stage's sources."""
    geometry: Geometry
    kernel: np.ndarray | Permutation
    zero: int = 0


@dataclass(frozen=True)
class KernelPhase:
    """The convolutions that add up to the outputs (y + i * steps[0], x + j * steps[1])."""

    y: int
    x: int
    passes: list[KernelPass]


def int8_parts(weights: np.ndarray) -> list[np.ndarray]:
    """int8 kernels that add up to ``weights``."""
    parts: list[np.ndarray] = []
    while not parts or weights.any():
        part = np.clip(weights, -128, 127)
        parts.append(part.astype(np.int8))
        weights = weights - part
    return parts


def kernel_parts(weights: np.ndarray, config: Config) -> list[tuple[np.ndarray, int]]:
    """Kernels that add up to ``weights``, each int8 less a zero point, which comes with it."""
    zero = fitting_zero(weights, config)
    if zero is None:
        return [(part, 0) for part in int8_parts(weights)]
    return [(weights if zero else weights.astype(np.int8, copy=False), zero)]


class WeightStore:
    """The weight tiles of a stage, blocks of zeros left out."""

    def __init__(self, config: Config):
        self.config = config
        self._count = 0
        self._data: list[np.ndarray] = []

    def runs(self, passes: list[KernelPass]) -> list[tuple[tuple[WeightRun, ...], ...]]:
        """Add the kernels (O, C, kh, kw) of a phase, column block by column block. The result has
        for each kernel its runs by column block. Each column block has a run of some kernel, if
        only of zeros."""
        packed = [_packed(each.kernel, each.zero, self.config) for each in passes]
        empty = ~np.any([each.used.any(axis=-1) for each in packed], axis=0)
        if empty.any():
            packed[0] = packed[0].with_zeros(empty)
        tiles = [each.by_column() for each in packed]
        by_column = [
            [self._add(own[c], each.used[c]) for own, each in zip(tiles, packed, strict=True)]
            for c in range(len(empty))
        ]
        return [tuple(runs[k] for runs in by_column) for k in range(len(passes))]

    def _add(self, tiles: np.ndarray, used: np.ndarray) -> tuple[WeightRun, ...]:
        """Add the tiles (count, kh, kw, rows, cols) of a column block's ``used`` channel blocks."""
        if not len(tiles):
            return ()
        words = tiles.reshape(-1, self.config.cols)
        self._data.append(words)
        of_tile = len(words) // len(tiles)
        runs, first = [], 0
        for kept, alike in itertools.groupby(used.tolist()):
            count = len(list(alike))
            if kept:
                runs.append(WeightRun(first, count, self._count))
                self._count += count * of_tile
            first += count
        return tuple(runs)

    def words(self) -> np.ndarray:
        """All tiles, (words, cols)."""
        return np.concatenate(self._data)


def _packed(kernel: np.ndarray | Permutation, zero: int, config: Config) -> PackedKernel:
    """A kernel's tiles."""
    if isinstance(kernel, Permutation):
        return kernel.packed(config, zero)
    tiles = layout.pack_weights(kernel, config)
    used = np.asarray(tiles.reshape(*tiles.shape[:2], -1).any(2))
    return PackedKernel((tiles[used] + zero).astype(np.int8) if zero else tiles[used], zero, used)


def array_stage(
    context: LoweringContext,
    layer: int,
    op: Op,
    *,
    size: Size,
    out_size: Size,
    sources: tuple[Source, ...],
    phases: list[KernelPhase],
    params: np.ndarray,
    requant: Requant,
    steps: tuple[int, int] = (1, 1),
    combine: Combine | None = None,
    fold: Fold | None = None,
    table: np.ndarray | None = None,
    striped: bool = True,
) -> ArrayStage:
    """The stage that sums the convolutions of ``phases``, each ``size`` outputs large."""
    config = context.config
    n, channels, _, _ = context.tensors[op.output].shape
    store = WeightStore(config)
    per_phase = len(params) // len(phases)
    stored = []
    for k, phase in enumerate(phases):
        runs = store.runs(phase.passes)
        passes = [Pass(e.source, e.geometry, own, e.zero) for e, own in zip(phase.passes, runs)]
        stored.append(Phase(phase.y, phase.x, tuple(passes), k * per_phase))
    return ArrayStage(
        layer=layer,
        op=op,
        batch=n,
        h=size[0],
        w=size[1],
        out_h=out_size[0],
        out_w=out_size[1],
        channels=channels,
        blocks=layout.blocks_of(channels, config.rows),
        group_words=config.cols // config.lanes,
        sources=sources,
        steps=steps,
        striped=striped,
        phases=tuple(stored),
        requant=requant,
        weights=store.words(),
        params=params,
        combine=combine,
        fold=fold,
        table=table,
    )
