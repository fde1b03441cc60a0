"""Emission: the planned stages as commands.

:class:`ProgramEmitter` goes through the regions in the plan's order. Emitters of its own do the
rest, each for one kind of command or stage, over one common :class:`~.context.EmissionContext`:

* ``activations``: loads, stores and scratchpad addresses of tensors (``transfers``, ``views``).
* ``array``: tiles of ``convolution`` or ``products``, their ``weights``, and ``post``.
* ``folding``, ``window``, ``row``, ``transposition``: the commands of the window engine.
"""

from __future__ import annotations

from systole.sw.compiler.emission.activations import ActivationMover
from systole.sw.compiler.emission.array import ArrayEmitter
from systole.sw.compiler.emission.context import EmissionContext, StageConstants
from systole.sw.compiler.emission.folding import FoldEmitter
from systole.sw.compiler.emission.post import PostEmitter
from systole.sw.compiler.emission.row import RowEmitter
from systole.sw.compiler.emission.transfers import load_fixed
from systole.sw.compiler.emission.transposition import TransposeEmitter
from systole.sw.compiler.emission.views import BufferView
from systole.sw.compiler.emission.window import WindowEmitter
from systole.sw.compiler.regions import Region
from systole.sw.compiler.stages import (
    ArrayStage,
    RowStage,
    Stage,
    TransposeStage,
    VectorStage,
    WindowStage,
)

__all__ = ["EmissionContext", "ProgramEmitter", "StageConstants"]


class ProgramEmitter:
    """Emits all stages of a plan into its command stream."""

    def __init__(self, context: EmissionContext):
        self.context = context
        self.post = PostEmitter(context)
        self.activations = ActivationMover(context, self.post)
        self.array = ArrayEmitter(context, self.activations, self.post)
        self.fold = FoldEmitter(context, self.activations)
        self.window = WindowEmitter(context)
        self.row = RowEmitter(context)
        self.transpose = TransposeEmitter(context, self.activations)
        self._ahead: dict[int, dict[int, BufferView]] = {}
        """By stage, the inputs of its next region that have been asked for."""

    def emit(self) -> None:
        """Emit all regions in the plan's order."""
        for i, r in self.context.plan.order:
            if r == 0:
                self._begin(i)
            self._emit_region(i, r)

    def _begin(self, i: int) -> None:
        """Ask for what a stage needs before its first region."""
        stage, plan = self.context.stages[i], self.context.plan.stages[i]
        self.activations.load_resident_inputs(i)
        if isinstance(stage, ArrayStage) and plan.split is None:
            self.array.preload(i, stage, plan.regions[0])
        load_fixed(self.context, i)

    def _emit_region(self, i: int, r: int) -> None:
        """Group by group; the next region's inputs are asked for behind the first, when the queues
        hold work enough to hide it."""
        context = self.context
        stage, plan, chain = context.stages[i], context.plan.stages[i], context.plan.chain[i]
        region = plan.regions[r]
        if isinstance(stage, TransposeStage):
            self.transpose.region(i, stage, region)
            return
        if stage.op.output in context.plan.rolls:
            self.activations.slide(i, r % chain.stripes)
        whole = plan.split is None and bool(stage.whole_sources)
        views = self._ahead.pop(i, {})
        if whole and not views:
            views = self._prepare(i, stage, region)
        for number in range(stage.groups):
            for k, source in enumerate(stage.sources):
                if source.per_group:
                    views[k] = self.activations.input(i, k, region, number)
            group = self.activations.output(i, region, number)
            match stage:
                case ArrayStage():
                    self.array.group(group, stage, views)
                case WindowStage():
                    self.window.group(group, stage, views[0])
                case RowStage():
                    self.row.group(group, stage, views)
                case VectorStage():
                    self.post.vector(group, stage, views)
            self.activations.store(group)
            if number == 0 and whole and r + 1 < len(plan.regions) and self._may_prepare(i):
                self._ahead[i] = self._prepare(i, stage, plan.regions[r + 1])

    def _may_prepare(self, i: int) -> bool:
        """The inputs of a stage's next region can be loaded while groups of this one are still to
        come: their buffers have two copies, and no stage of the same chain computes them."""
        plan, stages = self.context.plan, self.context.stages
        sources, buffers = stages[i].whole_sources, plan.stages[i].buffers
        within = {stages[k].op.output for k in plan.chain[i].stages}
        if any(source.tensor in within for _, source in sources):
            return False
        return all(
            buffers[k].copies > 1 for k in ("im2col", *(k for k, _ in sources)) if k in buffers
        )

    def _prepare(self, i: int, stage: Stage, region: Region) -> dict[int, BufferView]:
        """The sources that a region reads whole, in the scratchpad; folded: their im2col."""
        views = {k: self.activations.input(i, k, region) for k, _ in stage.whole_sources}
        if isinstance(stage, ArrayStage) and stage.fold is not None:
            views[0] = self.fold.gather(i, stage, region, views[0])
        return views
