"""Estimates of how long engines work, made before there are commands. Joining, the search for a
schedule and whatever else compares alternatives share them.

They follow the rules of :mod:`systole.isa.timing`, as the cycle model does. What only shows when
commands meet (latencies, tokens, conflicts at the scratchpad) is left to the cycle model; a command
counts its cycles at work and, where that matters, a fixed overhead."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

from systole.isa import Config, Engine, PostOp, WindowOp, timing
from systole.isa.commands import ROW_POSITIONS
from systole.isa.timing import WindowShape
from systole.sw.compiler.regions import (
    TILE,
    Region,
    cuts,
    input_extent,
    output_extent,
    tiles,
)
from systole.sw.compiler.stageplan import EARLY_REGION, StagePlan
from systole.sw.compiler.stages import (
    ArrayStage,
    Fold,
    RowStage,
    Stage,
    VectorStage,
    WindowStage,
)
from systole.sw.ir import layout

WINDOW_COMMAND = 13
"""Cycles between the words of two WINDOW commands: about a pipeline's depth, as in a chain the
commands of different stages take turns. (Those of one stage follow each other without a gap.)"""


# Engines -----------------------------------------------------------------------------------------


def array_cycles(pixels: int, weight_tiles: int, config: Config) -> int:
    """CONV's cycles to stream ``pixels`` vectors through each of the weight tiles. A tile takes no
    less than the ``rows`` cycles that the next one needs to get into place."""
    return weight_tiles * max(pixels, config.rows)


def post_cycles(pixels: int, channels: int, config: Config) -> int:
    """POST's cycles from the accumulators: ``lanes`` channels of an output each."""
    return pixels * -(-channels // config.lanes)


def table_share(config: Config) -> float:
    """Cycles that a table costs POST for each of its other cycles: every command of a tile reads
    the table."""
    return timing.table_reads(config) / TILE


def window_cycles(shape: WindowShape, op: WindowOp, blocks: int, config: Config) -> int:
    """WINDOW's cycles for a region of ``blocks`` channel blocks, a command for each and for each of
    :func:`window_columns`."""
    pieces = (
        dataclasses.replace(shape, out=(shape.out[0], w)) for _, w in window_columns(shape, config)
    )
    return blocks * sum(piece.block_tokens(config, op) + WINDOW_COMMAND for piece in pieces)


def window_columns(shape: WindowShape, config: Config) -> list[tuple[int, int]]:
    """The columns of a WINDOW command's output in pieces (start, length), so narrow that each takes
    the fast path; all in one where that is no gain."""
    height, width = shape.out
    most = (config.window_width - shape.span[1]) // shape.stride[1] + 1
    if width <= most or most < 1:
        return [(0, width)]
    pieces = cuts(width, most)
    words = sum(
        dataclasses.replace(shape, out=(height, w)).block_words(config) + shape.taps
        for _, w in pieces
    )
    return pieces if words < shape.block_words(config) else [(0, width)]


# Whole images, before they are cut into regions --------------------------------------------------


def window_image_cycles(
    shape: WindowShape, op: WindowOp, channels: int, batch: int, config: Config
) -> int:
    """WINDOW's cycles for whole images. If input and output fit in the scratchpad, they are cut
    into regions as the planner cuts resident images; rows between two regions are read twice."""
    h, w = shape.out
    blocks = layout.blocks_of(channels, config.rows)
    rows = h
    if blocks * (math.prod(shape.region) + shape.pixels) <= config.scratchpad_words:
        rows = max(1, EARLY_REGION["window"] // w)
    regions = (
        WindowShape(kernel=shape.kernel, stride=shape.stride, dilation=shape.dilation, out=(n, w))
        for _, n in cuts(h, rows)
    )
    return batch * sum(window_cycles(region, op, blocks, config) for region in regions)


# Stages ------------------------------------------------------------------------------------------


def work(stage: Stage, plan: StagePlan, on_chip: set[str], config: Config) -> Counter[Engine]:
    """Cycles that each engine is busy with a stage, about. ``on_chip``: tensors that are not
    moved."""
    out: Counter[Engine] = Counter()
    for region in plan.regions:
        out.update(_transfers(stage, region, on_chip, config))
        if isinstance(stage, ArrayStage):
            out.update(_array(stage, region, config))
        elif isinstance(stage, VectorStage):
            out[Engine.POST] += _vector(stage, region, config)
        elif isinstance(stage, WindowStage):
            shape = window_shape(stage, region)
            out[Engine.WINDOW] += window_cycles(shape, stage.window_op, stage.groups, config)
        elif isinstance(stage, RowStage):
            out[Engine.WINDOW] += _rows(stage, region, config)
        else:
            # A byte at a time.
            out[Engine.WINDOW] += region.pixels * stage.blocks * config.rows
    if isinstance(stage, ArrayStage) and stage.fold is not None:
        out[Engine.WINDOW] += _gathering(stage, stage.fold, config)
    return out


def _transfers(stage: Stage, region: Region, on_chip: set[str], config: Config) -> Counter[Engine]:
    """A region's input and output, in cycles of the bus."""
    beats = max(1, config.vector_bytes // config.beat_bytes)
    out: Counter[Engine] = Counter()
    for source in stage.sources:
        if source.tensor not in on_chip:
            words = math.prod(input_extent(source, region)[2:]) * source.blocks
            out[Engine.LOAD] += words * beats
    if stage.op.output not in on_chip:
        words = math.prod(output_extent(stage, region)[2:]) * stage.blocks
        out[Engine.STORE] += words * beats
    return out


def _array(stage: ArrayStage, region: Region, config: Config) -> Counter[Engine]:
    """Convolutions of a region, tile by tile."""
    out: Counter[Engine] = Counter()
    weight_tiles = _weight_tiles(stage)
    for tile in tiles(region, config):
        out[Engine.CONV] += array_cycles(tile.pixels, weight_tiles, config)
        out[Engine.POST] += len(stage.phases) * post_cycles(tile.pixels, stage.channels, config)
    return out


def _weight_tiles(stage: ArrayStage) -> int:
    """Weight tiles of all phases and columns."""
    return sum(
        run.blocks * math.prod(each.geometry.kernel)
        for phase in stage.phases
        for each in phase.passes
        for column in each.runs
        for run in column
    )


def _vector(stage: VectorStage, region: Region, config: Config) -> int:
    """POST's cycles from the scratchpad for a region."""
    combine = stage.combine
    reads = timing.post_group_reads(
        region.pixels,
        op=PostOp.NONE if combine is None else combine.op,
        keeps_operand=stage.sources[-1].broadcast,
    )
    return reads * stage.blocks * config.word_groups


def _rows(stage: RowStage, region: Region, config: Config) -> int:
    """WINDOW's cycles for the rows of a region."""
    command = dict(op=stage.row_op, blocks=stage.blocks, features=stage.channels)
    command["masked"] = len(stage.sources) - 1
    return region.h * sum(
        timing.row_cycles({**command, "out_w": positions}, config) + WINDOW_COMMAND
        for _, positions in cuts(region.w, ROW_POSITIONS)
    )


def window_shape(stage: WindowStage, region: Region) -> WindowShape:
    """The window that a stage slides over a region."""
    (g,) = stage.sources[0].geometries
    return WindowShape(
        kernel=g.kernel, stride=g.strides, dilation=g.dilations, out=(region.h, region.w)
    )


def _gathering(stage: ArrayStage, fold: Fold, config: Config) -> int:
    """WINDOW's cycles to gather a folded stage's packed input with IM2COL, estimated high: each run
    reads its words anew, and a run that starts anywhere in a word takes one more now and then.

    IM2COL holds words from one run to the next, so that alone it takes a third less. But next to
    CONV in a chain it loses more than its share: counted exactly, MobileNetV3-Small at 16x16 fuses
    its first two stages and takes 490,954 instead of 473,253 cycles."""
    rows = stage.sources[0].h if fold.by_row else stage.h * fold.geometry.kernel[0]
    words = (fold.run + config.rows - 1) / config.rows
    return int(stage.batch * rows * stage.w * fold.runs * words)
