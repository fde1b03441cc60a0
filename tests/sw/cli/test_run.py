"""``python -m sw.run``: reports, and every kind of bad input, which ends in one sentence."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import typer
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from typer.testing import CliRunner

from systole.sw.cli import run
from systole.sw.session import run as session
from systole.sw.zoo import digits
from tests.helpers.random_models import Model, random_array

DIGITS = digits.MODEL
APP = typer.Typer()
APP.command()(run.main)


def cli(*arguments):
    return CliRunner().invoke(APP, [str(a) for a in arguments])


def model_with_host_operator() -> onnx.ModelProto:
    """Convolution, Hardmax, convolution."""
    model, rng = Model(), np.random.default_rng(3)
    value = model.input("x", np.int8, (1, 4, 6, 6))
    for i in range(2):
        real = model.dq(value, 0.05, np.int8(3))
        if i == 1:
            real = model.node("Hardmax", [real], "hard", axis=1)
            quantised = model.q(real, 0.05, np.int8(3), "hard_q")
            real = model.dq(quantised, 0.05, np.int8(3))
        name = model.const(f"w{i}", random_array(rng, np.int8, (4, 4, 3, 3)))
        sums = model.node("Conv", [real, model.dq(name, 0.005, np.int8(0))], f"sum{i}")
        value = model.q(sums, 0.05, np.int8(3), f"y{i}")
    return model.done(value, np.int8)


@pytest.fixture
def mixed(tmp_path) -> Path:
    path = tmp_path / "mixed.onnx"
    onnx.save(model_with_host_operator(), path)
    return path


def test_report(mixed, tmp_path):
    out, program = tmp_path / "report.json", tmp_path / "p.bin"
    result = cli(mixed, "--sim", "commands", "--json", out, "--program", program)
    assert result.exit_code == 0, result.stderr
    assert "Hardmax on host" in result.stdout
    assert "on the host: Hardmax 'hard_node': operator not supported" in result.stdout
    report = json.loads(out.read_text())
    assert report["model"] == "mixed.onnx"
    assert report["golden_mismatches"] == 0
    assert report["ort"] == {"elements": 16, "equal": 16, "max_abs_diff": 0}
    (op,) = report["host_ops"]
    assert op.keys() >= {"name", "op", "reason", "seconds"}
    assert (op["name"], op["op"], op["reason"]) == (
        "hard_node",
        "Hardmax",
        "operator not supported",
    )
    assert len(report["layers"]) == 2
    assert report["macs"] == sum(layer["macs"] for layer in report["layers"])
    assert sorted(p.name for p in tmp_path.glob("p.*")) == ["p.0.bin", "p.1.bin"]


def test_mismatches_are_found_in_every_segment(mixed, tmp_path, monkeypatch):
    """The second program on a machine that gets one element wrong."""
    out, calls = tmp_path / "report.json", []
    true = session.execute

    def wrong(driver, program, inputs, **options):
        done = true(driver, program, inputs, **options)
        calls.append(program)
        if len(calls) > 2:
            name = program.outputs[0].tensor
            done.tensors[name][0, 1, 1, 1] ^= 1
        return done

    monkeypatch.setattr(session, "execute", wrong)
    result = cli(mixed, "--sim", "commands", "--json", out)
    assert result.exit_code == 1
    assert len(calls) == 4
    report = json.loads(out.read_text())
    assert report["golden_mismatches"] == 2
    assert "tensor y1 element [0, 1, 1, 1]" in report["first_mismatch"]


def test_float_model_with_samples(tmp_path):
    rng = np.random.default_rng(5)
    weights = rng.normal(size=(4, 3, 3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], name="c"),
            helper.make_node("Relu", ["c"], ["r"], name="r"),
            helper.make_node("Hardmax", ["r"], ["y"], name="y", axis=1),
        ],
        "float",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, "side", 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "f.onnx")
    samples = tmp_path / "samples.npz"
    np.savez(samples, x=rng.normal(size=(8, 3, 6, 6)).astype(np.float32))
    out = tmp_path / "report.json"
    command = [tmp_path / "f.onnx", "--dim", "side=6", "--sim", "commands", "--json", out]
    result = cli(*command)
    assert result.exit_code == 2
    assert "is a float model: calibrate it with --calibrate" in result.stderr
    result = cli(*command, "--calibrate", samples)
    assert result.exit_code == 0, result.stderr
    report = json.loads(out.read_text())
    assert report["model"] == "f.onnx"
    assert [layer["op"] for layer in report["layers"]] == ["Conv"]
    assert [op["op"] for op in report["host_ops"]] == ["Hardmax"]
    assert report["ort"] == {"elements": 64, "equal": 64, "max_abs_diff": 0}


def test_pictures_are_preprocessed_and_said_to_be_changed(tmp_path):
    """As ``sw.quantize`` does it: of 0..1 less the mean, by the deviation."""
    picture, one, two = tmp_path / "p.png", tmp_path / "1.npz", tmp_path / "2.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (16, 12, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(picture)
    options = ["--mean", "0.25", "--std", "1/2", "--sim", "golden"]
    result = cli(DIGITS, "--input", picture, *options, "--output", one)
    assert result.exit_code == 0, result.stderr
    assert "resized from 16x12 to 8x8" in result.stdout and "into grey" in result.stdout
    grey = np.asarray(Image.fromarray(pixels).convert("L").resize((8, 8)), np.float32) / 255
    np.save(tmp_path / "x.npy", ((grey - 0.25) / 0.5)[None, None].astype(np.float32))
    result = cli(DIGITS, "--input", tmp_path / "x.npy", "--sim", "golden", "--output", two)
    assert result.exit_code == 0 and "resized" not in result.stdout
    with np.load(one) as a, np.load(two) as b:
        assert np.array_equal(a["logits"], b["logits"])


def test_accuracy_on_labelled_samples(tmp_path):
    out = tmp_path / "r.json"
    with np.load(digits.TEST_SET) as data:
        y = data["y"][:20].copy()
        y[:5] = (y[:5] + 1) % 10
        np.savez(tmp_path / "s.npz", x=data["x"][:20], y=y)
    options = ["--sim", "golden", "--json", out, "--samples", tmp_path / "s.npz"]
    result = cli(DIGITS, *options, "--float", DIGITS)
    assert result.exit_code == 0, result.stderr
    assert "accuracy on 20 samples: accelerator (golden) 75.00 %" in result.stdout
    assert "onnxruntime int8 75.00 %, float 75.00 %" in result.stdout
    report = json.loads(out.read_text())
    assert (report["accelerator"], report["same_class"]) == (0.75, 1.0)
    for more in (["--output", out], ["--input", out], ["--seed", 3], ["--check", "outputs"]):
        assert f"{more[0]}: of one run" in cli(DIGITS, *options, *more).stderr


def test_labels_from_a_text(tmp_path):
    labels = tmp_path / "labels.csv"
    with np.load(digits.TEST_SET) as data:
        np.save(tmp_path / "x.npy", data["x"][:8])
        lines = [f"{i}.png, {label}" for i, label in enumerate(data["y"][:8])]
    options = ["--sim", "golden", "--samples", tmp_path / "x.npy", "--labels", labels]
    for heading in ([], ["name,label"]):
        labels.write_text("\n".join([*heading, *lines, ""]))
        result = cli(DIGITS, *options)
        assert result.exit_code == 0, result.stderr
        assert "accuracy on 8 samples" in result.stdout
    labels.write_text("1\n2\nthree\n")
    result = cli(DIGITS, *options)
    assert result.exit_code == 2
    assert "labels.csv, line 3: 'three' is no class number" in result.stderr


BAD_FILES = {
    "absent.onnx": None,
    "empty.onnx": b"",
    "text.onnx": b"hello, this is no model\n",
    "truncated.onnx": DIGITS.read_bytes()[:3000],
    "wrong_shape.npy": np.zeros((2, 3), np.float32),
    "wrong_type.npy": np.zeros((1, 8, 8), "U1"),
    "not_finite.npy": np.full((1, 1, 8, 8), np.nan, np.float32),
    "damaged.npz": b"PK\x03\x04 nothing more",
    "damaged.png": b"\x89PNG nothing more",
    "input.txt": b"1 2 3",
    "illegal.toml": b"rows = 3\n",
    "unknown.toml": b"rows = 8\nspeed = 9\n",
    "damaged.toml": b"rows = = 3\n",
    "a_file": b"",
}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["absent.onnx"], "no such file"),
        (["empty.onnx"], "not an ONNX model"),
        (["text.onnx"], "not a readable ONNX model"),
        (["truncated.onnx"], "not a readable ONNX model"),
        (["."], "no such file"),
        ([DIGITS, "--input", "absent.npz"], "No such file"),
        ([DIGITS, "--input", "wrong_shape.npy"], "the model takes (1, 1, 8, 8)"),
        ([DIGITS, "--input", "wrong_type.npy"], "the model takes float32"),
        ([DIGITS, "--input", "not_finite.npy"], "not finite"),
        ([DIGITS, "--input", "damaged.npz"], "not a readable .npz file"),
        ([DIGITS, "--input", "damaged.png"], "cannot be read as an image"),
        ([DIGITS, "--input", "input.txt"], "must end in"),
        ([DIGITS, "--config", "absent.toml"], "No such file"),
        ([DIGITS, "--config", "illegal.toml"], "rows"),
        ([DIGITS, "--config", "unknown.toml"], "speed"),
        ([DIGITS, "--config", "damaged.toml"], "damaged.toml"),
        ([DIGITS, "--rows", "3"], "rows x cols = 3 x 3"),
        ([DIGITS, "--rows", "0", "--cols", "8"], "rows x cols = 0 x 8"),
        ([DIGITS, "--rows", "8", "--config", "illegal.toml"], "exclude each other"),
        ([DIGITS, "--sim", "spice"], "--sim spice: must be one of"),
        ([DIGITS, "--check", "nothing"], "--check nothing: must be one of"),
        ([DIGITS, "--json", "no/folder/r.json"], "its folder does not exist"),
        ([DIGITS, "--trace", "a_file/t.pftrace"], "its folder does not exist"),
        ([DIGITS, "--json", "."], "is a folder"),
        ([DIGITS, "--json", "/proc/report.json"], "cannot be written"),
        ([DIGITS, "--dim", "N"], "--dim N: must be"),
        ([DIGITS, "--float", DIGITS], "--float goes with --samples"),
        ([DIGITS, "--std", "0"], "--std and --scale not 0"),
        ([DIGITS, "--layout", "chw"], "--layout chw: must be one of"),
        ([DIGITS, "--dim", "depth=2"], "no open dimension depth"),
        ([DIGITS, "--calibrate", "damaged.npz"], "not a readable .npz file"),
        ([DIGITS, "--calibrate", digits.TEST_SET], "already"),
        (["mixed.onnx", "--no-fallback"], "Hardmax 'hard_node': operator not supported"),
        ([DIGITS, "--sim", "icarus"], "Icarus Verilog is not installed"),
    ],
)
def test_bad_input(arguments, message, tmp_path, monkeypatch, mixed):
    """Status 2, one sentence on stderr, and no file is left behind."""
    for name, content in BAD_FILES.items():
        path = tmp_path / name
        if isinstance(content, np.ndarray):
            np.save(path, content)
        elif content is not None:
            path.write_bytes(content)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    chosen = [] if "--sim" in arguments else ["--sim", "commands"]
    outputs = [] if "--json" in arguments else ["--json", "out.json"]
    if "icarus" in arguments:  # of which nothing is installed, as far as PATH can tell
        monkeypatch.setenv("PATH", "/nonexistent")
    result = cli(*arguments, *chosen, *outputs, "--program", "out.bin")
    assert result.exit_code == 2, result.stdout
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def undefined_value(model):
    model.graph.node[-1].input[0] = "nothing"


def conflicting_shapes(model):
    """As onnxruntime only finds when it runs the model."""
    axis = next(t for t in model.graph.initializer if t.name.endswith("_scale"))
    axis.CopyFrom(numpy_helper.from_array(np.full(3, 0.1, np.float32), axis.name))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (None, "no such file"),
        (undefined_value, "input 'nothing' is defined by no node, input or initialiser"),
        (conflicting_shapes, "onnxruntime cannot run the model: "),
    ],
)
def test_as_a_command(spoil, message, tmp_path):
    """The same in a process of its own: no library adds a line."""
    path = tmp_path / "model.onnx"
    if spoil is not None:
        model = model_with_host_operator()
        spoil(model)
        onnx.save(model, path)
    command = [sys.executable, "-m", "sw.run", str(path), "--sim", "commands"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(run.__file__).resolve().parents[2]
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


@pytest.mark.xdist_group("16x16")
def test_digits_on_the_rtl(tmp_path):
    """The bundled model on Verilator: cycles, timeline and report."""
    if shutil.which("make") is None or shutil.which("g++") is None:
        pytest.skip("Verilator needs make and g++")
    out, trace = tmp_path / "report.json", tmp_path / "digits.pftrace"
    result = cli(DIGITS, "--json", out, "--trace", trace)
    assert result.exit_code == 0, result.stderr
    report = json.loads(out.read_text())
    assert report["golden_mismatches"] == 0
    assert report["cycles"] == sum(layer["cycles"] for layer in report["layers"]) > 0
    assert abs(report["cycles"] / report["predicted_cycles"] - 1) < 0.2
    assert report["host_ops"] == []
    assert trace.stat().st_size > 100
