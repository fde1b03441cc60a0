"""Random graphs of attention, norms and what stands between them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from systole.sw.compiler.partition import AcceleratorSegment, partition
from systole.sw.session.run import RunOptions, run_model
from systole.sw.zoo.tokens import TokenBuilder

WIDTHS = (8, 20, 32, 48, 64, 80)
"""Of heads."""
MASK = "attention_mask"


def random_transformer(seed: int, *, tokens: int = 40) -> onnx.ModelProto:
    """A few layers of any kind, or norms and products alone."""
    rng = np.random.default_rng(seed)
    net = TokenBuilder(f"random{seed}", seed)
    heads, width = int(rng.integers(1, 4)), int(rng.choice(WIDTHS))
    shape = (int(rng.integers(1, 3)), int(rng.integers(2, tokens + 1)), heads * width)
    x = net.input(shape)
    kinds = rng.integers(4, size=rng.integers(1, 3))
    masked = shape[0] == 1 and bool(rng.integers(2)) and bool(np.isin(kinds, (1, 2)).any())
    mask = net.key_mask(shape[1]) if masked else None
    for kind in kinds:
        hidden = int(rng.integers(16, 80))
        if kind == 0:
            x = net.before(x, heads, hidden, silu=bool(rng.integers(2)))
        elif kind == 1:
            x = net.behind(x, heads, hidden, mask)
        elif kind == 2:
            x, _ = net.attention(net.norm(x), heads, mask=mask)
        else:
            x = net.norm(net.linear(x, x.sample.shape[-1], "Gelu"))
    return net.model(net.linear(net.first(x), 10) if rng.integers(2) else x)


def check_transformer(seed: int, path: Path, options: RunOptions, **limits: int) -> None:
    """Run one, whole on the accelerator but for what makes its mask, every layer compared with the
    golden model."""
    model = random_transformer(seed, **limits)
    onnx.save(model, path)
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.input:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        feeds[value.name] = rng.normal(0, 1, shape).astype(np.float32)
        if value.name == MASK:
            feeds[MASK] = (np.arange(shape[1]) < rng.integers(1, shape[1] + 1)).astype(np.int64)[
                None
            ]
    config = options.config
    where = f"seed {seed}, {config.rows}x{config.cols}"
    try:
        plan = partition(path, config)
        report = run_model(plan, feeds, options).report
    except Exception as e:
        e.add_note(where)
        raise
    accelerated = [s for s in plan.segments if isinstance(s, AcceleratorSegment)]
    assert len(accelerated) == 1, where
    assert report.golden_mismatches == 0, f"{where}: {report.first_mismatch}"
