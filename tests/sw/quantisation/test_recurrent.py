"""Recurrent operators: written out in float against onnxruntime's own, then quantised."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from systole import api
from systole.sw.frontend.inputs import InputError
from systole.sw.quantisation.pipeline import QuantisationOptions, quantise_model
from systole.sw.quantisation.prepare import prepare, session
from systole.sw.quantisation.recurrent import GATES, left_float
from systole.sw.quantisation.report import QuantisationReport

SHARED = Path(__file__).resolve().parents[4] / "shared"
BATCH, WIDTH, HIDDEN = 2, 6, 8


class Net:
    """One recurrent operator as a model, all of its results given; weights from one seed."""

    def __init__(self, kind: str, steps: int = 5, batch: int = BATCH, **attributes):
        self.rng = np.random.default_rng(0)
        self.kind, self.steps, self.batch = kind, steps, batch
        self.attributes = attributes
        self.directions = 2 if attributes.get("direction") == "bidirectional" else 1
        gates = len(GATES[kind])
        shape = (self.directions, gates * HIDDEN)
        self.constants = {"w": self.normal(*shape, WIDTH), "r": self.normal(*shape, HIDDEN)}
        self.operands = ["x", "w", "r", "", "", "", "", ""]
        self.inputs = {"x": (steps, batch, WIDTH)}

    def normal(self, *shape: int) -> np.ndarray:
        return (0.6 * self.rng.normal(size=shape)).astype(np.float32)

    def constant(self, index: int, name: str, array: np.ndarray) -> Net:
        self.constants[name] = array
        self.operands[index] = name
        return self

    def bias(self) -> Net:
        return self.constant(
            3, "b", self.normal(self.directions, 2 * len(GATES[self.kind]) * HIDDEN)
        )

    def peepholes(self) -> Net:
        return self.constant(7, "p", self.normal(self.directions, 3 * HIDDEN))

    def lengths(self, length: int) -> Net:
        return self.constant(4, "lengths", np.full(self.batch, length, np.int32))

    def states(self, how: str) -> Net:
        """Initial states: ``absent``, ``zero``, ``constant`` or ``input``."""
        shape = (self.directions, self.batch, HIDDEN)
        for index, name in ((5, "h"), (6, "c")):
            if how == "absent" or (name == "c" and self.kind != "LSTM"):
                continue
            if how == "input":
                self.inputs[name] = shape
                self.operands[index] = name
            else:
                array = self.normal(*shape) if how == "constant" else np.zeros(shape, np.float32)
                self.constant(index, name, array)
        return self

    def save(self, path: Path) -> Path:
        results = ["y", "y_h", *(["y_c"] if self.kind == "LSTM" else [])]
        operands = self.operands if self.kind == "LSTM" else self.operands[:6]
        node = helper.make_node(
            self.kind, operands, results, "rnn", hidden_size=HIDDEN, **self.attributes
        )
        graph = helper.make_graph(
            [node],
            "net",
            [
                helper.make_tensor_value_info(n, TensorProto.FLOAT, s)
                for n, s in self.inputs.items()
            ],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in results],
            [numpy_helper.from_array(a, n) for n, a in self.constants.items()],
        )
        opsets = [helper.make_opsetid("", 14)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
        return path

    def feeds(self) -> dict[str, np.ndarray]:
        return {name: self.normal(*shape) * 2 for name, shape in self.inputs.items()}


def kinds(model: onnx.ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


def worst(report: QuantisationReport) -> float:
    """The least signal to noise of a model's outputs, in dB."""
    return float(np.min(np.array([*report.outputs_snr_db.values()], float)))


def check_float(net: Net, tmp_path: Path) -> None:
    """The rewrite computes what onnxruntime's operator does."""
    path = net.save(tmp_path / "net.onnx")
    model = prepare(path)
    assert not kinds(model) & {"LSTM", "GRU", "RNN"}
    feeds = net.feeds()
    for a, b in zip(session(onnx.load(path)).run(None, feeds), session(model).run(None, feeds)):
        assert a.shape == b.shape
        np.testing.assert_allclose(b, a, atol=3e-6)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("states", ["absent", "zero", "constant", "input"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_float_equals_the_operator(kind, direction, states, steps, tmp_path):
    check_float(Net(kind, steps, direction=direction).bias().states(states), tmp_path)


VARIANTS = {
    "no bias": Net("LSTM"),
    "peepholes": Net("LSTM").bias().peepholes(),
    "peepholes on a state": Net("LSTM", direction="reverse").peepholes().states("input"),
    "clip": Net("LSTM", clip=0.7).bias(),
    "clip and peepholes": Net("LSTM", clip=0.4).bias().peepholes().states("constant"),
    "clipped GRU": Net("GRU", clip=0.5).bias(),
    "reset behind the product": Net("GRU", linear_before_reset=1).bias(),
    "and a state": Net("GRU", linear_before_reset=1).bias().states("input"),
    "and two directions": Net("GRU", linear_before_reset=1, direction="bidirectional").bias(),
    "lengths": Net("LSTM").bias().lengths(5),
    "other functions": Net("LSTM", activations=["Softsign", "Relu", "Tanh"]).bias(),
    "other gates of a GRU": Net("GRU", activations=["Softsign", "Tanh"]).bias(),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_float_equals_variants_of_the_operator(name, tmp_path):
    check_float(VARIANTS[name], tmp_path)


LEFT = {
    "input_forget is 1, and must be 0": Net("LSTM", input_forget=1),
    "sequence_lens must be constant, and the whole length of 5": Net("LSTM").lengths(3),
    "activation ThresholdedRelu is not one of": Net("RNN", activations=["ThresholdedRelu"]),
    "its sequence has 513 steps; at most 512 are written out": Net("RNN", 513),
}


@pytest.mark.parametrize("reason", LEFT)
def test_what_cannot_be_written_out_stays(reason, tmp_path):
    model = prepare(LEFT[reason].save(tmp_path / "net.onnx"))
    assert kinds(model) == {LEFT[reason].kind}
    (why,) = left_float(model).values()
    assert why.startswith(reason)


def test_the_report_names_what_stays_float(tmp_path):
    """Beside it, something is left to quantise."""
    model = onnx.load(Net("LSTM", input_forget=1).save(tmp_path / "net.onnx"))
    model.graph.node.append(helper.make_node("Sigmoid", ["y"], ["positive"], "relu"))
    model.graph.output.append(helper.make_tensor_value_info("positive", TensorProto.FLOAT, None))
    x = np.random.default_rng(1).normal(size=(8, 5, BATCH, WIDTH)).astype(np.float32)
    _, report = api.quantize(model, {"x": x})
    assert report.left_float == {"rnn": "input_forget is 1, and must be 0"}
    assert worst(report) > 25


def test_an_excluded_operator_stays(tmp_path):
    path = Net("GRU").bias().save(tmp_path / "net.onnx")
    for name in ("GRU", "rnn", "y_h"):
        assert kinds(prepare(path, exclude=[name])) == {"GRU"}
    with pytest.raises(InputError):
        api.quantize(path, {"x": np.zeros((0, 5, BATCH, WIDTH), np.float32)})


def decibels(expected: np.ndarray, actual: np.ndarray) -> float:
    noise = ((expected.astype(float) - actual) ** 2).sum()
    return float(10 * np.log10((expected.astype(float) ** 2).sum() / noise))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_quantised_it_runs_on_the_accelerator(kind, direction, tmp_path):
    net = Net(kind, 4, batch=1, direction=direction).bias()
    path = net.save(tmp_path / "net.onnx")
    feeds = [net.feeds() for _ in range(12)]
    int8, report = api.quantize(path, {"x": np.stack([f["x"] for f in feeds])})
    assert worst(report) > 28
    assert len(report.states_snr_db) == (0 if kind == "RNN" else net.directions)
    result = api.run(int8, feeds[0], simulator="commands")
    assert result.report.golden_mismatches == 0
    assert result.report.host_ops == []


def stream(model: onnx.ModelProto, xs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hidden and cell states over a sequence that is given step by step."""
    run = session(model)
    h = c = np.zeros((1, 1, HIDDEN), np.float32)
    states = []
    for x in xs:
        _, h, c = run.run(None, {"x": x, "h": h, "c": c})
        states.append((h, c))
    hidden, cell = zip(*states, strict=True)
    return np.array(hidden), np.array(cell)


def slow_cell(steps: int = 1, states: str = "input") -> Net:
    """An LSTM that keeps its cell for some fifty steps, and changes it by little."""
    net = Net("LSTM", steps, batch=1).bias().states(states)
    net.constants["b"][0, 2 * HIDDEN : 3 * HIDDEN] = 4  # the gate that keeps
    net.constants["b"][0, :HIDDEN] = -2  # the gate that lets in
    return net


def test_a_state_in_8_bits_keeps_what_rounding_takes_off_it(tmp_path):
    """Without its rest, a cell that changes by less than half a step of its scale stands still."""
    net = slow_cell()
    path = net.save(tmp_path / "net.onnx")
    xs = np.stack([net.normal(1, 1, WIDTH) * 2 + 0.5 for _ in range(300)])
    model = prepare(path)
    h, c = stream(model, xs)
    before = np.zeros((1, 1, 1, HIDDEN), np.float32)
    feeds = {"x": xs, "h": np.concatenate([before, h[:-1]]), "c": np.concatenate([before, c[:-1]])}
    int8 = quantise_model(path, feeds)
    assert any(node.name.endswith("initial_sub") for node in int8.graph.node)
    hidden, cell = stream(int8, xs)
    assert decibels(c, cell) > 30
    assert decibels(h, hidden) > 23


def test_the_rest_goes_from_step_to_step(tmp_path):
    net = slow_cell(60, "absent")
    path = net.save(tmp_path / "net.onnx")
    x = np.stack([net.feeds()["x"] + np.float32(0.5) for _ in range(6)])
    _, report = api.quantize(path, {"x": x})
    assert worst(report) > 27


def test_a_rest_that_is_of_no_use_is_left_out(tmp_path):
    """A GRU whose state jumps from one end of its range to the other."""
    net = Net("GRU", 4, batch=1)
    net.constants["w"] *= 10
    int8 = quantise_model(
        net.save(tmp_path / "net.onnx"), {"x": np.stack([net.feeds()["x"] for _ in range(12)])}
    )
    assert not [
        node.name for node in int8.graph.node if "rest" in node.name or "moved" in node.name
    ]


def test_a_float_operator_in_a_quantised_model_is_written_out(tmp_path):
    """What is quantised stays; the split of the inputs' product gets pairs, or it would tie all
    steps together."""
    net = Net("LSTM", 4, batch=1).bias()
    model = onnx.load(net.save(tmp_path / "net.onnx"))
    nodes = [
        helper.make_node("Squeeze", ["y_h", "axis"], ["features"], "squeeze"),
        helper.make_node("Gemm", ["features", "v"], ["z"], "gemm"),
    ]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(numpy_helper.from_array(np.array([0]), "axis"))
    model.graph.initializer.append(numpy_helper.from_array(net.normal(HIDDEN, 3), "v"))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    x = np.stack([net.feeds()["x"] for _ in range(12)])
    partly, _ = api.quantize(model, {"x": x}, options=QuantisationOptions(exclude=["LSTM"]))
    assert "LSTM" in kinds(partly)
    int8, report = api.quantize(partly, {"x": x})
    assert worst(report) > 28
    result = api.run(int8, x[0], simulator="commands")
    assert result.report.golden_mismatches == 0
    assert result.report.host_ops == []


@pytest.mark.long
def test_a_keyword_spotter_around_a_float_lstm():
    """Partly quantised: its LSTM was left float."""
    path = SHARED / "cases" / "lstm_kws_int8.onnx"
    if not path.exists():
        pytest.skip("no folder of cases")
    rng = np.random.default_rng(1)
    x = rng.normal(size=(4, 1, 49, 40)).cumsum(axis=2).astype(np.float32)
    x -= x.mean(axis=2, keepdims=True)
    int8, report = api.quantize(path, {"x": x})
    assert worst(report) > 30
    plan = api.check(int8)
    assert not [p for p in plan if p.host and p.macs]
    assert json.loads(report.to_json())["states_snr_db"]


def voices() -> np.ndarray:
    """Four seconds of vowels over noise, as frames of 512 samples behind 64 of the last frame."""
    rng, rate = np.random.default_rng(0), 16000
    t = np.arange(4 * rate) / rate
    sound = 0.01 * rng.normal(size=t.size)
    for _ in range(8):
        pitch, start, length = (
            100 + 100 * rng.random(),
            3.4 * rng.random(),
            0.2 + 0.4 * rng.random(),
        )
        envelope = np.exp(-(((t - start - length / 2) / (length / 2.5)) ** 4))
        vibrato = 1 + 0.01 * np.sin(2 * np.pi * 4 * t)
        tones = [np.sin(2 * np.pi * pitch * k * t * vibrato) / k for k in range(1, 30)]
        sound += 0.15 * envelope * sum(rng.random() * tone for tone in tones)
    sound = np.concatenate([np.zeros(64), np.clip(sound, -1, 1)]).astype(np.float32)
    return np.stack([sound[i : i + 576] for i in range(0, len(sound) - 575, 512)])


@pytest.mark.long
def test_voice_activity_over_a_stream(tmp_path):
    """silero-vad: a spectrum, convolutions, and one step of an LSTM with its state outside."""
    package = importlib.util.find_spec("silero_vad")
    if package is None or package.origin is None:
        pytest.skip("silero-vad is not installed")
    path = Path(package.origin).parent / "data" / "silero_vad_openvino_16k.onnx"
    frames = voices()
    expected, state, before = [], np.zeros((2, 1, 128), np.float32), []
    run = session(prepare(path))
    for frame in frames:
        before.append(state)
        speech, state = run.run(None, {"input": frame[None], "state": state})
        expected.append(speech.item())
    int8, _ = api.quantize(path, {"input": frames[:, None], "state": np.stack(before)})
    actual, state = [], np.zeros((2, 1, 128), np.float32)
    run = session(int8)
    for frame in frames:
        speech, state = run.run(None, {"input": frame[None], "state": state})
        actual.append(speech.item())
    assert np.mean((np.array(expected) > 0.5) == (np.array(actual) > 0.5)) > 0.94
    assert np.abs(np.subtract(expected, actual)).mean() < 0.05
    assert not [p for p in api.check(int8) if p.host and p.macs]
    inputs = {"input": frames[50][None], "state": before[50]}
    assert api.run(int8, inputs, simulator="commands").report.golden_mismatches == 0
