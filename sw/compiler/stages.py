"""Lowering: each operator of the graph becomes one stage with the constants its engine reads.

Cases, in order:

1. Conv, depthwise, window engine present: WINDOW, DEPTHWISE.
2. Conv on a packed graph input: WINDOW IM2COL, then CONV over the folded reduction, then POST.
3. Any other Conv (groups spread out to a dense kernel with zeros): CONV, then POST.
4. Pool: WINDOW, MAX or SUM.
5. Add: POST from the scratchpad.

A stage whose geometry is pointwise sees its images flattened to one row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from isa import Config, WindowOp
from sw import layout
from sw.graph import Binary, Conv, Graph, ModelError, Op, Pool
from sw.numerics import split_ratios, split_scale

MAX_DIM = (1 << 15) - 1
"""Largest image dimension: x0, y0 are 16 bits, signed."""


@dataclass(frozen=True)
class Geometry:
    """A sliding window: (y, x) pairs; pads are top and left only."""

    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int] = (0, 0)
    dilations: tuple[int, int] = (1, 1)

    def span(self, axis: int, first: int, count: int, size: int) -> tuple[int, int]:
        """The input positions, clipped to ``size`` and at least one, under ``count`` outputs from
        ``first``: start and end."""
        low = first * self.strides[axis] - self.pads[axis]
        high = (first + count - 1) * self.strides[axis] - self.pads[axis]
        high += (self.kernel[axis] - 1) * self.dilations[axis] + 1
        low, high = max(low, 0), min(high, size)
        if low >= high:  # wholly in the padding
            low = min(max(low, 0), size - 1)
            high = low + 1
        return low, high


POINTWISE = Geometry()


@dataclass(frozen=True)
class Source:
    """An activation that a stage reads, as the stage sees it."""

    tensor: str
    h: int
    w: int
    blocks: int
    """Words side by side per pixel; packed: 1."""
    geometry: Geometry
    zero: int
    per_group: bool
    """Read one output group at a time (else all its channels are needed for every group)."""
    packed: bool = False
    """``w`` counts the words of a row."""


@dataclass(frozen=True)
class Fold:
    """IM2COL of a packed input: byte-wise geometry of the runs."""

    runs: int
    """Runs per kernel row."""
    run: int
    """Bytes per run."""
    geometry: Geometry
    """x in pixels, as in the model."""
    channels: int
    in_w: int
    """Bytes of an image row."""
    words: int
    """Reduction words per output."""


@dataclass(frozen=True)
class Requant:
    """Clamps and zero points of POST and WINDOW."""

    zero: int
    low: int
    high: int


@dataclass(frozen=True)
class AddFields:
    """Operands of POST's ADD."""

    za: int
    zb: int
    zo: int
    ma: int
    mb: int
    shift: int
    low2: int
    high2: int


@dataclass(frozen=True)
class Stage:
    """One operator on its engine. ``sources[0]`` is the main input, ``sources[1]`` the other
    addend."""

    layer: int
    op: Op
    kind: Literal["array", "window", "add"]
    batch: int
    h: int
    w: int
    channels: int
    blocks: int
    """Scratchpad words per output pixel."""
    group_words: int
    """Scratchpad words per output pixel made between two stores."""
    sources: tuple[Source, ...]
    requant: Requant | None = None
    add: AddFields | None = None
    fold: Fold | None = None
    window_op: WindowOp | None = None
    array_weights: np.ndarray | None = None
    """(cols blocks, reduction blocks, kh, kw, rows, cols), int8."""
    window_weights: np.ndarray | None = None
    """(blocks * kh * kw, rows), int8."""
    params: np.ndarray | None = None
    """(words, rows), int8."""

    @property
    def groups(self) -> int:
        return -(-self.blocks // self.group_words)

    @property
    def fixed_words(self) -> int:
        """Scratchpad words of the stage's parameters and window weights."""
        return sum(len(a) for a in (self.params, self.window_weights) if a is not None)


def _flat(h: int, w: int, geometries: list[Geometry]) -> tuple[int, int]:
    """One row, where every geometry is pointwise and the row is not too long for 16 bits."""
    if all(g == POINTWISE for g in geometries) and h * w <= MAX_DIM:
        return 1, h * w
    return h, w


def _foldable(op: Op, name: str, graph: Graph, config: Config) -> bool:
    """The operator could read tensor ``name`` packed, and gains from it."""
    if not isinstance(op, Conv) or op.group != 1 or op.x != name:
        return False
    if op.residual is not None and op.residual.other == name:
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
    out = np.zeros((o, c * op.group, *op.weights.shape[2:]), np.int8)
    for g in range(op.group):
        out[g * per : (g + 1) * per, g * c : (g + 1) * c] = op.weights[g * per : (g + 1) * per]
    return out


class Lowering:
    """Lowers a graph for a configuration."""

    def __init__(self, graph: Graph, config: Config):
        self.graph = graph
        self.config = config
        self.packed = packed_inputs(graph, config)

    def stages(self) -> list[Stage]:
        """Raises :class:`ModelError` for what the configuration's engines cannot do."""
        return [self._lower(i, op) for i, op in enumerate(self.graph.ops)]

    def _lower(self, layer: int, op: Op) -> Stage:
        self._check_limits(op)
        if isinstance(op, Conv):
            if op.depthwise and self.config.window and op.residual is None:
                return self._depthwise(layer, op)
            return self._array(layer, op)
        if isinstance(op, Pool):
            return self._pool(layer, op)
        if isinstance(op, Binary):
            return self._add(layer, op)
        raise ModelError(f"node {op.name}: operator {op.op_type} has no engine")

    def _check_limits(self, op: Op) -> None:
        for name in (*op.inputs, op.output):
            for what, size in zip(("height", "width"), self.graph.tensors[name].shape[2:]):
                if size > MAX_DIM:
                    raise ModelError(
                        f"node {op.name}: tensor {name}: {what} {size} exceeds {MAX_DIM}"
                    )
        if isinstance(op, Conv | Pool):
            kernel = op.weights.shape[2:] if isinstance(op, Conv) else op.kernel
            for what, values, limit in (
                ("kernel", kernel, 63),
                ("strides", op.strides, 255),
                ("dilations", op.dilations, 255),
            ):
                if max(values) > limit:
                    raise ModelError(f"node {op.name}: {what} {tuple(values)} exceeds {limit}")

    def _source(
        self, name: str, geometry: Geometry, shape: tuple[int, int], per_group: bool
    ) -> Source:
        t = self.graph.tensors[name]
        blocks = layout.blocks_of(t.shape[1], self.config.rows)
        return Source(name, *shape, blocks, geometry, t.zero, per_group)

    def _array(self, layer: int, op: Conv) -> Stage:
        config, graph = self.config, self.graph
        n, channels, h, w = graph.tensors[op.output].shape
        x = graph.tensors[op.x]
        geometry = Geometry(op.weights.shape[2:], op.strides, op.pads[:2], op.dilations)
        weights, fold = _dense(op), None
        if op.x in self.packed:
            fold = self._fold(op, geometry)
            o = len(weights)
            # One channel of the folded reduction per byte: (ky, kx, c) with c fastest.
            weights = weights.transpose(0, 2, 3, 1).reshape(o, -1, 1, 1)
            pitch = layout.packed_pitch(x.shape[1], x.shape[3], config.rows)
            main = Source(op.x, x.shape[2], pitch, 1, geometry, x.zero, False, packed=True)
        else:
            out_hw = (h, w)
            h, w = _flat(h, w, [geometry])
            in_hw = x.shape[2:] if (h, w) == out_hw else (h, w)
            main = self._source(op.x, geometry, in_hw, False)
        multiplier, shift = self._split(op, op.scale)
        total = weights.reshape(len(weights), -1).sum(1, dtype=np.int64)
        bias = op.bias.astype(np.int64) - x.zero * total
        out = graph.tensors[op.output]
        sources, requant, add = (main,), Requant(out.zero, op.low, op.high), None
        if op.residual is not None:
            r = op.residual
            sources = (main, self._source(r.other, POINTWISE, (h, w), True))
            requant = Requant(r.mid_zero, r.mid_low, r.mid_high)
            add = self._add_fields(op, r.mid_zero, r.other, r.conv_ratio, r.other_ratio)
        return Stage(
            layer,
            op,
            "array",
            n,
            h,
            w,
            channels,
            layout.blocks_of(channels, config.rows),
            config.cols // config.lanes,
            sources,
            requant,
            add,
            fold,
            array_weights=layout.pack_weights(weights, config),
            params=layout.pack_params(bias, multiplier, shift, config.lanes, config.rows),
        )

    def _fold(self, op: Conv, geometry: Geometry) -> Fold:
        _, channels, _, width = self.graph.tensors[op.x].shape
        kh, kw = geometry.kernel
        whole = geometry.dilations[1] == 1
        return Fold(
            runs=1 if whole else kw,
            run=channels * kw if whole else channels,
            geometry=geometry,
            channels=channels,
            in_w=channels * width,
            words=layout.blocks_of(kh * kw * channels, self.config.rows),
        )

    def _window_stage(
        self,
        layer: int,
        op: Conv | Pool,
        kernel: tuple[int, int],
        window_op: WindowOp,
        requant: Requant,
        pad: int,
        **constants: np.ndarray,
    ) -> Stage:
        n, channels, h, w = self.graph.tensors[op.output].shape
        geometry = Geometry(kernel, op.strides, op.pads[:2], op.dilations)
        source = self._source(op.x, geometry, self.graph.tensors[op.x].shape[2:], True)
        source = Source(**{**source.__dict__, "zero": pad})
        return Stage(
            layer,
            op,
            "window",
            n,
            h,
            w,
            channels,
            source.blocks,
            1,
            (source,),
            requant,
            window_op=window_op,
            **constants,
        )

    def _depthwise(self, layer: int, op: Conv) -> Stage:
        rows = self.config.rows
        out, x = self.graph.tensors[op.output], self.graph.tensors[op.x]
        multiplier, shift = self._split(op, op.scale)
        total = op.weights.reshape(len(op.weights), -1).sum(1, dtype=np.int64)
        bias = op.bias.astype(np.int64) - x.zero * total
        w = layout.pad_axis(op.weights[:, 0], 0, rows)
        c, kh, kw = w.shape
        words = w.reshape(c // rows, rows, kh, kw).transpose(0, 2, 3, 1).reshape(-1, rows)
        return self._window_stage(
            layer,
            op,
            (kh, kw),
            WindowOp.DEPTHWISE,
            Requant(out.zero, op.low, op.high),
            x.zero,
            window_weights=words,
            params=layout.pack_params(bias, multiplier, shift, rows, rows),
        )

    def _pool(self, layer: int, op: Pool) -> Stage:
        if not self.config.window:
            raise ModelError(
                f"node {op.name}: {op.op_type} needs the window engine (window = true)"
            )
        out, x = self.graph.tensors[op.output], self.graph.tensors[op.x]
        requant = Requant(out.zero, op.low, op.high)
        if op.kind == "max":
            return self._window_stage(layer, op, op.kernel, WindowOp.MAX, requant, -128)
        rows = self.config.rows
        multiplier, shift = self._split(op, np.full(x.shape[1], op.scale, np.float32))
        bias = np.full(x.shape[1], -x.zero * op.kernel[0] * op.kernel[1])
        params = layout.pack_params(bias, multiplier, shift, rows, rows)
        return self._window_stage(
            layer, op, op.kernel, WindowOp.SUM, requant, x.zero, params=params
        )

    def _add(self, layer: int, op: Binary) -> Stage:
        n, channels, h, w = self.graph.tensors[op.output].shape
        h, w = _flat(h, w, [])
        sources = tuple(self._source(name, POINTWISE, (h, w), True) for name in (op.a, op.b))
        za = self.graph.tensors[op.a].zero
        return Stage(
            layer,
            op,
            "add",
            n,
            h,
            w,
            channels,
            sources[0].blocks,
            1,
            sources,
            add=self._add_fields(op, za, op.b, op.a_ratio, op.b_ratio),
        )

    def _add_fields(self, op: Op, za: int, other: str, a_ratio: float, b_ratio: float) -> AddFields:
        try:
            (ma, mb), shift = split_ratios(a_ratio, b_ratio)
        except ValueError as e:
            raise ModelError(f"node {op.name}: {e}") from None
        zb, zo = self.graph.tensors[other].zero, self.graph.tensors[op.output].zero
        return AddFields(za, zb, zo, ma, mb, shift, op.low, op.high)

    def _split(self, op: Op, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        try:
            return split_scale(scale)
        except ValueError as e:
            raise ModelError(f"node {op.name}: {e}") from None
