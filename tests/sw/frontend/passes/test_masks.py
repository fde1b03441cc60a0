"""Attention masks from a float model to the accelerator, in the forms in which exporters write
them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from systole.isa import Config
from systole.sw.compiler.partition import AcceleratorSegment, Partition, partition
from systole.sw.golden import oracle
from systole.sw.ir.graph import Softmax
from systole.sw.quantisation.pipeline import quantise_model
from systole.sw.session.run import RunOptions, run_model

HEADS, TOKENS, WIDTH = 2, 12, 16
CONFIG = Config(rows=8, cols=8, row_ops=True)
LOWEST = float(np.finfo(np.float32).min)
PADDING = np.arange(TOKENS) < 9
CAUSAL = np.tri(TOKENS, dtype=bool)
CONSTANT = ("causal", "causal where", "where other", "keys", "general", "nothing")
COMPUTED = ("where", "products", "product of bool", "both", "guarded")


class Attention:
    """Scores of heads, a mask of some ``kind``, a Softmax, and the product with the values."""

    def __init__(self, kind: str, low: float):
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.low, self.computed = low, kind in COMPUTED
        q, k = (self.node("MatMul", [x, self.const(self.random(WIDTH))]) for x in "xx")
        q, k = (self.heads(part) for part in (q, k))
        scores = self.node("MatMul", [q, self.node("Transpose", [k], perm=[0, 1, 3, 2])])
        value = self.masked(kind, scores)
        share = self.node("Softmax", [value], axis=-1)
        if kind == "guarded":
            test = self.node("IsNaN", [share])
            share = self.node("Where", [test, self.const(np.zeros(1, np.float32)), share])
        self.nodes.append(helper.make_node("MatMul", [share, q], ["y"], "y"))

    def random(self, size: int) -> np.ndarray:
        rng = np.random.default_rng(len(self.nodes))
        return rng.normal(0, 0.4, (size, HEADS * 8)).astype(np.float32)

    def const(self, array: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(array, f"c{len(self.constants)}"))
        return self.constants[-1].name

    def node(self, op_type: str, inputs: list[str], **attributes) -> str:
        name = f"{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], name, **attributes))
        return name

    def heads(self, x: str) -> str:
        shape = self.const(np.array([1, TOKENS, HEADS, 8]))
        return self.node("Transpose", [self.node("Reshape", [x, shape])], perm=[0, 2, 1, 3])

    def number(self, x: float) -> str:
        return self.const(np.array(x, np.float32))

    def masked(self, kind: str, scores: str) -> str:
        """The scores with a mask."""
        fixed = {
            "causal": CAUSAL,
            "keys": PADDING,
            "general": CAUSAL ^ np.eye(TOKENS, k=3, dtype=bool),
            "nothing": np.ones(TOKENS, bool),
        }
        if kind in fixed:
            mask = np.where(fixed[kind], 0, self.low).astype(np.float32)
            return self.node("Add", [scores, self.const(mask)])
        if kind == "causal where":
            return self.node("Where", [self.const(CAUSAL), scores, self.number(self.low)])
        if kind == "where other":
            return self.node("Where", [self.const(~PADDING), self.number(self.low), scores])
        kept = self.node("Unsqueeze", ["mask", self.const(np.array([1, 2]))])
        if kind in ("products", "product of bool"):
            to = TensorProto.FLOAT
            if kind == "product of bool":
                kept = self.node("Cast", [kept], to=TensorProto.BOOL)
            kept = self.node("Cast", [kept], to=to)
            left = self.node("Sub", [self.number(1), kept])
            return self.node("Add", [self.node("Mul", [left, self.number(self.low)]), scores])
        kept = self.node("Cast", [kept], to=TensorProto.BOOL)
        if kind in ("both", "guarded"):
            kept = self.node("And", [kept, self.const(CAUSAL[None, None])])
        mask = self.node("Where", [kept, self.number(0), self.number(self.low)])
        return self.node("Add", [scores, mask])

    def save(self, path: Path) -> Path:
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, TOKENS, WIDTH))]
        if self.computed:
            inputs.append(helper.make_tensor_value_info("mask", TensorProto.INT64, (1, TOKENS)))
        y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "attention", inputs, [y], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        model.ir_version = 8
        onnx.save(model, path)
        return path


def arrays(seed: int, count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, (count, 1, TOKENS, WIDTH)).astype(np.float32)
    return {"x": x, "mask": np.tile(PADDING.astype(np.int64), (count, 1, 1))}


def planned(tmp_path: Path, kind: str, low: float) -> tuple[Path, Path, Partition]:
    """The float model, the quantised one, and its partition."""
    attention = Attention(kind, low)
    real, path = attention.save(tmp_path / "real.onnx"), tmp_path / "int8.onnx"
    given = {k: v[:, 0] for k, v in arrays(0, 8).items() if k == "x" or attention.computed}
    onnx.save(quantise_model(real, given), path)
    return real, path, partition(path, CONFIG)


def accelerated(plan: Partition) -> AcceleratorSegment:
    (segment,) = (s for s in plan.segments if isinstance(s, AcceleratorSegment))
    return segment


@pytest.mark.parametrize("low", [-1e4, -np.inf, LOWEST])
@pytest.mark.parametrize("kind", [*CONSTANT, *COMPUTED])
def test_masks_stay_with_their_softmax(tmp_path, kind, low):
    if kind.startswith("product") and np.isinf(low):
        pytest.skip("0 times minus infinity is no number")
    real, path, plan = planned(tmp_path, kind, low)
    segment = accelerated(plan)
    (op,) = (op for op in segment.graph.ops if isinstance(op, Softmax))
    assert op.period == (TOKENS if kind.startswith("causal") else 0)
    assert (op.mask is not None) == (kind not in ("causal", "causal where", "nothing"))
    if kind == "keys":
        assert op.mask is not None and segment.graph.tensors[op.mask].shape == (1, TOKENS, 1, 1)
    feeds = {k: v[0] for k, v in arrays(1, 1).items() if k == "x" or kind in COMPUTED}
    result = run_model(plan, feeds, RunOptions(CONFIG, simulator="commands"))
    assert result.report.golden_mismatches == 0
    (own,) = result.outputs.values()
    (exact,) = oracle.run(path, feeds).values()
    assert np.abs(own - exact).max() <= np.abs(exact).max() / 50
    (floating,) = oracle.run(real, feeds).values()
    noise = ((own - floating) ** 2).mean() / (floating**2).mean()
    assert 10 * np.log10(1 / noise) > 25


@pytest.mark.parametrize("guarded", [False, True])
def test_a_row_that_is_masked_whole(tmp_path, guarded):
    """A constant that leaves nothing of a row is refused, unless a guard gives zeros for it."""
    attention = Attention("general", -np.inf)
    mask = next(c for c in attention.constants if c.dims == [TOKENS, TOKENS])
    array = numpy_helper.to_array(mask).copy()
    array[3] = -np.inf
    mask.CopyFrom(numpy_helper.from_array(array, mask.name))
    if guarded:
        product = attention.nodes.pop()
        share = attention.nodes[-1].output[0]
        test = attention.node("IsNaN", [share])
        product.input[0] = attention.node("Where", [test, attention.number(0), share])
        attention.nodes.append(product)
    real, x = attention.save(tmp_path / "real.onnx"), arrays(0, 8)["x"][:, 0]
    onnx.save(quantise_model(real, {"x": x}), path := tmp_path / "int8.onnx")
    plan = partition(path, CONFIG)
    (softmax,) = (p for p in plan.placements if p.op_type == "Softmax")
    if not guarded:
        assert softmax.host and softmax.rule == "a constant mask leaves nothing of a row"
        return
    result = run_model(plan, {"x": x[:1]}, RunOptions(CONFIG, simulator="commands"))
    assert not softmax.host and result.report.golden_mismatches == 0
    assert not result.outputs["y"][0, :, 3].any() and result.outputs["y"][0, :, 4].any()


def test_scores_as_large_as_a_mask(tmp_path):
    """What is masked must have no share, however large the scores are."""
    attention = Attention("keys", -1e4)
    for weights in attention.constants[:2]:
        weights.CopyFrom(numpy_helper.from_array(80 * numpy_helper.to_array(weights), weights.name))
    real = attention.save(tmp_path / "real.onnx")
    onnx.save(quantise_model(real, {"x": arrays(0, 8)["x"][:, 0]}), path := tmp_path / "int8.onnx")
    (placement,) = (p for p in partition(path, CONFIG).placements if p.op_type == "Softmax")
    assert placement.host and "its mask has -10000, with these scores at most" in placement.rule
