"""Lowering of products of activations and of transposition.

MatMul is an array stage whose weights are the right operand's words in DRAM: features are the lanes
of a word, so that the words of a block are the rows of a matrix, ``cols`` columns wide. It takes a
square array, and matrices that begin with a word:

* The left operand's may begin in any lane: zeros before the matrix' first row shift it.
* The right operand's that begin within a word are moved first, to a tensor that has every matrix by
  itself, by a permutation as Select's; results that end within a word likewise, behind.
"""

from __future__ import annotations

import copy
import dataclasses

import numpy as np

from systole.isa import Config
from systole.sw.compiler.stages import (
    MAX_DIM,
    POINTWISE,
    Phase,
    Product,
    Requant,
    Source,
    Spread,
    Stage,
)
from systole.sw.ir import layout
from systole.sw.ir.graph import (
    Activation,
    Graph,
    MatMul,
    Matrices,
    ModelError,
    Op,
    Pick,
    Select,
    Table,
    Transpose,
)

MAX_TAPS = 63
"""Columns of a window: the bytes of a word that a transposition gathers."""


def _summands(value: int) -> tuple[int, ...]:
    """int8 numbers, none zero, that add up to ``value`` (-127..128)."""
    parts = (value,) if value < 128 else (64, 64)
    return tuple(p for p in parts if p)


class ProductLowering:
    """The part of :class:`~sw.compiler.lowering.Lowering` for these operators."""

    graph: Graph
    config: Config

    def _params(self, op: Op, bias: np.ndarray, scale: np.ndarray, lanes: int) -> np.ndarray: ...

    def _table(self, values: np.ndarray | None) -> np.ndarray | None: ...

    def _requant(self, op: Op, activation: Activation | None) -> Requant: ...

    def _select(self, layer: int, op: Select) -> Stage: ...

    def _lower(self, layer: int, op: Op) -> Stage: ...

    def _in_one(
        self, shape: tuple[int, ...], size: tuple[int, int]
    ) -> tuple[tuple[int, int, int, int], int]: ...

    def _spread(self, operand: Matrices, channels: int) -> Spread:
        """Where the matrices of an operand lie, ``channels`` wide."""
        rows = self.config.rows
        n, c, h, w = self.graph.tensors[operand.tensor].shape
        blocks = layout.blocks_of(c, rows)
        image, channel, position = operand.places.T
        starts = (image * blocks + channel // rows) * (h * w) + position
        counts = -(-(channel % rows + channels) // rows)
        return Spread(tuple(starts.tolist()), tuple(counts.tolist()), h * w, n * blocks * h * w)

    def _product(self, layer: int, op: MatMul) -> list[Stage]:
        config, rows = self.config, self.config.rows
        if config.rows != config.cols:
            raise ModelError(
                f"node {op.name}: a product of two activations needs a square array; this one has "
                f"{config.rows} rows and {config.cols} columns"
            )
        if (op.b.places[:, 1] % rows).any():
            moved, others, b = self._apart(layer, op)
            return [moved, *others._product(layer, dataclasses.replace(op, b=b))]
        before, complement = [], None
        if self.graph.tensors[op.a.tensor].zero == -128:
            complement = f"{op.output}:complement"
            before = [self._complement(layer, op, complement)]
        out = Matrices(op.output, op.places)
        if not (op.places[:, 1] % rows).any():
            spread = self._spread(out, op.columns)
            return [*before, self._matrix_stage(layer, op, op.output, spread, complement)]
        name = f"{op.output}:apart"
        stage = self._matrix_stage(layer, op, name, None, complement)
        return [*before, stage, self._joined(layer, op, name)]

    def _complement(self, layer: int, op: MatMul, name: str) -> Stage:
        """The stage that makes -1 - w of the right operand's w: times -128 that is 128 * w + 128,
        and 128 is no int8."""
        values = (-1 - np.arange(-128, 128)).astype(np.int8)
        table = Table(op.name, op.op_type, name, -128, 127, x=op.b.tensor, values=values)
        tensors = self.graph.tensors
        made = dataclasses.replace(tensors[op.b.tensor], name=name)
        stage = self._knowing({**tensors, name: made})._lower(layer, table)
        return dataclasses.replace(stage, striped=False)

    def _matrix_stage(
        self, layer: int, op: MatMul, output: str, spread: Spread | None, complement: str | None
    ) -> Stage:
        """The product, its result in ``output``."""
        rows, tensors = self.config.rows, self.graph.tensors
        za, zb = tensors[op.a.tensor].zero, tensors[op.b.tensor].zero
        positions = op.rows
        a = self._spread(op.a, op.depth)
        lanes = op.a.places[:, 1] % rows
        weights = [np.zeros((rows, rows), np.int8)]
        zeros = {}
        for lane, blocks in sorted(set(zip(lanes.tolist(), a.blocks))):
            offsets = []
            for value in _summands(-zb):
                offsets.append(sum(map(len, weights)))
                constant = np.zeros((blocks * rows, rows), np.int8)
                constant[lane : lane + op.depth] = value
                weights.append(constant)
            zeros[lane] = tuple(offsets)
        scale = np.full(op.columns, op.scale, np.float32)
        # Minus what a complement adds beside the product with the zero point.
        bias = np.full(op.columns, op.depth * (za * zb - 128 * bool(complement)), np.int64)
        source = Source(op.a.tensor, 1, positions, max(a.blocks), (POINTWISE,), za, False, spread=a)
        return Stage(
            layer,
            dataclasses.replace(op, output=output),
            "array",
            op.batch,
            1,
            positions,
            1,
            positions,
            op.columns,
            layout.blocks_of(op.columns, rows),
            1,
            (source,),
            phases=(Phase(0, 0, (), 0),),
            requant=self._requant(op, op.activation),
            weights=np.concatenate(weights),
            params=self._params(op, bias, scale, self.config.lanes),
            table=self._table(op.activation.values if op.activation else None),
            striped=False,
            product=Product(
                op.b.tensor,
                complement,
                self._spread(op.b, op.columns),
                op.depth,
                tuple(lanes.tolist()),
                (za,) if complement else _summands(-za),
                zeros,
            ),
            spread=spread,
        )

    # Moving whole matrices -----------------------------------------------------------------------

    def _apart(self, layer: int, op: MatMul) -> tuple[Stage, ProductLowering, Matrices]:
        """The right operand with every matrix by itself: the stage that moves it, the lowering that
        knows the new tensor, and where the matrices are there.

        The new tensor's words are those of an image one block deep, a row for every block of every
        matrix."""
        rows, source = self.config.rows, self.graph.tensors[op.b.tensor]
        places, which = np.unique(op.b.places, axis=0, return_inverse=True)
        blocks = layout.blocks_of(op.columns, rows)
        name = f"{op.output}:operand"
        seen, per_image = self._in_one(source.shape, (1, source.shape[2] * source.shape[3]))
        phases = []
        for n, c, p in places.tolist():
            for first in range(0, op.columns, rows):
                channels = np.full(rows, -1)
                count = min(rows, op.columns - first)
                channels[:count] = n * per_image + c + first + np.arange(count)
                phases.append([Pick(op.b.tensor, channels, offsets=(0, p))])
        shape = (1, rows, len(phases), op.depth)
        moved = self._moving(layer, op, name, phases, (len(phases), 1), source.zero, seen, shape)
        made = dataclasses.replace(
            source, name=name, shape=(len(places), blocks * rows, 1, op.depth)
        )
        tensors = {**self.graph.tensors, name: made}
        where = np.zeros((op.batch, 3), np.int64)
        where[:, 0] = which.reshape(-1)
        return moved, self._knowing(tensors), Matrices(name, where)

    def _joined(self, layer: int, op: MatMul, name: str) -> Stage:
        """The stage that brings results from ``name``, every matrix by itself, side by side."""
        rows, out = self.config.rows, self.graph.tensors[op.output]
        blocks = layout.blocks_of(op.columns, rows)
        height = out.shape[2] * out.shape[3] // op.rows
        shape, per_image = self._in_one(out.shape, (height, op.rows))
        phases: list[list[Pick]] = [[] for _ in range(height)]
        for i, (n, c, p) in enumerate(op.places.tolist()):
            for block in range(blocks):
                channels = np.full(shape[1], -1)
                count = min(rows, op.columns - block * rows)
                first = n * per_image + c + block * rows
                channels[first : first + count] = np.arange(count)
                pick = Pick(name, channels, offsets=(i * blocks + block, 0))
                phases[p // op.rows].append(pick)
        seen = (1, rows, op.batch * blocks, op.rows)
        return self._moving(layer, op, op.output, phases, (height, 1), out.zero, seen, shape)

    def _moving(
        self,
        layer: int,
        op: MatMul,
        output: str,
        phases: list[list[Pick]],
        steps: tuple[int, int],
        zero: int,
        seen: tuple[int, int, int, int],
        shape: tuple[int, int, int, int],
    ) -> Stage:
        """A Select of one tensor, seen with another shape, to ``output``; all of zero point
        ``zero``."""
        name = phases[0][0].x
        size = max(*seen[2:], *shape[2:])
        if size > MAX_DIM:
            raise ModelError(
                f"node {op.name}: its matrices do not begin with a word, and to move them takes an "
                f"image of {size} rows or columns: {MAX_DIM} is the limit"
            )
        like = dataclasses.replace(self.graph.tensors[op.output], zero=zero)
        tensors = {
            name: dataclasses.replace(like, name=name, shape=seen),
            output: dataclasses.replace(like, name=output, shape=shape),
        }
        select = Select(
            op.name, op.op_type, output, -128, 127, phases=phases, steps=steps, fill=zero
        )
        stage = self._knowing(tensors)._select(layer, select)
        return dataclasses.replace(stage, striped=False)

    def _knowing(self, tensors: dict) -> ProductLowering:
        other = copy.copy(self)
        other.graph = dataclasses.replace(self.graph, tensors=tensors)
        return other

    # Transposition -------------------------------------------------------------------------------

    def _transpose(self, layer: int, op: Transpose) -> Stage:
        config = self.config
        if not config.window or config.rows > MAX_TAPS:
            raise ModelError(
                f"node {op.name}: Transpose of channels and positions needs the window engine "
                f"(window = true) and at most {MAX_TAPS} rows; this array has {config.rows}"
            )
        x = self.graph.tensors[op.x]
        n, c, h, w = x.shape
        blocks = layout.blocks_of(c, config.rows)
        source = Source(op.x, 1, h * w, blocks, (POINTWISE,), x.zero, True)
        return Stage(
            layer,
            op,
            "transpose",
            n,
            1,
            c,
            1,
            c,
            h * w,
            layout.blocks_of(h * w, config.rows),
            MAX_TAPS // config.rows,
            (source,),
            striped=False,
        )
