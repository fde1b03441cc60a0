"""Published models through golden model and programs. The models are no part of the project."""

from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from systole.isa import Config
from systole.sw.cli import modeltable
from systole.sw.frontend.inputs import InputError
from systole.sw.ir.graph import Port, Tensor
from systole.sw.zoo.recipes import KWS, ML_KWS, RECIPES, Recipe

MODELS = Path(__file__).resolve().parents[4] / "shared" / "models"
needs_models = pytest.mark.skipif(
    not MODELS.is_dir(), reason=f"the published models are not in {MODELS}"
)


def cli(*arguments):
    app = typer.Typer()
    app.command()(modeltable.main)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def recipe(name: str) -> Recipe:
    return next(r for r in RECIPES if r.name == name)


@needs_models
@pytest.mark.parametrize("name", ["kws_int8", "ic_int8"])
def test_programs_of_published_models(name):
    """Handfuls of samples: all layers of the program as golden, and classes as onnxruntime."""
    row = modeltable.measure(recipe(name), MODELS, 5, Config(), commands=2)
    assert not row.refusal
    assert row.mismatches == {"commands": (2, 0)}
    assert (row.equal, row.largest) == (row.elements, 0)
    assert row.same_class == row.samples == 5
    assert row.scores["golden"] == row.scores["int8"] >= 0.6
    assert [op for op, _ in row.host] in ([], ["Softmax"])


@needs_models
def test_table_of_a_float_model(tmp_path):
    out = tmp_path / "models.md"
    arguments = ["--models", MODELS, "-o", out, "--samples", 4, "--commands", 1]
    result = cli(*arguments, "--only", "mnist_cntk_float")
    assert result.exit_code == 0, result.stderr
    (line,) = (x for x in out.read_text().splitlines() if x.startswith("| mnist_cntk_float"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert len(cells) == len(modeltable.COLUMNS)
    table = dict(zip(modeltable.COLUMNS, cells, strict=True))
    assert table["samples"] == "4" and table["commands"] == "0 / 1" and table["RTL"] == "-"
    assert table["equal to onnxruntime"].startswith("100.000 % of 40")


def port(shape, dtype="float32", scale=1.0):
    perm = tuple(range(len(shape)))
    tensor = Tensor("x", (1, int(np.prod(shape)), 1, 1), np.float32(scale), 3, False, shape, perm)
    return Port("x", "x", dtype), tensor


def test_preparation():
    picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    shifted = Recipe("m.onnx", "d.npz", "x", shift=-128.0).prepare(
        picture, *port((1, 2, 2, 3), "int8")
    )
    assert shifted.dtype == np.int8 and shifted[0, 1, 1, 2] == 11 - 128
    per_channel = Recipe(
        "m.onnx", "d.npz", "x", scale=(1, 2, 3), shift=(0, 1, 2), channels_first=True
    ).prepare(picture, *port((1, 3, 2, 2)))
    assert per_channel[0, :, 1, 1].tolist() == [9, 21, 35]
    real = np.array([0.5, 100.0], np.float32)
    quantised = Recipe("m.onnx", "d.npz", "x", quantise=True).prepare(
        real, *port((1, 2), "int8", 0.25)
    )
    assert quantised.tolist() == [[5, 127]]
    with pytest.raises(InputError, match="takes"):
        Recipe("m.onnx", "d.npz", "x").prepare(picture, *port((1, 5)))


def test_labels_are_translated(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.zeros((2, 3)), y=[KWS.index("yes"), KWS.index("silence")])
    labels = recipe("ml_kws_cnn_s_float").labels
    _, truth = Recipe("m.onnx", "d.npz", "x", labels=labels).samples(tmp_path)
    assert truth.tolist() == [ML_KWS.index("yes"), ML_KWS.index("silence")]


def test_document_tells_refusals_and_mismatches():
    refused = modeltable.ModelRow(recipe("kws_int8"), refusal="Foo 'x': no")
    both = [
        modeltable.ModelRow(
            recipe(name),
            samples=4,
            elements=100,
            equal=99,
            largest=1,
            scores={"float": 0.5, "int8": 0.75, "golden": None},
            same_class=3,
            mismatches={"commands": (2, 7)},
            host=[("Softmax", "operator not supported")],
        )
        for name in ("ic_int8", "vww_int8")
    ]
    text = modeltable.document([refused, *both], Config())
    assert "| kws_int8 | refused |" in text and "* kws_int8: refused: Foo 'x': no" in text
    row = "| ic_int8 | 4 | 99.000 % of 100 | 1 | 50.0 % | 75.0 % | - | 3/4 | 7 / 2 | - | - |"
    assert row in text
    assert "* ic_int8, vww_int8: 1 Softmax on the host: operator not supported" in text


def test_bad_input_is_one_sentence(tmp_path):
    for arguments in (
        ["--models", tmp_path, "-o", tmp_path / "t.md"],
        ["--models", tmp_path, "-o", tmp_path / "t.md", "--only", "nonsense"],
        ["--models", tmp_path, "-o", tmp_path / "none" / "t.md"],
    ):
        result = cli(*arguments)
        assert result.exit_code == 2, arguments
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    with pytest.raises(InputError, match="cannot be read"):
        recipe("kws_int8").samples(tmp_path)
