"""``systole diff``: what it prints, and how it refuses bad input."""

import numpy as np
import typer
from typer.testing import CliRunner

from systole.sw.cli import diff as command
from systole.sw.cli.common import output_console
from systole.sw.session.diff import Difference, TensorDiff
from tests.helpers.diff_models import convolutions, saved


def cli(*arguments):
    app = typer.Typer()
    app.command()(command.main)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_command_line(tmp_path):
    path = saved(convolutions(3, host_before=1), tmp_path / "m.onnx")
    result = cli(path, "--seed", 4)
    assert result.exit_code == 0, result.stderr
    assert "seed 4" in result.stdout
    assert "all 3 compared tensors are equal" in result.stdout
    assert "exposing the intermediate values changed 0 of 144 elements" in result.stdout


def test_first_offender_is_marked(capsys):
    same, other = Difference(4, 4, 0, 0.0), Difference(4, 3, 2, 0.5)
    rows = [TensorDiff(f"layer{i}", "Conv", f"y{i}", d, None) for i, d in enumerate([same, other])]
    rows.append(TensorDiff("inner", "MaxPool", "inside", None, None))
    command.show(rows, output_console())
    out = capsys.readouterr().out
    assert next(line for line in out.splitlines() if "first ->" in line).count("layer1") == 1
    assert "first difference: layer 'layer1', tensor 'y1'" in out
    assert "1 tensors have no counterpart in the model" in out


def test_the_table_survives_a_pipe(capsys):
    """Any name in full, one line a row, and no lines drawn."""
    same, name = Difference(4_000_000, 4_000_000, 0, 0.0), "/long/[b]" * 30 + "/end"
    rows = [TensorDiff(name, "Conv+Add+Relu+Mul", name, same, same, 0)] * 3
    command.show(rows, output_console())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "golden model against onnxruntime, in quantised units"
    assert [line.split()[:3] for line in lines[2:5]] == [[name, "Conv+Add+Relu+Mul", name]] * 3
    assert all("4,000,000" in line and line.isascii() for line in lines[2:5])
    assert lines[5:] == ["all 3 compared tensors are equal"]


def test_no_layer_is_blamed_for_what_the_host_gave_it(capsys):
    same, other = Difference(4, 4, 0, 0.0), Difference(4, 3, 2, 0.5)
    command.show([TensorDiff("behind", "Conv", "y", other, same, 0)], output_console())
    out = capsys.readouterr().out
    assert "first ->" not in out and "every layer by itself equals onnxruntime's" in out


def test_bad_input_is_one_sentence(tmp_path):
    good = saved(convolutions(1), tmp_path / "m.onnx")
    wrong = tmp_path / "wrong.npy"
    np.save(wrong, np.zeros((2, 2), np.int8))
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    for arguments in (
        [tmp_path / "none.onnx"],
        [broken],
        [good, "--input", wrong],
        [good, "--input", tmp_path / "none.npy"],
        [good, "--dim", "N"],
    ):
        result = cli(*arguments)
        assert result.exit_code == 2, arguments
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        assert "Traceback" not in result.output
