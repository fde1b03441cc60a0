"""Tiles of array stages, and the runs of weights that are multiplied for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from systole.sw.compiler.regions import Region
from systole.sw.compiler.stages import ArrayStage, Pass, WeightRun


@dataclass(frozen=True, kw_only=True)
class ArrayTile:
    """Outputs of one column block that lie in one accumulator half."""

    index: int
    """Number of the stage."""
    stage: ArrayStage
    phase: int
    column: int
    """Number of the column block."""
    region: Region
    half: int
    """Number of the accumulator half."""

    def runs(self, column: int) -> Iterator[TileRun]:
        """The runs of all passes of the tile's phase in a column block."""
        for k, each in enumerate(self.stage.phases[self.phase].passes):
            for weights in each.runs[column]:
                key = RunKey(self.index, self.phase, column, k, weights.block)
                yield TileRun(self, key, each, weights)

    def runs_behind(self, key: RunKey) -> Iterator[TileRun]:
        """The runs of the tile's phase that follow one, those of later column blocks too."""
        columns = len(self.stage.phases[self.phase].passes[0].runs)
        for column in range(key.column, columns):
            for own in self.runs(column):
                if own.key > key:
                    yield own


class RunKey(NamedTuple):
    """Names a run of weights; the order is that in which they are taken."""

    stage: int
    phase: int
    column: int
    number: int
    """Number of the pass within its phase."""
    block: int
    """First channel block."""


class TileRun(NamedTuple):
    """One run of weights for a tile."""

    tile: ArrayTile
    key: RunKey
    convolution: Pass
    weights: WeightRun

    @property
    def kernel(self) -> tuple[int, int]:
        return self.convolution.geometry.kernel
