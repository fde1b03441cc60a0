"""Array stages: tiles of CONV commands, each followed by POST."""

from __future__ import annotations

from collections.abc import Mapping

from systole.sw.compiler.emission.activations import ActivationMover
from systole.sw.compiler.emission.context import EmissionContext, OutputGroup
from systole.sw.compiler.emission.convolution import ConvolutionEmitter
from systole.sw.compiler.emission.post import PostEmitter
from systole.sw.compiler.emission.products import ProductEmitter
from systole.sw.compiler.emission.tiles import ArrayTile
from systole.sw.compiler.emission.views import BufferView
from systole.sw.compiler.emission.weights import WeightLoader
from systole.sw.compiler.regions import Region, tiles
from systole.sw.compiler.stages import ArrayStage, Phase


class ArrayEmitter:
    """Emits array stages; CONV and POST take the halves of the accumulators in turn."""

    def __init__(self, context: EmissionContext, activations: ActivationMover, post: PostEmitter):
        self.context = context
        self.post = post
        weights = WeightLoader(context)
        self.convolution = ConvolutionEmitter(context, activations, weights)
        self.product = ProductEmitter(context, weights)
        self._half = 0

    def preload(self, i: int, stage: ArrayStage, region: Region) -> None:
        """Load the first weights of a stage, before anything that may have to wait for space."""
        first = next(tiles(region, self.context.config))
        tile = ArrayTile(index=i, stage=stage, phase=0, column=0, region=first, half=self._half)
        self.convolution.preload(tile)

    def group(self, group: OutputGroup, stage: ArrayStage, views: Mapping[int, BufferView]) -> None:
        """The group's column blocks, phase by phase, tile by tile."""
        config = self.context.config
        per_group = config.rows // config.lanes
        total = -(-stage.channels // config.cols)
        columns = range(group.group * per_group, min((group.group + 1) * per_group, total))
        for number, phase in enumerate(stage.phases):
            region = _of_phase(stage, phase, group.region)
            if region.h <= 0 or region.w <= 0:
                continue
            parts = list(tiles(region, config))
            for column in columns:
                for part in parts:
                    self._half ^= 1
                    tile = ArrayTile(
                        index=group.index,
                        stage=stage,
                        phase=number,
                        column=column,
                        region=part,
                        half=self._half,
                    )
                    if stage.product is not None:
                        self.product.emit(tile, stage.product, views[0])
                    else:
                        self.convolution.emit(tile, views)
                    self.post.requantise(tile, group, views)


def _of_phase(stage: ArrayStage, phase: Phase, region: Region) -> Region:
    """The outputs of a region that a phase makes: beyond the output's edge, one row or column
    less."""
    rows = -(-(stage.out_h - phase.y) // stage.steps[0]) - region.y
    columns = -(-(stage.out_w - phase.x) // stage.steps[1]) - region.x
    return region._replace(h=min(region.h, rows), w=min(region.w, columns))
