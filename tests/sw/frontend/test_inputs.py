"""Input files: what fits is read, and anything else is refused with a sentence."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from systole.sw.frontend.inputs import InputError, read_inputs
from tests.helpers.random_graphs import GraphBuilder

FILES = ("one.npz", "two.npz", "array.npy", "picture.png", "picture.jpg")


@pytest.fixture(scope="module")
def graph():
    b = GraphBuilder(np.random.default_rng(0))
    b.conv(b.input((1, 3, 4, 4)), 4, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1))
    return b.graph(["t0"])


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(1)
    array = rng.integers(-128, 128, (1, 3, 4, 4)).astype(np.int8)
    np.savez(tmp_path / "one.npz", any=array)
    np.savez_compressed(tmp_path / "two.npz", in0=array, other=array)
    np.save(tmp_path / "array.npy", array)
    picture = Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8))
    for name in ("picture.png", "picture.jpg"):
        picture.save(tmp_path / name)
    return tmp_path, array


def test_every_kind_of_file_is_read(graph, files):
    folder, array = files
    for name in FILES:
        got = read_inputs(folder / name, graph)["in0"]
        assert got.shape == array.shape and got.dtype == np.int8
        assert name.startswith("picture") or (got == array).all()


@pytest.mark.parametrize(
    ("source", "name"), [(a, b) for a in FILES for b in FILES if a[-4:] != b[-4:]]
)
def test_files_under_a_wrong_name(graph, files, source, name):
    """Refused; pictures are told by their content."""
    folder, _ = files
    (folder / name).write_bytes((folder / source).read_bytes())
    if source.startswith("picture") and name.startswith("picture"):
        read_inputs(folder / name, graph)
    else:
        with pytest.raises(InputError, match=r"^input .*"):
            read_inputs(folder / name, graph)


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_refused_or_read(graph, files, name):
    folder, _ = files
    data = (folder / name).read_bytes()
    rng = random.Random(name)
    refused = 0
    for i in range(150):
        damaged = bytearray(data)
        if i % 3 == 0:
            del damaged[rng.randrange(len(data)) :]
        else:
            for _ in range(rng.randint(1, 4)):
                damaged[rng.randrange(len(data))] = rng.randrange(256)
        (folder / name).write_bytes(damaged)
        try:
            read_inputs(folder / name, graph)
        except InputError:
            refused += 1
    assert refused > 30
