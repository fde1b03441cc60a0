"""The plan of one stage: regions of its output, and the scratchpad buffers that they take."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Literal, NamedTuple

from systole.isa import Config
from systole.sw.compiler.regions import (
    TILE,
    Region,
    grid,
    input_extent,
    output_extent,
    part_of,
    region_sizes,
)
from systole.sw.compiler.stages import (
    ArrayStage,
    Fold,
    Geometry,
    Source,
    Stage,
    TransposeStage,
)

DECENT_REGION = 256
"""Outputs per channel that a region should hold: enough to hide weight loads and halos."""

EARLY_REGION = {"array": 128, "vector": 128, "row": 128, "window": 256, "transpose": 64}
"""Outputs per region, by kind of stage, where regions cost no transfers: small ones let the next
stage begin early; a window stage reads the rows between two regions twice."""

FOLD_REGION = 128
"""Outputs per region of a folded stage: small, so that im2col overlaps with the array."""

Role = int | Literal["out", "im2col"]
"""What a buffer of a stage is for: the source of that number, the output, gathered input."""


class BufferSize(NamedTuple):
    """The size of a stage's buffer."""

    words: int
    """Scratchpad words of one copy."""
    copies: int
    """Copies in turn, so that one can be filled while another one is read."""


class Split(NamedTuple):
    """A reduction whose input does not fit: what is loaded of it at a time."""

    blocks: int
    """Channel blocks."""
    kernel_rows: int


@dataclass(frozen=True)
class StagePlan:
    """How one stage is carried out."""

    regions: list[Region]
    buffers: dict[Role, BufferSize]
    split: Split | None = None
    """The input is loaded part by part, anew for every column block; regions are single tiles."""

    @property
    def words(self) -> int:
        """Scratchpad words of all buffers."""
        return sum(size.words * size.copies for size in self.buffers.values())


@dataclass(frozen=True)
class StagePlanner:
    """Plans one stage."""

    stage: Stage
    config: Config
    on_chip: Set[str]
    """Tensors that are in the scratchpad anyway."""

    def plan(self, regions: list[Region], copies: int = 2) -> StagePlan:
        """The plan by given regions, with up to so many copies of each buffer."""
        return StagePlan(regions, self._buffers(regions, copies))

    def choices(self, *, limit: int | None, decent: bool) -> Iterator[StagePlan]:
        """Plans, the best first: buffers doubled, so that loads and stores overlap, and the largest
        regions; then single; then with the reduction split.

        ``limit``: outputs per region at most. ``decent``: regions must be decent and doubled."""
        stage = self.stage
        most = min(limit or self._enough(), stage.h * stage.w)
        enough = min(stage.h * stage.w, DECENT_REGION, most) // 2
        for copies in (2,) if decent else (2, 1):
            for h, w in region_sizes(stage, most):
                if decent and h * w < enough:
                    return
                yield self.plan(grid(stage, h, w), copies)
        if isinstance(stage, ArrayStage) and stage.fold is None and stage.product is None:
            yield from self._splits(stage)

    def _enough(self) -> int:
        """Outputs per region beyond which nothing is gained."""
        stage = self.stage
        if isinstance(stage, ArrayStage) and stage.fold is not None:
            return FOLD_REGION
        names = {stage.op.output, *(s.tensor for s in stage.sources)}
        early = stage.kind in EARLY_REGION and names <= self.on_chip
        if early and stage.weight_words <= self.config.weight_words // 2:
            return EARLY_REGION[stage.kind]
        return stage.h * stage.w

    def _splits(self, stage: ArrayStage) -> Iterator[StagePlan]:
        """Plans with the reduction split, largest regions and pieces first."""
        passes = {(p.source, p.geometry) for phase in stage.phases for p in phase.passes}
        read = [(k, stage.sources[k], g) for k, g in passes]
        blocks = max(source.blocks for _, source, _ in read)
        kernel = max(g.kernel[0] for _, _, g in read)
        limit = min(TILE, self.config.acc_half)
        splits = [Split(blocks >> i, kernel) for i in range(blocks.bit_length())]
        splits += [Split(1, n) for n in range(kernel - 1, 0, -1)]
        for h, w in region_sizes(stage, limit):
            regions = grid(stage, h, w)
            buffers = self._buffers(regions, 2)
            for split in splits:
                parts = self._part_buffers(read, regions, split)
                yield StagePlan(regions, buffers | parts, split)

    def _part_buffers(
        self, read: list[tuple[int, Source, Geometry]], regions: list[Region], split: Split
    ) -> dict[Role, BufferSize]:
        """The buffers of numbered sources, each read through a window, for part by part."""
        out: dict[Role, BufferSize] = {}
        for k, source, g in read:
            if source.tensor in self.on_chip:
                continue
            rows = split.kernel_rows
            area = max(
                input_extent(part_of(source, g, ky, rows), r).pixels
                for r in regions
                for ky in range(0, g.kernel[0], rows)
            )
            words = min(split.blocks, source.blocks) * area
            out[k] = BufferSize(max(words, out[k].words if k in out else 0), 2)
        return out

    def _buffers(self, regions: list[Region], copies: int) -> dict[Role, BufferSize]:
        """The buffers that regions take, with up to so many copies of each."""
        stage = self.stage
        twice = copies if len(regions) > 1 else 1
        slots = copies if len(regions) * stage.groups > 1 else 1
        out: dict[Role, BufferSize] = {}
        for k, source in enumerate(stage.sources):
            if source.tensor in self.on_chip:
                continue
            if stage.kind == "transpose":
                words = self._channel_blocks(regions) * self.config.rows * stage.group_words
                out[k] = BufferSize(words, slots)
                continue
            area = max(input_extent(source, r).pixels for r in regions)
            if source.per_group:
                out[k] = BufferSize(area * stage.group_words, slots)
            else:
                out[k] = BufferSize(area * source.blocks, twice)
        if isinstance(stage, ArrayStage) and stage.fold is not None:
            if stage.fold.by_row:
                out["im2col"] = self._row_buffer(stage.sources[0], stage.fold, regions, copies)
            else:
                pixels = max(r.pixels for r in regions)
                out["im2col"] = BufferSize(pixels * stage.fold.words, twice)
        if stage.op.output not in self.on_chip:
            area = max(output_extent(stage, r).pixels for r in regions)
            out["out"] = BufferSize(area * stage.group_words, slots)
        return out

    def _channel_blocks(self, regions: list[Region]) -> int:
        """The most channel blocks that a region of a transposition meets."""
        assert isinstance(self.stage, TransposeStage)
        rows, first = self.config.rows, self.stage.first
        starts = ((first + r.x, first + r.x + r.w - 1) for r in regions)
        return max(last // rows - start // rows + 1 for start, last in starts)

    def _row_buffer(
        self, source: Source, fold: Fold, regions: list[Region], copies: int
    ) -> BufferSize:
        """The buffer of gathered rows: the whole image, so that gathering never waits; or the rows
        of some regions, gathered for one while others are still being read."""
        width, rows = self.stage.w * fold.words, source.h
        if rows * width > self.config.scratchpad_words // 3:
            most = max(input_extent(source, r).h for r in regions)
            rows = min(rows, 2 * copies * most)
        return BufferSize(rows * width, 1)


class StageChoices:
    """The plans of one stage, best first (:meth:`StagePlanner.choices`); each is made when it is
    first needed, and kept."""

    def __init__(self, plans: Iterator[StagePlan]):
        self._rest = plans
        self._made: list[tuple[int, StagePlan]] = []
        """With their words."""

    def within(self, budget: int) -> StagePlan | None:
        """The first plan whose buffers fit in ``budget`` words; None: none does."""
        for words, plan in self._made:
            if words <= budget:
                return plan
        for plan in self._rest:
            words = plan.words
            self._made.append((words, plan))
            if words <= budget:
                return plan
        return None
