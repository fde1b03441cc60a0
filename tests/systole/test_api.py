"""The public interface: its examples run, and it returns and raises what it says."""

import doctest
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import systole
from systole.sw.golden import oracle
from systole.sw.zoo import digits
from tests.sw.cli.test_run import model_with_host_operator

FUNCTIONS = (
    "accuracy",
    "check",
    "compile",
    "generate",
    "open_device",
    "predict",
    "quantize",
    "run",
)


@pytest.fixture(scope="module")
def compiled():
    return systole.compile(digits.MODEL)


@pytest.fixture(scope="module")
def mixed():
    """Accelerator, host, accelerator; given as a model, not as a file."""
    return systole.compile(model_with_host_operator(), systole.Config.sized(8, 8))


@pytest.mark.parametrize("name", [None, *FUNCTIONS])
def test_examples(name):
    """The example of the package or of a function runs and prints what it shows."""
    subject = systole if name is None else getattr(systole, name)
    (example,) = doctest.DocTestFinder(recurse=False).find(subject, name or "systole")
    assert example.examples
    printed: list[str] = []
    results = doctest.DocTestRunner().run(example, out=printed.append)
    assert results.failed == 0, "".join(printed)


def test_every_public_name_is_documented():
    functions = {n for n in systole.__all__ if inspect.isfunction(getattr(systole, n))}
    assert functions == {*FUNCTIONS}
    for name in set(systole.__all__) - {"__version__"}:
        subject = getattr(systole, name)
        text = inspect.cleandoc(subject.__doc__)
        assert text.splitlines()[0][0].isupper(), name
        if name in FUNCTIONS:
            arguments = [p for p in inspect.signature(subject).parameters]
            section = text.split("Args:")[1].split("Returns:")[0]
            assert all(f"    {a}: " in section for a in arguments), name
            assert "Raises:" in text, name


def test_names_are_those_of_their_modules():
    for name, home in systole._HOMES.items():
        module = importlib.import_module(f"systole.{home}")
        assert getattr(systole, name).__module__ in (module.__name__, "systole.isa.config")
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = systole.nonsense


def test_importing_it_imports_nothing_heavy():
    code = "import sys, systole; print(*{'onnxruntime', 'amaranth', 'numpy'} & {*sys.modules})"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def test_outputs_are_the_models_own(mixed):
    """Of a model that ends on the accelerator and one that ends on the host."""
    x = np.random.default_rng(0).integers(-128, 128, (1, 4, 6, 6)).astype(np.int8)
    report, outputs = systole.run(mixed, x, simulator="commands")
    assert report.model == mixed.name and len(mixed.programs) == 2
    expected = oracle.run(mixed.partition.path, {"x": x})
    assert outputs.keys() == expected.keys()
    for name, array in expected.items():
        assert outputs[name].dtype == array.dtype and np.array_equal(outputs[name], array)


def test_a_device_of_ones_own_serves_several_runs(compiled):
    pictures = np.load(digits.TEST_SET)["x"][:2]
    with systole.open_device("commands") as device:
        assert isinstance(device, systole.Device)
        for picture in pictures:
            result = systole.run(compiled, picture, simulator=device)
            assert result.report.golden_mismatches == 0
            assert result.report.simulator == "CommandDevice"
            assert result.report.cycles is None
            alone = systole.run(compiled, picture, simulator="golden")
            assert np.array_equal(result.outputs["logits"], alone.outputs["logits"])
        device.read_memory(0, 16)  # It is still open.


def test_a_device_of_another_configuration_is_refused(compiled):
    with (
        systole.open_device("commands", systole.Config.sized(8, 8)) as device,
        pytest.raises(systole.DeviceError, match="another configuration"),
    ):
        systole.run(compiled, simulator=device)


def test_mismatches_are_reported(compiled):
    """A device whose memory loses a bit of the output."""
    place = compiled.programs[0].tensors[compiled.programs[0].outputs[0].tensor]
    with systole.open_device("commands") as device:
        read = device.read_memory

        def wrong(addr, n):
            data = bytearray(read(addr, n))
            if addr == place.offset:
                data[0] ^= 1
            return bytes(data)

        device.read_memory = wrong
        report, _ = systole.run(compiled, simulator=device, check_layers=False)
    assert report.golden_mismatches == 1
    assert "element [0, 0, 0, 0]" in report.first_mismatch


def test_prediction_is_what_a_run_reports(mixed):
    prediction = systole.predict(mixed)
    report, _ = systole.run(mixed, simulator="model")
    assert report.layers == prediction.layers
    assert report.predicted_cycles == prediction.cycles > sum(p.macs for p in report.layers) / 64
    assert report.macs == prediction.macs
    assert prediction.utilisation == pytest.approx(report.macs / (64 * prediction.cycles))
    assert prediction.dram_read_bytes > sum(row.dram_read_bytes for row in report.layers) > 0
    assert report.cycles == prediction.cycles and report.timing == "predicted"
    assert (report.dram_read_bytes, report.dram_write_bytes) == (
        *(prediction.dram_read_bytes, prediction.dram_write_bytes),
    )
    assert report.crossings == prediction.crossings
    # The host's Hardmax takes time that no cycle model knows.
    with pytest.raises(systole.InputError, match="1 operators run on the host"):
        prediction.frames_per_second(100)
    rate = prediction.frames_per_second(report.clock_mhz, report.host_seconds)
    assert rate == pytest.approx(report.frames_per_second)
    assert prediction.frames_per_second(100, 0) == pytest.approx(1e8 / prediction.cycles)


@pytest.mark.parametrize("simulator", ["golden", "commands"])
def test_accuracy_counts_right_classes(compiled, simulator):
    """Of twelve digits, three are labelled wrongly."""
    data = np.load(digits.TEST_SET)
    x, y = data["x"][:12], data["y"][:12].copy()
    before = systole.accuracy(compiled, x, y, simulator=simulator)
    y[:3] = (y[:3] + 1) % 10
    after = systole.accuracy(
        compiled, x, y, simulator=simulator, float_model=compiled.partition.path
    )
    assert (before.simulator, before.samples, before.same_class) == (simulator, 12, 1.0)
    assert before.accelerator == before.onnxruntime == 1.0 and before.float_model is None
    assert after.accelerator == after.onnxruntime == after.float_model == 0.75
    with pytest.raises(systole.InputError, match="accuracy needs labels"):
        systole.accuracy(compiled, x)


def test_programs_are_saved(mixed, compiled, tmp_path):
    assert [p.name for p in mixed.save(tmp_path / "m.bin")] == ["m.0.bin", "m.1.bin"]
    assert compiled.save(tmp_path / "d.bin") == [tmp_path / "d.bin"]
    assert all(path.stat().st_size > 0 for path in tmp_path.iterdir())


def test_bad_input_raises(compiled, tmp_path):
    picture = np.zeros((1, 1, 8, 8), np.float32)
    with pytest.raises(systole.InputError, match=r"image has shape \(3, 3\)"):
        systole.run(compiled, np.zeros((3, 3), np.float32))
    with pytest.raises(systole.InputError, match="no array named image"):
        systole.run(compiled, {"picture": picture})
    with pytest.raises(systole.InputError, match="simulator spice: must be one of verilator"):
        systole.run(compiled, picture, simulator="spice")
    with pytest.raises(systole.InputError, match="simulator golden: must be one of verilator"):
        systole.open_device("golden")
    with pytest.raises(systole.ConfigError, match="compiled for another configuration"):
        systole.predict(compiled, config=systole.Config.sized(8, 8))
    with pytest.raises(systole.ModelError, match="no such file"):
        systole.compile(tmp_path / "none.onnx")
    with pytest.raises(systole.ModelError, match="is quantised already"):
        systole.quantize(digits.MODEL, picture)
    with pytest.raises(systole.ModelError, match="Hardmax"):
        systole.compile(model_with_host_operator(), fallback=False)


def test_a_models_temporary_file_goes_with_it():
    compiled = systole.compile(model_with_host_operator())
    path = compiled.partition.path
    assert onnx.load(path).graph.node
    del compiled
    assert not path.exists()
