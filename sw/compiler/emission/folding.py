"""WINDOW IM2COL commands that gather a folded stage's input for the array."""

from __future__ import annotations

from dataclasses import replace

from systole.isa import Opcode, WindowOp
from systole.sw.compiler.emission import fields
from systole.sw.compiler.emission.activations import ActivationMover
from systole.sw.compiler.emission.context import EmissionContext
from systole.sw.compiler.emission.views import BufferView
from systole.sw.compiler.plan import CopyKey
from systole.sw.compiler.regions import Extent, Region, input_extent
from systole.sw.compiler.stages import ArrayStage, Fold, Geometry


class FoldEmitter:
    """Gathers packed inputs into reduction words."""

    def __init__(self, context: EmissionContext, activations: ActivationMover):
        self.context = context
        self.activations = activations
        self._gathered: dict[int, tuple[int, int]] = {}
        """By stage, the rows that are held: first and end."""

    def gather(self, i: int, stage: ArrayStage, region: Region, view: BufferView) -> BufferView:
        """Gather what a region needs of the input in ``view``; the view of the gathered words."""
        fold = stage.fold
        assert fold is not None
        if fold.by_row:
            return self._gather_rows(i, stage, region, view)
        out = BufferView.of(self.activations.slot("im2col", i), region.extent)
        g = fold.geometry
        window = replace(g, pads=(g.pads[0] - region.y * g.strides[0], g.pads[1]))
        self._im2col(i, fold, window, view, out)
        return out

    def _gather_rows(
        self, i: int, stage: ArrayStage, region: Region, view: BufferView
    ) -> BufferView:
        """Gather the input rows that the region needs and that are not held yet, each for a kernel
        one row high; the view of the gathered rows, which slide through their buffer."""
        source, fold, plan = stage.sources[0], stage.fold, self.context.plan
        assert fold is not None
        g, w = fold.geometry, stage.w
        base = plan.addresses[CopyKey("im2col", i, 0)]
        rows = plan.stages[i].buffers["im2col"].words // (w * fold.words)
        y, _, count, _ = input_extent(source, region)
        origin, first = self._gathered.get(i, (0, 0))
        if region.y == 0 or y + count - origin > rows:
            origin = first = y
        self._gathered[i] = origin, y + count
        # Of the buffer, only what is held: the rest must not count as padding.
        start = base + (y - origin) * w
        out = BufferView(base=start, pitch=w, block=rows * w, y=y, h=count, w=w)
        first = max(first, y)
        if first < y + count:
            part = out._replace(base=out.at(first, 0), y=first, h=y + count - first)
            window = Geometry(
                (1, g.kernel[1]), (1, g.strides[1]), (-first, g.pads[1]), (1, g.dilations[1])
            )
            self._im2col(i, fold, window, view, part)
        return out

    def _im2col(self, i: int, fold: Fold, g: Geometry, view: BufferView, out: BufferView) -> None:
        """Gather all of ``out``. ``g``: the window; its row padding is that of ``out``, so that row
        0 of the window is row ``-pads[0]`` of the input."""
        source = self.context.stages[i].sources[0]
        values = fields.window(
            op=WindowOp.IM2COL,
            blocks=1,
            run=fold.run,
            src=view.base,
            src_pitch=view.pitch,
            in_w=fold.in_w,
            in_h=view.h,
            x0=(out.x * g.strides[1] - g.pads[1]) * fold.channels,
            y0=-g.pads[0] - view.y,
            out_w=out.w,
            out_h=out.h,
            kernel_w=fold.runs,
            kernel_h=g.kernel[0],
            stride_x=g.strides[1] * fold.channels,
            stride_y=g.strides[0],
            dilation_x=g.dilations[1] * fold.channels,
            dilation_y=g.dilations[0],
            pad=source.zero,
            out=out.base,
            out_pitch=out.pitch,
            out_block=out.block,
        )
        y, end = g.span(0, 0, out.h, source.h)
        read = view.words(Extent(y, view.x, end - y, view.w))
        written = out.words(out.extent, blocks=fold.words)
        self.context.stream.emit(Opcode.WINDOW, values, [read], [written], stage=i)
