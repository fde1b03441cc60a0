"""WINDOW commands of depthwise convolution and pooling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from systole.isa import Opcode
from systole.sw.compiler.costs import window_columns, window_shape
from systole.sw.compiler.emission import fields
from systole.sw.compiler.emission.context import EmissionContext, OutputGroup
from systole.sw.compiler.emission.views import BufferView
from systole.sw.compiler.regions import Region, input_extent
from systole.sw.compiler.stages import WindowStage
from systole.sw.compiler.stream import StreamMemory, run


class WindowEmitter:
    """Emits the WINDOW commands of window stages."""

    def __init__(self, context: EmissionContext):
        self.context = context

    def group(self, group: OutputGroup, stage: WindowStage, x: BufferView) -> None:
        """One output group: a command for every part of its region with the same parameters."""
        params = None if stage.params is None else self.context.fixed_word(group.index, "params")
        for part, number in self._parts(group, stage):
            word = None
            if params is not None:
                word = params + number * self.context.config.window_param_words
            for first, w in window_columns(window_shape(stage, part), self.context.config):
                piece = part._replace(x=part.x + first, w=w)
                self._command(replace(group, region=piece), stage, x, word)

    def _parts(self, group: OutputGroup, stage: WindowStage) -> Iterator[tuple[Region, int]]:
        """Parts of the region, each with the number of its parameter set."""
        region, bands = group.region, stage.bands
        if bands is None:
            words = self.context.config.window_param_words
            count = 1 if stage.params is None else len(stage.params) // words
            yield region, group.group % count
            return
        for y, h in _runs(bands.rows, region.y, region.h):
            for x, w in _runs(bands.columns, region.x, region.w):
                number = bands.sets[bands.rows[y], bands.columns[x]]
                yield Region(region.n, y, x, h, w), int(number)

    def _command(
        self, group: OutputGroup, stage: WindowStage, x: BufferView, params: int | None
    ) -> None:
        """One command; ``params``: scratchpad word of the parameters, if there are any."""
        source, region, out = stage.sources[0], group.region, group.out
        (g,) = source.geometries
        y0 = region.y * g.strides[0] - g.pads[0] - x.y
        x0 = region.x * g.strides[1] - g.pads[1] - x.x
        values = fields.window(
            op=stage.window_op,
            blocks=1,
            src=x.base,
            src_pitch=x.pitch,
            src_block=x.block,
            pad=source.zero,
            out_w=region.w,
            out_h=region.h,
            out=out.at(region.y, region.x),
            out_pitch=out.pitch,
            out_block=out.block,
            **fields.sliding(replace(g, pads=(-y0, -x0)), x),
            **fields.requantisation(stage.requant),
        )
        reads = [x.words(input_extent(source, region))]
        if params is not None:
            values |= fields.window(params=params)
            words = self.context.config.window_param_words
            reads.append(run(StreamMemory.SCRATCHPAD, params, words))
        if stage.window_weights is not None:
            taps = g.kernel[0] * g.kernel[1]
            weights = self.context.fixed_word(group.index, "window_weights") + group.group * taps
            values |= fields.window(weights=weights, weight_zero=stage.weight_zero)
            reads.append(run(StreamMemory.SCRATCHPAD, weights, taps))
        written = out.words(region.extent)
        self.context.stream.emit(Opcode.WINDOW, values, reads, [written], stage=group.index)


def _runs(kinds: np.ndarray, first: int, count: int) -> list[tuple[int, int]]:
    """Start and length of the runs of equal ``kinds`` within ``count`` from ``first``."""
    ends = np.flatnonzero(np.diff(kinds[first : first + count])) + 1
    edges = [0, *ends.tolist(), count]
    return [(first + a, b - a) for a, b in zip(edges, edges[1:])]
