"""Lowering of Softmax and normalisation to the window engine's row operations."""

from __future__ import annotations

import dataclasses

import numpy as np

from systole.isa import Config, WindowOp
from systole.isa.params import (
    CHANNEL_FLAGS,
    EXP_ENTRY_BYTES,
    NORMALISE_PARAMS,
    PARAM_BYTES,
    REQUANT_PARAMS,
    ROW_PARAM_BYTES,
    SOFTMAX_PARAMS,
    pack,
)
from systole.sw.compiler.lowering.context import LoweringContext, flattened
from systole.sw.compiler.stages import POINTWISE, RowStage, Source, Spread
from systole.sw.ir import layout
from systole.sw.ir.graph import ModelError, Normalise, Softmax, normalisation, shares

CHANNEL = (*REQUANT_PARAMS, *CHANNEL_FLAGS)
"""The parameters of a channel of a normalisation."""


def lower_softmax(context: LoweringContext, layer: int, op: Softmax) -> RowStage:
    """A Softmax. Raises :class:`ModelError` without row operations."""
    p = shares(op)
    own = pack(SOFTMAX_PARAMS, numerator=p.numerator, shift=p.shift)
    table = p.table.astype(f"<u{EXP_ENTRY_BYTES}").tobytes()
    words = [_words(own.to_bytes(ROW_PARAM_BYTES, "little"), context.config)]
    words.append(_words(table, context.config))
    stage = _row_stage(context, layer, op, WindowOp.SOFTMAX, np.concatenate(words))
    if op.mask is not None:
        mask = _mask(context, op.mask, stage)
        stage = dataclasses.replace(stage, sources=(*stage.sources, mask))
    return dataclasses.replace(stage, period=op.period)


def _mask(context: LoweringContext, name: str, stage: RowStage) -> Source:
    """A mask as a source of ``stage``: one image may stand for all, one position for all."""
    n, _, h, w = context.tensors[name].shape
    size = (1, 1) if h * w == 1 else (stage.h, stage.w)
    source = context.source(name, [POINTWISE], size, per_group=False)
    words = source.h * source.w
    spread = None
    if n < stage.batch:
        blocks = (source.blocks,) * stage.batch
        starts = (0,) * stage.batch
        spread = Spread(starts=starts, blocks=blocks, step=words, words=source.blocks * words)
    return dataclasses.replace(source, broadcast=words == 1, spread=spread)


def lower_normalise(context: LoweringContext, layer: int, op: Normalise) -> RowStage:
    """A normalisation. Raises :class:`ModelError` without row operations."""
    p, config = normalisation(op), context.config
    own = pack(NORMALISE_PARAMS, epsilon=p.epsilon, centred=p.centred)
    words = [_words(own.to_bytes(ROW_PARAM_BYTES, "little"), config)]
    fields = {
        "bias": p.bias,
        "multiplier": p.multiplier,
        "shift": p.shift,
        "negate": p.negate,
        "coarse": p.coarse,
    }
    channels = [
        pack(CHANNEL, **{name: int(values[c]) for name, values in fields.items()})
        for c in range(p.features)
    ]
    block = config.rows * PARAM_BYTES
    content = b"".join(number.to_bytes(PARAM_BYTES, "little") for number in channels)
    words.append(_words(content + bytes(-len(content) % block), config))
    return _row_stage(context, layer, op, WindowOp.NORMALISE, np.concatenate(words))


def _words(content: bytes, config: Config) -> np.ndarray:
    """Bytes as scratchpad words (count, rows), the last filled up with zeros."""
    return layout.pad_axis(np.frombuffer(content, np.int8), 0, config.rows).reshape(-1, config.rows)


def _row_stage(
    context: LoweringContext,
    layer: int,
    op: Softmax | Normalise,
    row_op: WindowOp,
    params: np.ndarray,
) -> RowStage:
    if not context.config.row_ops:
        raise ModelError(f"node {op.name}: {op.op_type} needs row operations (row_ops = true)")
    n, channels, *_ = context.tensors[op.output].shape
    h, w = flattened(context.size(op.output))
    source = context.source(op.x, [POINTWISE], (h, w), per_group=False)
    return RowStage(
        layer=layer,
        op=op,
        batch=n,
        h=h,
        w=w,
        out_h=h,
        out_w=w,
        channels=channels,
        blocks=source.blocks,
        group_words=source.blocks,
        sources=(source,),
        row_op=row_op,
        requant=context.requant(op),
        params=params,
    )
