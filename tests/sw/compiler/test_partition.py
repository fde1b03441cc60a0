"""Partition: what runs where, and that the pieces together compute what the whole computes."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from systole.isa import Config
from systole.sw.compiler import Compiler
from systole.sw.compiler.partition import AcceleratorSegment, HostSegment, partition, place
from systole.sw.frontend.inputs import random_inputs as random_inputs_of
from systole.sw.ir.graph import ModelError
from systole.sw.session import host
from systole.sw.session.run import RunOptions, run_model
from tests.helpers.random_models import Model, random_array, random_inputs

REAL = Path(__file__).resolve().parents[4] / "shared" / "models"
CONFIG = Config.sized(8, 8)
HOST_OP = "Hardmax"
"""An operator that the accelerator does not have."""


class Net(Model):
    """Quantised layers by name."""

    def __init__(self, opset: int = 21):
        super().__init__(opset)
        self.rng = np.random.default_rng(7)
        self.count = 0

    def _next(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    def real(self, value: str) -> str:
        """A DequantizeLinear of its own."""
        pair = self.pair(self._next("dq"), 0.05, np.int8(3))
        return self.node("DequantizeLinear", [value, *pair], self._next("real"))

    def quantised(self, value: str) -> str:
        return self.q(value, 0.05, np.int8(3), self._next("q"))

    def sums(self, value: str, channels: int = 4) -> str:
        """A convolution of an int8 value, float."""
        name = self.const(self._next("w"), random_array(self.rng, np.int8, (channels, 4, 1, 1)))
        weights = self.dq(name, 0.005, np.int8(0))
        return self.node("Conv", [self.real(value), weights], self._next("conv"))

    def conv(self, value: str) -> str:
        return self.quantised(self.sums(value))

    def on_host(self, value: str) -> str:
        made = self.node(HOST_OP, [self.real(value)], self._next("host"), axis=1)
        return self.quantised(made)

    def add(self, a: str, b: str) -> str:
        return self.quantised(self.node("Add", [self.real(a), self.real(b)], self._next("add")))

    def x(self, dtype=np.int8, shape=(1, 4, 5, 5)) -> str:
        return self.input("x", dtype, shape)


def saved(model: onnx.ModelProto, folder) -> Path:
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def kinds(plan) -> str:
    """Segments as a word: A accelerator, H host."""
    return "".join("A" if isinstance(s, AcceleratorSegment) else "H" for s in plan.segments)


def run(path: Path, arrays, config=CONFIG, **options):
    plan = partition(path, config, **options)
    report = run_model(plan, arrays, RunOptions(config, "commands")).report
    assert report.golden_mismatches == 0, report.first_mismatch
    assert report.ort["equal"] == report.ort["elements"] > 0
    assert report.ort["max_abs_diff"] == 0
    return plan, report


def check(model: onnx.ModelProto, folder, config=CONFIG):
    rng = np.random.default_rng(0)
    if model.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT:
        arrays = {"x": rng.normal(size=(1, 4, 5, 5)).astype(np.float32)}
    else:
        arrays = random_inputs(rng, model)
    return run(saved(model, folder), arrays, config)


@pytest.mark.parametrize("name", ["kws", "ic", "sww", "vww"])
def test_real_models_as_shipped(name):
    """Trained int8 networks that end in a Softmax, on real samples."""
    path, samples = REAL / f"mlperf_tiny/{name}_int8.onnx", REAL / f"samples/{name}_int8.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    config = Config()
    plan = partition(path, config)
    with np.load(samples) as data:
        images, labels = data["x"][:3], data["y_ref"][:3].argmax(1)
    for image, label in zip(images, labels, strict=True):
        arrays = {plan.inputs.inputs[0].name: image[None]}
        report = run_model(plan, arrays, RunOptions(config, "commands")).report
        assert report.golden_mismatches == 0, report.first_mismatch
        assert report.ort["max_abs_diff"] <= 1
        for segment in plan.segments:
            if isinstance(segment, HostSegment):
                assert [p.op_type for p in segment.placements] == ["Softmax", "QuantizeLinear"]
        assert {op.op for op in report.host_ops} <= {"Softmax"}
        assert label >= 0


def test_an_operator_in_the_middle(tmp_path):
    net = Net()
    y = net.conv(net.on_host(net.conv(net.conv(net.x()))))
    plan, report = check(net.done(y, np.int8), tmp_path)
    assert kinds(plan) == "AHA"
    assert [layer.op for layer in report.layers] == ["Conv"] * 3
    (op,) = report.host_ops
    assert (op.op, op.reason, op.after_layers) == (HOST_OP, "operator not supported", 2)
    assert op.seconds > 0
    assert all(s.program is not None for s in plan.segments if isinstance(s, AcceleratorSegment))


def test_branches_share_segments(tmp_path):
    """A branch without host operators joins the segments of the one with them."""
    net = Net()
    x = net.x()
    left = net.conv(net.on_host(net.conv(x)))
    right = net.conv(net.conv(x))
    other = net.on_host(net.conv(right))
    y = net.add(net.add(left, right), net.conv(other))
    plan, report = check(net.done(y, np.int8), tmp_path)
    assert kinds(plan) == "AHA"
    assert [s.graph.outputs[0].dtype for s in plan.segments[::2]] == ["int8", "int8"]
    assert len(report.host_ops) == 2
    assert len(report.layers) == 6


def test_two_host_levels(tmp_path):
    net = Net()
    x = net.x()
    deep = net.conv(net.on_host(net.conv(net.on_host(net.conv(x)))))
    y = net.add(deep, net.on_host(x))
    plan, _ = check(net.done(y, np.int8), tmp_path)
    assert kinds(plan) == "HAHAHA"


def test_the_host_goes_first(tmp_path):
    """A float input that the host works on before it is quantised."""
    net = Net()
    value = net.node(HOST_OP, [net.x(np.float32)], "h", axis=1)
    plan, report = check(net.done(net.conv(net.quantised(value)), np.int8), tmp_path)
    assert kinds(plan) == "HA"
    assert report.host_ops[0].after_layers == 0


def test_token_ids_pick_from_a_table_on_the_host(tmp_path):
    """Only what reads them; random ids are within the table, also behind a change of shape."""
    net = Net()
    net.inputs.append(helper.make_tensor_value_info("ids", TensorProto.INT64, (2, 25)))
    rows = net.node("Unsqueeze", ["ids", net.const("axes", np.array([0]))], "rows")
    table = net.const("table", np.random.default_rng(0).normal(size=(7, 8)).astype(np.float32))
    picked = net.node("Gather", [table, rows], "picked", axis=0)
    w = net.const("w", random_array(net.rng, np.int8, (8, 6)))
    product = net.node(
        "MatMul", [net.real(net.quantised(picked)), net.dq(w, 0.005, np.int8(0))], "product"
    )
    path = saved(net.done(net.quantised(product), np.int8), tmp_path)
    arrays = random_inputs_of(partition(path).inputs, 0)
    assert arrays["ids"].dtype == np.int64 and set(arrays["ids"].reshape(-1)) == set(range(7))
    plan, report = run(path, arrays)
    assert kinds(plan) == "HA" and [layer.op for layer in report.layers] == ["MatMul"]
    assert {op.op for op in report.host_ops} == {"Gather", "Unsqueeze"}
    unsqueeze = next(op for op in report.host_ops if op.op == "Unsqueeze")
    assert unsqueeze.reason == "input 'ids' has type int64; it must be float32, int8 or uint8"


def test_a_float_input_for_both(tmp_path):
    """The accelerator quantises it; the host reads it as it is."""
    net = Net()
    x = net.x(np.float32)
    direct = net.node(HOST_OP, [x], "h", axis=1)
    y = net.add(net.conv(net.quantised(x)), net.conv(net.quantised(direct)))
    plan, _ = check(net.done(y, np.int8), tmp_path)
    assert kinds(plan) in ("HA", "AHA")


def test_float_outputs(tmp_path):
    """Of the accelerator in quantised units, of the host in real numbers; both are returned."""
    net = Net()
    x = net.conv(net.x())
    net.node("Hardmax", [net.real(x)], "soft", axis=1)
    net.node("Identity", [net.real(net.conv(x))], "direct")
    model = net.done("soft", np.float32)
    model.graph.output.append(helper.make_tensor_value_info("direct", TensorProto.FLOAT, None))
    plan, report = check(model, tmp_path)
    assert kinds(plan) == "AH"
    assert report.ort["elements"] == 200


def test_float_neighbours_share_the_place(tmp_path):
    """A convolution whose result is not quantised goes with the operator that reads it."""
    net = Net()
    x = net.conv(net.x())
    value = net.node(HOST_OP, [net.sums(x)], "h", axis=1)
    model = net.done(net.conv(net.quantised(value)), np.int8)
    plan, report = check(model, tmp_path)
    assert kinds(plan) == "AHA"
    assert sorted(op.op for op in report.host_ops) == ["Conv", HOST_OP]
    reasons = {op.op: op.reason for op in report.host_ops}
    assert reasons["Conv"] == "because Hardmax 'h_node' runs on the host"


def test_cascades_lead_to_the_nearest_cause(tmp_path):
    """Of two operators refused, each keeps its own neighbours from the accelerator, however far."""
    net = Net()
    value = net.conv(net.x())
    for i in range(2):
        real = net.node("Relu", [net.sums(value)], f"r{i}")
        real = net.node(HOST_OP, [net.node("Neg", [real], f"n{i}")], f"h{i}", axis=1)
        value = net.quantised(net.node("Abs", [real], f"a{i}"))
    plan, _ = check(net.done(net.conv(value), np.int8), tmp_path)
    because = {p.name: p.because for p in plan.placements if p.host}
    for i in range(2):
        near = {name: why for name, why in because.items() if name in (f"r{i}_node", f"a{i}_node")}
        assert near == dict.fromkeys([f"r{i}_node", f"a{i}_node"], f"Hardmax 'h{i}_node'")
    assert because["h0_node"] is None


def test_a_group_that_would_wait_for_itself(tmp_path):
    """Its first half feeds the host, its second half reads the host's result."""
    net = Net()
    sums = net.sums(net.conv(net.x()))
    later = net.real(net.on_host(net.quantised(sums)))
    y = net.quantised(net.node("Add", [sums, later], "total"))
    plan, report = check(net.done(net.conv(y), np.int8), tmp_path)
    assert kinds(plan) == "AHA"
    assert {op.op for op in report.host_ops} == {"Conv", HOST_OP, "Add"}
    (why,) = {p.rule for p in plan.placements if p.op_type == "Add"}
    assert "its own segment via Hardmax" in why and why.endswith("which runs on the host")


def test_detection(tmp_path):
    """NonMaxSuppression: its outputs' shape depends on values."""
    net = Net()
    features = net.conv(net.conv(net.x()))
    corners = np.sort(net.rng.random((1, 25, 2, 2)), axis=2).reshape(1, 25, 4)
    boxes = net.const("boxes", corners.astype(np.float32))
    shape = net.const("shape", np.array([1, 4, 25]))
    scores = net.node("Reshape", [net.real(features), shape], "scores")
    limits = [net.const("count", np.array([3])), net.const("iou", np.float32([0.5]))]
    net.node("NonMaxSuppression", [boxes, scores, *limits], "picked")
    model = net.done("picked", np.float32)
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    plan, report = check(model, tmp_path)
    assert kinds(plan) == "AH"
    assert [op.op for op in report.host_ops] == ["Reshape", "NonMaxSuppression"]


def test_control_flow_runs_on_the_host(tmp_path):
    """If as a whole, with what its bodies take from outside."""
    net = Net()
    x = net.conv(net.x())
    total = net.node("ReduceSum", [net.real(x)], "total", keepdims=0)
    sign = net.node("Greater", [total, net.const("zero", np.float32(0))], "sign")
    outer = net.real(x)
    bodies = [
        helper.make_graph(
            [helper.make_node(op, [outer], [f"{op}_out"])],
            op,
            [],
            [helper.make_tensor_value_info(f"{op}_out", TensorProto.FLOAT, [1, 4, 5, 5])],
        )
        for op in ("Neg", "Abs")
    ]
    y = net.node("If", [sign], "chosen", then_branch=bodies[0], else_branch=bodies[1])
    plan, report = check(net.done(net.conv(net.quantised(y)), np.int8), tmp_path)
    assert kinds(plan) == "AHA"
    assert "If" in {op.op for op in report.host_ops}


def test_what_the_configuration_cannot_hold_goes_to_the_host(tmp_path):
    """Without its engine, pooling."""
    config = Config(**{**CONFIG.to_dict(), "window": False})
    net = Net()
    pooled = net.node("MaxPool", [net.real(net.conv(net.x()))], "p", kernel_shape=[2, 2])
    model = net.done(net.conv(net.quantised(pooled)), np.int8)
    plan, report = check(model, tmp_path, config)
    assert kinds(plan) == "AHA"
    assert [op.op for op in report.host_ops] == ["MaxPool"]
    assert kinds(check(model, tmp_path)[0]) == "A"


def test_no_fallback(tmp_path):
    net = Net()
    path = saved(net.done(net.conv(net.on_host(net.conv(net.x()))), np.int8), tmp_path)
    with pytest.raises(ModelError, match=r"Hardmax '\w+': operator not supported; .*--no-fallback"):
        partition(path, fallback=False)
    net = Net()
    path = saved(net.done(net.conv(net.x()), np.int8), tmp_path)
    assert kinds(partition(path, fallback=False)) == "A"


def test_nothing_for_the_accelerator(tmp_path):
    net = Net()
    path = saved(net.done(net.on_host(net.x()), np.int8), tmp_path)
    with pytest.raises(ModelError, match="no operator of the model runs on the accelerator; "):
        partition(path)
    net = Net()  # The Hardmax comes first; what matters is why the convolution cannot run.
    real = net.node(HOST_OP, [net.real(net.x())], "h", axis=1)
    scales = np.linspace(0.01, 0.02, 4, dtype=np.float32)
    w = net.const("w", np.ones((4, 4, 1, 1), np.int8))
    w = net.dq(w, scales, np.zeros(4, np.int8), axis=1)
    across = net.node("Conv", [net.real(net.quantised(real)), w], "across_sum")
    path = saved(net.done(net.quantised(across), np.int8), tmp_path)
    with pytest.raises(ModelError, match=r"accelerator; Conv 'across_sum_node': weight scales"):
        partition(path)
    net = Net()
    path = saved(net.done(net.node("Relu", [net.x(np.float32)], "y"), np.float32), tmp_path)
    with pytest.raises(ModelError, match=r"float model: .*--calibrate"):
        partition(path)


def test_open_dimensions(tmp_path):
    net = Net()
    net.x(shape=("batch", 4, "height", 5))
    model = net.done(net.conv(net.on_host(net.conv("x"))), np.int8)
    path = saved(model, tmp_path)
    with pytest.raises(ModelError, match="--dim height=N"):
        partition(path)
    with pytest.raises(ModelError, match=r"no open dimension depth: .*batch, height"):
        partition(path, dims={"height": 3, "depth": 1})
    arrays = {"x": random_array(np.random.default_rng(0), np.int8, (2, 4, 3, 5))}
    plan, _ = run(path, arrays, dims={"height": 3, "x:0": 2})
    assert plan.inputs.tensors["x"].onnx_shape == (2, 4, 3, 5)


def test_blocked_scales_go_to_the_host(tmp_path):
    """Its product alone, with the reason of the conversion that no report has a line of."""
    net = Net()
    w = net.const("w", random_array(net.rng, np.int8, (8, 5)))
    scales = net.const("scales", np.full((2, 5), 0.01, np.float32))
    blocked = net.node("DequantizeLinear", [w, scales], "blocked", axis=0, block_size=4)
    product = net.node("MatMul", [net.real(net.x(shape=(3, 8))), blocked], "blocked_product")
    last = net.dq(net.const("v", random_array(net.rng, np.int8, (5, 6))), 0.01, np.int8(0))
    product = net.node("MatMul", [net.real(net.quantised(product)), last], "product")
    plan, report = check(net.done(net.quantised(product), np.int8), tmp_path)
    assert kinds(plan) == "HA" and [op.op for op in report.host_ops] == ["MatMul"]
    assert report.host_ops[0].reason == (
        "because DequantizeLinear 'blocked_node' runs on the host: it has a scale for every 4 "
        "elements (block_size = 4); one scale for all, or one per output channel, is needed"
    )


def _scale(value):
    def edit(model):
        for c in model.graph.initializer:
            if c.name == "dq1_scale":
                c.CopyFrom(onnx.numpy_helper.from_array(np.float32(value), c.name))

    return edit


def _node(**changes):
    def edit(model):
        node = next(n for n in model.graph.node if n.op_type == HOST_OP)
        for key, value in changes.items():
            if key == "input":
                node.input[0] = value
            else:
                setattr(node, key, value)

    return edit


def _empty(model):
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 0


@pytest.mark.parametrize(
    "edit, message",
    [
        (_node(domain="my.own"), "domain 'my.own' is unknown"),
        (_node(op_type="Nothing"), "onnxruntime does not accept the model"),
        (_node(input="y_absent"), "is defined by no node, input or initialiser"),
        (_node(input="q_last"), "cannot be sorted"),
        (_empty, "dimension 2 is 0"),
    ],
)
def test_malformed_models_are_refused(edit, message, tmp_path):
    """Even where the host would run the node at fault."""
    net = Net()
    inner = net.on_host(net.x())
    last = net.q(net.sums(net.conv(inner)), 0.05, np.int8(3), "q_last")
    model = net.done(last, np.int8)
    edit(model)
    path = saved(model, tmp_path)
    for attempt in (partition, place):
        with pytest.raises(ModelError) as e:
            attempt(path)
        assert message in str(e.value)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("scale", ["nan", "0.0", "-1.0", "inf"])
def test_a_scale_that_is_none_sends_its_node_to_the_host(scale, tmp_path):
    """A mask of minus infinity gives a calibrated model such a scale."""
    net = Net()
    wrong = net.on_host(net.x())
    model = net.done(net.conv(net.add(wrong, net.conv("x"))), np.int8)
    _scale(float(scale))(model)
    path = saved(model, tmp_path)
    (node,) = (p for p in place(path) if p.rule.startswith("scale"))
    assert (node.op_type, node.host) == ("DequantizeLinear", True)
    assert node.rule == f"scale 'dq1_scale' = {scale}: must be positive and finite"
    _, report = run(path, random_inputs(np.random.default_rng(0), model))
    assert [layer.op for layer in report.layers] == ["Conv+Add", "Conv"]


def test_shapes_that_conflict(tmp_path):
    """onnxruntime notices this one only when it runs the model."""
    net = Net()
    model = net.done(net.conv(net.conv(net.on_host(net.x(shape=(1, 5, 4, 4))))), np.int8)
    with pytest.raises(ModelError, match="onnxruntime cannot run the model"):
        place(saved(model, tmp_path))
    with pytest.raises(ModelError, match="onnxruntime cannot run the model"):
        check(model, tmp_path)


@pytest.mark.parametrize("location", ["absent.bin", "../outside.bin"])
def test_external_data(location, tmp_path):
    (tmp_path / "outside.bin").write_bytes(bytes(4096))
    folder = tmp_path / "inner"
    folder.mkdir()
    net = Net()
    model = net.done(net.conv(net.on_host(net.x())), np.int8)
    weights = next(c for c in model.graph.initializer if c.name.startswith("w"))
    onnx.external_data_helper.set_external_data(weights, location)
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"external data .* (is missing|is outside)"):
        partition(folder / "model.onnx")


def test_comparison_of_the_hosts_outputs():
    a = np.array([1.0, np.nan, np.inf, 2.0], np.float32)
    assert host.compare(a, a.copy()) == host.Comparison(4, 4, 0)
    assert host.compare(a, np.array([1.5, np.nan, np.inf, 2], np.float32)).max_abs_diff == 0.5
    assert host.compare(a, np.array([1, 0, np.inf, 2], np.float32)).max_abs_diff is None
    assert host.compare(np.zeros((2, 3)), np.zeros((3, 3))) == host.Comparison(9, 0, None)
    unsigned = np.array([0], np.uint8), np.array([255], np.uint8)
    assert host.compare(*unsigned) == host.Comparison(1, 0, 255)
    assert host.compare(np.array(["a"]), np.array(["b"])) == host.Comparison(1, 0, 1)


def test_only_what_lowering_leaves_is_compiled(tmp_path, monkeypatch):
    """The handlers of two nodes on two branches refuse them, one after the other. What is behind
    the first is a segment for as long as the second is not refused, but not a program."""
    net = Net()
    x = net.x()
    scales = net.const("scales", np.float32([1, 1, 1, 1]))
    branches = []
    for _ in range(2):
        real = net.real(net.conv(x))
        resized = net.node("Resize", [real, "", scales], net._next("cubic"), mode="cubic")
        branches.append(net.conv(net.quantised(resized)))
    compiled = []

    class Counted(Compiler):
        def __init__(self, graph, config):
            compiled.append(graph)
            super().__init__(graph, config)

    monkeypatch.setattr("systole.sw.compiler.partition.Compiler", Counted)
    plan = partition(saved(net.done(net.add(*branches), np.int8), tmp_path), CONFIG)
    assert kinds(plan) == "AHA"
    assert len(compiled) == 2
