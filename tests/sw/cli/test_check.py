"""``python -m sw.check``: every node with its placement and rule, and the document of the rules."""

import io
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import typer
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from typer.testing import CliRunner

from systole.sw.cli import check
from systole.sw.compiler.partition import FLOAT, place
from systole.sw.compiler.placement import NO_ROW_OPS
from systole.sw.frontend.dataflow import CONVERSIONS
from systole.sw.frontend.passes.operators import OPERATORS
from systole.sw.quantisation.pipeline import quantise_model

REAL = Path(__file__).resolve().parents[4] / "shared" / "models"


def cli(*arguments):
    app = typer.Typer()
    app.command()(check.main)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def listing(path) -> str:
    console = Console(file=io.StringIO(), width=150)
    check.show(place(path), console)
    return console.file.getvalue()


def saved(model, folder) -> Path:
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def make(nodes, inputs, outputs, constants) -> onnx.ModelProto:
    def info(name, shape, kind=TensorProto.FLOAT):
        return helper.make_tensor_value_info(name, kind, shape)

    graph = helper.make_graph(
        nodes,
        "test",
        [info(*i) for i in inputs],
        [info(*o) for o in outputs],
        [numpy_helper.from_array(a, name) for name, a in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def encoder(width=8, tokens=4) -> onnx.ModelProto:
    """One layer of a transformer's encoder, float, a single head."""
    rng = np.random.default_rng(0)

    def weights(*shape):
        return rng.normal(size=shape).astype(np.float32)

    n = helper.make_node
    nodes = [
        *(n("MatMul", ["x", f"w{k}"], [k], name=k) for k in "qkv"),
        n("Transpose", ["k"], ["kt"], name="kt", perm=[0, 2, 1]),
        n("MatMul", ["q", "kt"], ["scores"], name="scores"),
        n("Softmax", ["scores"], ["attention"], name="attention", axis=-1),
        n("MatMul", ["attention", "v"], ["mixed"], name="mixed"),
        n("Add", ["x", "mixed"], ["sum"], name="sum"),
        n("LayerNormalization", ["sum", "gain", "shift"], ["norm"], name="norm", axis=-1),
        n("MatMul", ["norm", "w1"], ["h"], name="h"),
        n("Relu", ["h"], ["r"], name="r"),
        n("MatMul", ["r", "w2"], ["y"], name="y"),
    ]
    constants = {f"w{k}": weights(width, width) for k in "qkv"}
    constants |= {"w1": weights(width, 2 * width), "w2": weights(2 * width, width)}
    constants |= {"gain": weights(width), "shift": weights(width)}
    shape = (1, tokens, width)
    return make(nodes, [("x", shape)], [("y", shape)], constants)


def detector() -> onnx.ModelProto:
    """A float convolution, and NonMaxSuppression of its scores."""
    rng = np.random.default_rng(0)
    n = helper.make_node
    nodes = [
        n("Conv", ["x", "w"], ["features"], name="backbone"),
        n("Relu", ["features"], ["active"], name="active"),
        n("Reshape", ["active", "shape"], ["scores"], name="scores"),
        n("NonMaxSuppression", ["boxes", "scores", "most"], ["picked"], name="pick"),
    ]
    constants = {
        "w": rng.normal(size=(4, 4, 1, 1)).astype(np.float32),
        "shape": np.array([1, 4, 25]),
        "boxes": rng.random((1, 25, 4)).astype(np.float32),
        "most": np.array([3]),
    }
    outputs = [("picked", None, TensorProto.INT64)]
    return make(nodes, [("x", (1, 4, 5, 5))], outputs, constants)


def test_float_models_say_what_to_do(tmp_path):
    for model in (encoder(), detector()):
        path = saved(model, tmp_path)
        placements = place(path)
        assert [p.op_type for p in placements] == [n.op_type for n in model.graph.node]
        rules = {"NonMaxSuppression": "operator not supported"}
        rules |= dict.fromkeys(("Softmax", "LayerNormalization"), NO_ROW_OPS)
        for p in placements:
            assert p.host and p.rule == rules.get(p.op_type, FLOAT)
        text = listing(path)
        known = sum(p.op_type not in rules for p in placements)
        assert f"{known} of the nodes have an operator of the accelerator" in text
        assert f"{len(placements)} nodes: 0 on the accelerator" in text
        assert "python -m sw.quantize" in text


def test_an_encoder_quantised(tmp_path):
    """LayerNormalization is the host's, the products by constants are the accelerator's; both with
    the rule."""
    samples = np.random.default_rng(1).normal(size=(4, 1, 4, 8)).astype(np.float32)
    model = quantise_model(saved(encoder(), tmp_path), {"x": samples[:, 0]})
    path = saved(model, tmp_path)
    placements = {p.name: p for p in place(path) if p.op_type not in CONVERSIONS}
    assert placements["norm"].host
    assert not placements["h"].host
    assert placements["h"].rule == " ".join(OPERATORS["", "MatMul"].__doc__.split())
    text = listing(path)
    assert f"LayerNormalization 'norm' on the host: {NO_ROW_OPS}" in text
    assert text.count("times a constant (K, N)") == 1 and "as above" in text


def test_json(tmp_path):
    """The same in a file, with each node's work and what keeps it from the accelerator."""
    samples = np.random.default_rng(1).normal(size=(4, 4, 5, 5)).astype(np.float32)
    path, out = tmp_path / "q.onnx", tmp_path / "r.json"
    onnx.save(quantise_model(saved(detector(), tmp_path), {"x": samples}), path)
    result = cli(path, "--json", out)
    assert result.exit_code == 0, result.stderr
    report = json.loads(out.read_text())
    assert report["model"] == "q.onnx"
    nodes = {n["op_type"]: n for n in report["nodes"]}
    assert not nodes["Conv"]["host"] and nodes["Conv"]["macs"] == 400
    assert nodes["NonMaxSuppression"]["because"] is None
    assert (report["model_macs"], report["host_macs"]) == (400, 0)
    assert report["on_accelerator"] + report["on_host"] == len(report["nodes"])
    first = report["reasons"][0]
    assert (first["ops"], first["reason"]) == ({"NonMaxSuppression": 1}, "operator not supported")
    assert "MACs 400: 400 on the accelerator, 0 on the host" in result.stdout


def test_a_detector_quantised(tmp_path):
    samples = np.random.default_rng(1).normal(size=(4, 4, 5, 5)).astype(np.float32)
    model = quantise_model(saved(detector(), tmp_path), {"x": samples})
    where = {p.op_type: p for p in place(saved(model, tmp_path))}
    assert not where["Conv"].host
    assert where["NonMaxSuppression"].host
    assert where["NonMaxSuppression"].rule == "operator not supported"


@pytest.mark.parametrize("name", ["ic_int8", "ic_float"])
def test_real_models(name):
    path = REAL / f"mlperf_tiny/{name}.onnx"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    result = cli(path)
    assert result.exit_code == 0
    assert ("Conv" in result.stdout) and ("nodes: " in result.stdout)


@pytest.mark.long
def test_a_face_detector_stays_on_the_accelerator(tmp_path):
    """Its anchors' lists, of four maps, too; but its Softmax."""
    path = REAL / "other/ultraface_slim_float.onnx"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    pictures = np.load(REAL / "samples/ultraface_slim_float.npz")["x0"]
    name = onnx.load(path).graph.input[0].name
    placements = place(saved(quantise_model(path, {name: pictures}), tmp_path))
    on_host = [p.op_type for p in placements if p.host and p.op_type not in CONVERSIONS]
    assert on_host == ["Softmax"]


def test_bad_input_is_refused_in_a_sentence(tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\x08\x07nonsense")
    for arguments in (
        [broken],
        [tmp_path / "no.onnx"],
        [],
        ["--check"],
        [broken, "--document"],
        ["--document", "--json", "x"],
    ):
        result = cli(*arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1


def test_the_document_is_up_to_date():
    result = cli("--document", "--check")
    assert result.exit_code == 0, result.stderr


def test_a_stale_document_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "PATH", tmp_path / "supported-ops.md")
    assert cli("--document", "--check").exit_code == 1
    assert cli("--document").exit_code == 0
    assert cli("--document", "--check").exit_code == 0
    text = check.PATH.read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    listed = {
        (domain, op_type)
        for cells in rows
        for domain, names in zip(("", "com.microsoft"), cells[:2], strict=True)
        for op_type in names.split(", ")
    }
    assert listed >= OPERATORS.keys()
    rules = [cells[-1] for cells in rows]
    assert len(rules) == len({*rules})
    check.PATH.write_text(text.replace("Fused as a clamp", "Fused"))
    assert cli("--document", "--check").exit_code == 1
