"""Lowering: each operator of the graph becomes a stage with the constants its engines read.

Tensors that only join others are left out before (:mod:`~sw.compiler.joins`). Cases, in order:

1. Conv, depthwise, int8 weights, no addition, window engine present: WINDOW; a fused
   function is then a stage of its own, POST from the scratchpad.
2. Conv on a packed graph input: WINDOW IM2COL, then CONV over the folded reduction, then POST.
3. Any other Conv (groups spread out, blocks of zero weights left out; weights beyond int8 as the
   sum of two passes): CONV, then POST.
4. ConvTranspose: one phase of plain convolution for each output position modulo the stride.
5. Select: convolutions by permutation matrices.
6. Pool: WINDOW, MAX or SUM.
7. Binary, Table: POST from the scratchpad.
8. MatMul, Transpose: see :mod:`~sw.compiler.products`.

A stage whose geometry is pointwise sees its images flattened to one row.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np

from systole.isa import Config, PostOp, WindowOp
from systole.isa.numerics import lookup, split_ratios, split_scale
from systole.sw.compiler.joins import Made, join, windowed
from systole.sw.compiler.products import ProductLowering
from systole.sw.compiler.stages import (
    MAX_DIM,
    POINTWISE,
    Combine,
    Fold,
    Geometry,
    Pass,
    Phase,
    Requant,
    Source,
    Stage,
    WeightRun,
)
from systole.sw.ir import layout
from systole.sw.ir.graph import (
    Activation,
    Binary,
    Conv,
    ConvTranspose,
    Graph,
    MatMul,
    ModelError,
    Op,
    Pick,
    Pool,
    Select,
    Table,
    Transpose,
)
from systole.sw.simulate.cycles import im2col_row_cycles

MAX_KERNEL = 63
BINARY_OPS = {"add": PostOp.ADD, "sub": PostOp.SUB, "mul": PostOp.MUL}


def _flat(h: int, w: int, geometries: list[Geometry]) -> tuple[int, int]:
    """One row, where every geometry is pointwise and the row is not too long for 16 bits."""
    if all(g == POINTWISE for g in geometries) and h * w <= MAX_DIM:
        return 1, h * w
    return h, w


def _foldable(op: Op, name: str, graph: Graph, config: Config) -> bool:
    """The operator could read tensor ``name`` packed, and gains from it."""
    if not isinstance(op, Conv) or op.group != 1 or op.x != name:
        return False
    if name in op.inputs[1:]:
        return False
    channels = graph.tensors[name].shape[1]
    kh, kw = op.weights.shape[2:]
    run = kw * channels if op.dilations[1] == 1 else channels
    words = layout.blocks_of(kh * kw * channels, config.rows)
    return (
        words < kh * kw * layout.blocks_of(channels, config.rows)
        and run <= 255
        and channels * max(op.strides[1], op.dilations[1]) <= 255
        and channels * graph.tensors[name].shape[3] <= MAX_DIM
        and words <= 4095
    )


def packed_inputs(graph: Graph, config: Config) -> set[str]:
    """Graph inputs that are kept packed: all their consumers fold them."""
    if not config.window:
        return set()
    outputs = {p.tensor for p in graph.outputs}
    return {
        p.tensor
        for p in graph.inputs
        if p.tensor not in outputs
        and all(_foldable(op, p.tensor, graph, config) for op in graph.ops if p.tensor in op.inputs)
    }


def _dense(op: Conv) -> np.ndarray:
    """The kernel with groups spread out: (O, C, kh, kw)."""
    if op.group == 1:
        return op.weights
    o, c = op.weights.shape[:2]
    per = o // op.group
    out = np.zeros((o, c * op.group, *op.weights.shape[2:]), op.weights.dtype)
    for g in range(op.group):
        out[g * per : (g + 1) * per, g * c : (g + 1) * c] = op.weights[g * per : (g + 1) * per]
    return out


def _int8_parts(weights: np.ndarray) -> list[np.ndarray]:
    """int8 kernels that add up to ``weights``."""
    parts = []
    while not parts or weights.any():
        part = np.clip(weights, -128, 127)
        parts.append(part.astype(np.int8))
        weights = weights - part
    return parts


class WeightStore:
    """Collects the weight tiles of a stage, blocks of zeros left out."""

    def __init__(self, config: Config):
        self.config = config
        self._words = 0
        self._data: list[np.ndarray] = []

    def runs(self, kernels: list[np.ndarray]) -> list[tuple[tuple[WeightRun, ...], ...]]:
        """Add the kernels (O, C, kh, kw) of a phase, column block by column block; by kernel, its
        runs by column block. Each column block has one of some kernel, if only of zeros."""
        packed = [layout.pack_weights(weights, self.config) for weights in kernels]
        used = [p.reshape(*p.shape[:2], -1).any(2) for p in packed]
        used[0][~np.any([u.any(1) for u in used], axis=0), 0] = True
        out: list[list[tuple[WeightRun, ...]]] = [[] for _ in kernels]
        for column in range(len(packed[0])):
            for k, tiles in enumerate(packed):
                edges = np.flatnonzero(np.diff(np.r_[False, used[k][column], False].astype(int)))
                runs = []
                for first, end in edges.reshape(-1, 2).tolist():
                    words = tiles[column, first:end].reshape(-1, self.config.cols)
                    runs.append(WeightRun(first, end - first, self._words))
                    self._data.append(words)
                    self._words += len(words)
                out[k].append(tuple(runs))
        return [tuple(runs) for runs in out]

    def words(self) -> np.ndarray:
        """All tiles, (words, cols)."""
        return np.concatenate(self._data)


class Lowering(ProductLowering):
    """Lowers a graph for a configuration."""

    def __init__(self, graph: Graph, config: Config):
        self.config = config
        self.packed = packed_inputs(graph, config)
        self.joined = join(graph, config)
        self.graph = self.joined.graph
        """With the tensors that only the program has."""

    def stages(self) -> list[Stage]:
        """Raises :class:`ModelError` for what the configuration's engines cannot do."""
        out: list[Stage] = []
        for op in self.graph.ops:
            self._check_limits(op)
        for i, op in self.joined.ops:
            if isinstance(op, MatMul):
                out += self._product(i, op)
            elif self._on_window(op) and op.activation is not None:
                out += self._activated_depthwise(i, op)
            else:
                out.append(self._lower(i, op))
            if op.output in self.joined.made:
                out[-1] = self._with_table(out[-1], self.joined.made[op.output])
        return out

    def _with_table(self, stage: Stage, made: Made) -> Stage:
        """The stage as it makes a function of what it makes."""
        values = made.table
        if stage.table is not None:
            values = lookup(stage.table.reshape(-1)[:256], values)
        op = dataclasses.replace(stage.op, output=made.tensor)
        return dataclasses.replace(stage, op=op, table=self._table(values))

    def _lower(self, layer: int, op: Op) -> Stage:
        if self._on_window(op):
            return self._depthwise(layer, op)
        if isinstance(op, Conv):
            return self._conv(layer, op)
        if isinstance(op, ConvTranspose):
            return self._transposed(layer, op)
        if isinstance(op, Select):
            return self._select(layer, op)
        if isinstance(op, Transpose):
            return self._transpose(layer, op)
        if isinstance(op, Pool):
            return self._pool(layer, op)
        if isinstance(op, Binary):
            return self._binary(layer, op)
        assert isinstance(op, Table)
        values = np.clip(op.values, op.low, op.high)
        return self._vector(layer, op, (op.x,), Combine(PostOp.NONE), values)

    # Limits --------------------------------------------------------------------------------------

    def _check_limits(self, op: Op) -> None:
        for name in (*op.inputs, op.output):
            for what, size in zip(("height", "width"), self.graph.tensors[name].shape[2:]):
                if size > MAX_DIM:
                    raise ModelError(
                        f"node {op.name}: tensor {name}: {what} {size} exceeds {MAX_DIM}"
                    )
        if isinstance(op, Conv | Pool | ConvTranspose):
            if isinstance(op, Pool):
                kernel = op.window(self.graph.tensors[op.x].shape, MAX_KERNEL)
            else:
                kernel = op.weights.shape[2:]
            for what, values, limit in (
                ("kernel", kernel, MAX_KERNEL),
                ("strides", op.strides, 255),
                ("dilations", op.dilations, 255),
            ):
                if max(values) > limit:
                    raise ModelError(f"node {op.name}: {what} {tuple(values)} exceeds {limit}")

    def _split(self, op: Op, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        try:
            return split_scale(scale)
        except ValueError as e:
            raise ModelError(f"node {op.name}: {e}") from None

    def _ratios(self, op: Op, *ratios: float) -> tuple[tuple[int, ...], int]:
        try:
            return split_ratios(*ratios)
        except ValueError as e:
            raise ModelError(f"node {op.name}: {e}") from None

    # Parts ---------------------------------------------------------------------------------------

    def _source(
        self,
        name: str,
        geometries: list[Geometry],
        shape: tuple[int, int],
        per_group: bool,
    ) -> Source:
        t = self.graph.tensors[name]
        blocks = layout.blocks_of(t.shape[1], self.config.rows)
        return Source(name, *shape, blocks, tuple(geometries), t.zero, per_group)

    def _read(self, name: str, weights: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """The tensors that a kernel (O, C, kh, kw) over ``name`` reads, with their kernels."""
        parts = self.joined.parts.get(name)
        if parts is None:
            return [(name, weights)]
        out = []
        for part in parts:
            taken = np.flatnonzero(part.channels >= 0)
            channels = part.channels[taken]
            several = len(np.unique(channels)) < len(channels)
            size = (len(weights), self.graph.tensors[part.tensor].shape[1], *weights.shape[2:])
            kernel = np.zeros(size, np.int32 if several else weights.dtype)
            np.add.at(kernel, (slice(None), channels), weights[:, taken])
            out.append((part.tensor, kernel))
        return out

    def _params(self, op: Op, bias: np.ndarray, scale: np.ndarray, lanes: int) -> np.ndarray:
        multiplier, shift = self._split(op, scale)
        return layout.pack_params(bias, multiplier, shift, lanes, self.config.rows)

    def _table(self, values: np.ndarray | None) -> np.ndarray | None:
        if values is None:
            return None
        return layout.pad_axis(values.astype(np.int8), 0, self.config.rows).reshape(
            -1, self.config.rows
        )

    def _requant(self, op: Op, activation: Activation | None) -> Requant:
        """Zero point and clamps of the operator's own result."""
        zero = self.graph.tensors[op.output].zero if activation is None else activation.zero
        return Requant(zero, op.low, op.high)

    def _array(
        self,
        layer: int,
        op: Op,
        size: tuple[int, int],
        out_size: tuple[int, int],
        sources: tuple[Source, ...],
        phases: list[tuple[int, int, list[tuple[int, Geometry, np.ndarray]]]],
        params: np.ndarray,
        **rest,
    ) -> Stage:
        """An array stage; ``phases``: (y, x, passes of (source, geometry, kernel))."""
        config = self.config
        n, channels, _, _ = self.graph.tensors[op.output].shape
        store = WeightStore(config)
        per_phase = len(params) // len(phases)
        made = []
        for k, (y, x, passes) in enumerate(phases):
            runs = store.runs([weights for _, _, weights in passes])
            done = tuple(Pass(*each[:2], own) for each, own in zip(passes, runs))
            made.append(Phase(y, x, done, k * per_phase))
        return Stage(
            layer,
            op,
            "array",
            n,
            *size,
            *out_size,
            channels,
            layout.blocks_of(channels, config.rows),
            config.cols // config.lanes,
            sources,
            phases=tuple(made),
            weights=store.words(),
            params=params,
            **rest,
        )

    # Operators -----------------------------------------------------------------------------------

    def _conv(self, layer: int, op: Conv) -> Stage:
        config, graph = self.config, self.graph
        h, w = graph.tensors[op.output].shape[2:]
        x = graph.tensors[op.x]
        geometry = Geometry(op.weights.shape[2:], op.strides, op.pads[:2], op.dilations)
        weights, fold = _dense(op), None
        total = weights.reshape(len(weights), -1).sum(1, dtype=np.int64)
        if op.x in self.packed:
            fold = self._fold(op)
            pitch = layout.packed_pitch(x.shape[1], x.shape[3], config.rows)
            main = Source(op.x, x.shape[2], pitch, 1, (fold.geometry,), x.zero, False, packed=True)
            geometry = _row_geometry(geometry) if fold.by_row else POINTWISE
            mains, kernels = [main], [_folded(weights, fold)]
        else:
            out_hw = (h, w)
            h, w = _flat(h, w, [geometry])
            in_hw = x.shape[2:] if (h, w) == out_hw else (h, w)
            names, kernels = zip(*self._read(op.x, weights))
            mains = [self._source(name, [geometry], in_hw, False) for name in names]
        passes = [(k, geometry, part) for k, w in enumerate(kernels) for part in _int8_parts(w)]
        sources, combine = tuple(mains), None
        bias = op.bias.astype(np.int64) - x.zero * total
        if op.shortcut is not None:
            other, factors = op.shortcut.other, op.shortcut.factors
            sources = (*mains, self._source(other, [POINTWISE], (h, w), False))
            bias -= graph.tensors[other].zero * factors.astype(np.int64)
            parts = _int8_parts(np.diag(factors)[:, :, None, None])
            passes += [(len(mains), POINTWISE, part) for part in parts]
        params = self._params(op, bias, op.scale, config.lanes)
        requant = self._requant(op, op.activation)
        if op.residual is not None:
            r = op.residual
            sources = (*sources, self._source(r.other, [POINTWISE], (h, w), True))
            combine = self._add(op, requant, r.mid_zero, r.other, r.conv_ratio, r.other_ratio)
            requant = Requant(r.mid_zero, r.mid_low, r.mid_high)
        return self._array(
            layer,
            op,
            (h, w),
            (h, w),
            sources,
            [(0, 0, passes)],
            params,
            requant=requant,
            combine=combine,
            fold=fold,
            table=self._table(op.activation.values if op.activation else None),
        )

    def _fold(self, op: Conv) -> Fold:
        """Whole kernels, or kernel rows where that is faster: gathering and the array work at the
        same time, the slower one counts."""
        config = self.config
        _, channels, in_h, in_w = self.graph.tensors[op.x].shape
        h, w = self.graph.tensors[op.output].shape[2:]
        kh, kw = op.weights.shape[2:]
        dilation = op.dilations[1]
        runs, run = (1, channels * kw) if dilation == 1 else (kw, channels)
        columns = -(-len(op.weights) // config.cols)
        choices = []
        for by_row in (False, True):
            rows = 1 if by_row else kh
            words = layout.blocks_of(rows * runs * run, config.rows)
            held = 4 * (kh + op.strides[0]) * w * words
            if by_row and held > config.scratchpad_words // 3:
                continue
            steps = im2col_row_cycles(
                config,
                x0=-op.pads[1] * channels,
                stride_x=op.strides[1] * channels,
                dilation_x=dilation * channels,
                kernel_w=runs,
                kernel_h=rows,
                run=run,
                in_w=channels * in_w,
                out_w=w,
            )
            gather = steps * (in_h if by_row else h)
            array = h * w * words * columns * (kh if by_row else 1)
            geometry = Geometry((kh, kw), op.strides, op.pads[:2], op.dilations)
            fold = Fold(runs, run, geometry, channels, channels * in_w, words, by_row)
            choices.append((max(gather, array), gather + array, not by_row, fold))
        return min(choices)[-1]

    def _transposed(self, layer: int, op: ConvTranspose) -> Stage:
        """Output rows py + i * s take the kernel rows k = py + p (mod s), in reverse order."""
        x = self.graph.tensors[op.x]
        h, w = self.graph.tensors[op.output].shape[2:]
        sh, sw = op.strides
        rows = [_phase(op, 0, py) for py in range(min(sh, h))]
        columns = [_phase(op, 1, px) for px in range(min(sw, w))]
        names, kernels = zip(*self._read(op.x, op.weights))
        parts = [(k, part) for k, weights in enumerate(kernels) for part in _int8_parts(weights)]
        phases, geometries = [], []
        bias = []
        for py, (ky, pad_y, dilation_y) in enumerate(rows):
            for px, (kx, pad_x, dilation_x) in enumerate(columns):
                size = (max(len(ky), 1), max(len(kx), 1))
                geometry = Geometry(size, (1, 1), (pad_y, pad_x), (dilation_y, dilation_x))
                passes, total = [], np.zeros(len(op.weights), np.int64)
                for k, part in parts:
                    kernel = part[:, :, ky][:, :, :, kx]
                    if kernel.size == 0:  # no kernel element falls here: bias alone
                        kernel = np.zeros((*part.shape[:2], *size), np.int8)
                    total += kernel.reshape(len(kernel), -1).sum(1, dtype=np.int64)
                    passes.append((k, geometry, kernel))
                geometries.append(geometry)
                phases.append((py, px, passes))
                bias.append(op.bias.astype(np.int64) - x.zero * total)
        lanes = self.config.lanes
        params = np.concatenate([self._params(op, b, op.scale, lanes) for b in bias])
        return self._array(
            layer,
            op,
            (-(-h // sh), -(-w // sw)),
            (h, w),
            tuple(self._source(name, geometries, x.shape[2:], False) for name in names),
            phases,
            params,
            steps=op.strides,
            requant=self._requant(op, op.activation),
            table=self._table(op.activation.values if op.activation else None),
        )

    def _in_one(
        self, shape: tuple[int, ...], size: tuple[int, int]
    ) -> tuple[tuple[int, int, int, int], int]:
        """A tensor as a single image of ``size`` that has all its blocks side by side: its shape,
        and the channels that one image takes."""
        per_image = layout.blocks_of(shape[1], self.config.rows) * self.config.rows
        return (1, shape[0] * per_image, *size), per_image

    def _select_joined(self, layer: int, op: Select) -> Stage:
        tensors, seen = self.graph.tensors, {}
        places = {}
        for name in (*op.inputs, op.output):
            shape = tensors[name].shape
            whole, per_image = self._in_one(shape, shape[2:])
            seen[name] = dataclasses.replace(tensors[name], shape=whole)
            image, channel = np.divmod(np.arange(shape[0] * shape[1]), shape[1])
            places[name] = image * per_image + channel
        phases = []
        for picks in op.phases:
            made = []
            for pick in picks:
                channels = np.full(seen[op.output].shape[1], -1)
                taken = np.flatnonzero(pick.channels >= 0)
                channels[places[op.output][taken]] = places[pick.x][pick.channels[taken]]
                made.append(dataclasses.replace(pick, channels=channels))
            phases.append(made)
        other = copy.copy(self)
        other.graph = dataclasses.replace(self.graph, tensors=seen)
        stage = other._select(layer, dataclasses.replace(op, phases=phases, across_images=False))
        return dataclasses.replace(stage, striped=False)

    def _select(self, layer: int, op: Select) -> Stage:
        if op.across_images:
            return self._select_joined(layer, op)
        tensors = self.graph.tensors
        out = tensors[op.output]
        channels, h, w = out.shape[1:]
        fh, fw = op.steps
        index = {name: k for k, name in enumerate(op.inputs)}
        geometries: list[list[Geometry]] = [[] for _ in index]
        phases, params = [], []
        for k, picks in enumerate(op.phases):
            passes = []
            scale = np.ones(channels, np.float32)
            bias = np.full(channels, op.fill - out.zero, np.int64)
            bias[[c for pick in picks for c in np.flatnonzero(pick.channels >= 0)]] = 0
            # A phase of fill alone still has to clear the accumulators.
            for pick in picks or [Pick(op.inputs[0], np.full(channels, -1))]:
                geometry = Geometry((1, 1), pick.strides, (-pick.offsets[0], -pick.offsets[1]))
                geometries[index[pick.x]].append(geometry)
                taken = pick.channels >= 0
                scale[taken] = pick.scale
                bias[taken] -= tensors[pick.x].zero * pick.weight
                kernels = _int8_parts(self._permutation(pick))
                passes += [(index[pick.x], geometry, kernel) for kernel in kernels]
            phases.append((*divmod(k, fw), passes))
            params.append(self._params(op, bias, scale, self.config.lanes))
        shapes = [tensors[x].shape[2:] for x in index]
        if op.flat:
            h, w = 1, h * w
            shapes = [(1, rows * columns) for rows, columns in shapes]
        size = (-(-h // fh), -(-w // fw))
        if op.steps == (1, 1) and all(shape == (h, w) for shape in shapes):
            size = h, w = _flat(h, w, [g for each in geometries for g in each])
            shapes = [size] * len(shapes)
        sources = tuple(self._source(x, geometries[k], shapes[k], False) for x, k in index.items())
        return self._array(
            layer,
            op,
            size,
            (h, w),
            sources,
            phases,
            np.concatenate(params),
            steps=op.steps,
            requant=self._requant(op, None),
            striped=not op.flat,
        )

    def _permutation(self, pick: Pick) -> np.ndarray:
        """The 1x1 kernel that brings a pick's channels to their places, weighted."""
        taken = np.flatnonzero(pick.channels >= 0)
        kernel = np.zeros((len(pick.channels), self.graph.tensors[pick.x].shape[1], 1, 1), np.int16)
        kernel[taken, pick.channels[taken]] = pick.weight
        return kernel

    def _window_stage(
        self,
        layer: int,
        op: Conv | Pool,
        kernel: tuple[int, int],
        window_op: WindowOp,
        pad: int,
        **constants: np.ndarray,
    ) -> Stage:
        n, channels, h, w = self.graph.tensors[op.output].shape
        geometry = Geometry(kernel, op.strides, op.pads[:2], op.dilations)
        source = self._source(op.x, [geometry], self.graph.tensors[op.x].shape[2:], True)
        source = dataclasses.replace(source, zero=pad)
        return Stage(
            layer,
            op,
            "window",
            n,
            h,
            w,
            h,
            w,
            channels,
            source.blocks,
            1,
            (source,),
            requant=self._requant(op, None),
            window_op=window_op,
            **constants,
        )

    def _on_window(self, op: Op) -> bool:
        return isinstance(op, Conv) and windowed(op, self.config)

    def _activated_depthwise(self, layer: int, op: Conv) -> list[Stage]:
        name = f"{op.output}:own"
        own = dataclasses.replace(self.graph.tensors[op.output], name=name, zero=op.activation.zero)
        self.graph = dataclasses.replace(self.graph, tensors=self.graph.tensors | {name: own})
        conv = dataclasses.replace(op, output=name, activation=None)
        values = op.activation.values
        table = Table(op.name, op.op_type, op.output, -128, 127, x=name, values=values)
        return [self._lower(layer, conv), self._lower(layer, table)]

    def _depthwise(self, layer: int, op: Conv) -> Stage:
        rows = self.config.rows
        x = self.graph.tensors[op.x]
        total = op.weights.reshape(len(op.weights), -1).sum(1, dtype=np.int64)
        w = layout.pad_axis(op.weights[:, 0], 0, rows)
        c, kh, kw = w.shape
        words = w.reshape(c // rows, rows, kh, kw).transpose(0, 2, 3, 1).reshape(-1, rows)
        return self._window_stage(
            layer,
            op,
            (kh, kw),
            WindowOp.DEPTHWISE,
            x.zero,
            window_weights=words,
            params=self._params(op, op.bias.astype(np.int64) - x.zero * total, op.scale, rows),
        )

    def _pool(self, layer: int, op: Pool) -> Stage:
        if not self.config.window:
            raise ModelError(
                f"node {op.name}: {op.op_type} needs the window engine (window = true)"
            )
        x = self.graph.tensors[op.x]
        kernel = op.window(x.shape, MAX_KERNEL)
        if kernel != op.kernel:
            other = copy.copy(self)
            seen = dataclasses.replace(x, shape=(*x.shape[:2], *kernel))
            tensors = self.graph.tensors | {op.x: seen}
            other.graph = dataclasses.replace(self.graph, tensors=tensors)
            stage = other._pool(layer, dataclasses.replace(op, kernel=kernel))
            return dataclasses.replace(stage, op=op, striped=False)
        if op.kind == "max":
            return self._window_stage(layer, op, op.kernel, WindowOp.MAX, -128)
        # All channels are alike: one block's parameters serve every block.
        bias = np.full(self.config.rows, -x.zero * op.kernel[0] * op.kernel[1])
        if op.counts is None:
            params = self._params(op, bias, np.full(len(bias), op.scale), self.config.rows)
            return self._window_stage(layer, op, op.kernel, WindowOp.SUM, x.zero, params=params)
        # One set of parameters for every number of elements that windows count.
        (ys, rows), (xs, columns) = (np.unique(c, return_inverse=True) for c in op.counts)
        counts, sets = np.unique(np.outer(ys, xs), return_inverse=True)
        params = [
            self._params(op, bias, np.full(len(bias), op.scale_of(n)), self.config.rows)
            for n in counts
        ]
        stage = self._window_stage(
            layer, op, op.kernel, WindowOp.SUM, x.zero, params=np.concatenate(params)
        )
        return dataclasses.replace(stage, bands=(rows, columns, sets.reshape(len(ys), len(xs))))

    def _add(
        self, op: Op, result: Requant, za: int, other: str, a_ratio: float, b_ratio: float
    ) -> Combine:
        (ma, mb), shift = self._ratios(op, a_ratio, b_ratio)
        zb = self.graph.tensors[other].zero
        return Combine(
            PostOp.ADD, za, zb, result.zero, ma, mb, shift, low2=result.low, high2=result.high
        )

    def _binary(self, layer: int, op: Binary) -> Stage:
        tensors = self.graph.tensors
        result = self._requant(op, op.activation)
        za = tensors[op.a].zero
        if op.kind == "mul":
            (ma,), shift = self._ratios(op, op.a_ratio)
            zb = tensors[op.b].zero
            combine = Combine(
                PostOp.MUL, za, zb, result.zero, ma, 0, shift, low2=result.low, high2=result.high
            )
        else:
            combine = self._add(op, result, za, op.b, op.a_ratio, op.b_ratio)
            combine = dataclasses.replace(combine, op=BINARY_OPS[op.kind])
        values = op.activation.values if op.activation else None
        return self._vector(layer, op, (op.a, op.b), combine, values)

    def _vector(
        self,
        layer: int,
        op: Op,
        names: tuple[str, ...],
        combine: Combine,
        values: np.ndarray | None,
    ) -> Stage:
        n, channels, *full = self.graph.tensors[op.output].shape
        h, w = _flat(*full, [])
        sources = []
        for name in names:
            single = math.prod(self.graph.tensors[name].shape[2:]) == 1 != math.prod(full)
            source = self._source(name, [POINTWISE], (1, 1) if single else (h, w), True)
            sources.append(dataclasses.replace(source, broadcast=single))
        return Stage(
            layer,
            op,
            "vector",
            n,
            h,
            w,
            h,
            w,
            channels,
            sources[0].blocks,
            1,
            tuple(sources),
            combine=combine,
            table=self._table(values),
        )


def _folded(weights: np.ndarray, fold: Fold) -> np.ndarray:
    """The kernel (O, C, kh, kw) with one channel of the reduction per gathered byte: (ky, kx, c),
    c fastest."""
    o, _, kh, _ = weights.shape
    by_tap = weights.transpose(0, 2, 3, 1)
    if fold.by_row:
        return by_tap.reshape(o, kh, -1).transpose(0, 2, 1)[..., None]
    return by_tap.reshape(o, -1, 1, 1)


def _row_geometry(g: Geometry) -> Geometry:
    """What is left of a window when its columns are folded."""
    return Geometry((g.kernel[0], 1), (g.strides[0], 1), (g.pads[0], 0), (g.dilations[0], 1))


def _phase(op: ConvTranspose, axis: int, p: int) -> tuple[list[int], int, int]:
    """Kernel positions of the outputs p + i * stride along an axis, in the order that the input
    comes, and the padding and dilation of the plain convolution they make."""
    stride, dilation, pad = op.strides[axis], op.dilations[axis], op.pads[axis]
    taps = [k for k in range(op.weights.shape[2 + axis]) if (p + pad - k * dilation) % stride == 0]
    if not taps:
        return [], 0, 1
    # Tap k of output i reads input i + (p + pad - k * dilation) / stride.
    offsets = [(p + pad - k * dilation) // stride for k in taps]
    step = offsets[0] - offsets[1] if len(taps) > 1 else 1
    return taps[::-1], -offsets[-1], step
