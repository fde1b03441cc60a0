"""Program files, damaged and made by hand: the program, or one sentence; replayable by seed."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import random
import struct

import numpy as np
import pytest

from systole.isa import Config
from systole.sw.compiler import compile_graph
from systole.sw.ir.graph import Graph
from systole.sw.runtime import program as program_file
from systole.sw.runtime.program import Program, ProgramError
from tests.helpers.random_graphs import GraphBuilder, random_graph

BLOCK, SHORT, LONG = 300, 900, 9000
VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 255, 256, 2**31, 2**32, 2**63, 10**400, -(2**62)),
    *(0.5, 1e300, float("nan"), float("inf"), "", "x", "int8", "packed", [], {}, [[]], [0, 1]),
)


@pytest.fixture(scope="module")
def contents(tmp_path_factory) -> list[tuple[dict, bytes]]:
    """Header and image of some programs."""
    b = GraphBuilder(np.random.default_rng(1))
    b.conv(b.input((1, 3, 4, 4)), 5, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    graphs: list[Graph] = [b.graph(["t0"]), random_graph(2, ops=3, work=50_000)[0]]
    path, out = tmp_path_factory.mktemp("programs") / "p", []
    for graph in graphs:
        compile_graph(graph, Config.sized(6, 4), dump=True).save(path)
        data = path.read_bytes()
        (length,) = struct.unpack_from("<I", data, 12)
        out.append((json.loads(data[48 : 48 + length]), data[48 + length :]))
    return out


def write(path, header: object, image: bytes) -> None:
    """A file with a checksum that is right."""
    text = json.dumps(header).encode()
    digest = hashlib.sha256(text + image).digest()
    path.write_bytes(struct.pack("<8sII32s", b"SYSTOLE\0", 1, len(text), digest) + text + image)


def some_place(rng: random.Random, header: dict) -> tuple:
    """A value somewhere in the header: what holds it, and its key there."""
    holder: dict | list = header
    while True:
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        key = rng.choice(keys)
        inner = holder[key]
        if not isinstance(inner, (dict, list)) or not inner or rng.randrange(4) == 0:
            return holder, key
        holder = inner


def change(rng: random.Random, header: dict) -> None:
    """Change one value anywhere: another value, none, or one more."""
    if not header:
        return
    holder, last = some_place(rng, header)
    kind = rng.randrange(6)
    if kind == 0:
        del holder[last]
    elif kind == 1 and isinstance(holder, list):
        holder.insert(last, copy.deepcopy(holder[last]))
    elif kind == 2 and isinstance(holder, dict):
        holder[rng.choice(["", "x", "name", last + "2"])] = holder.pop(last)
    elif kind == 3 and type(holder[last]) is int:
        holder[last] += rng.choice([-64, -1, 1, 64, 4096])
    else:
        holder[last] = copy.deepcopy(rng.choice(VALUES))


def load_or_sentence(path, seed) -> Program | None:
    try:
        return Program.load(path)
    except ProgramError as e:
        assert str(e).startswith(f"program {path}: "), (seed, str(e))
        assert len(str(e)) < 700 and len(str(e).splitlines()) == 1, (seed, str(e))
        return None
    except Exception as e:
        raise AssertionError(f"seed {seed}: {type(e).__name__}: {e}") from e


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(i, marks=[pytest.mark.long] if i >= SHORT else [])
        for i in range(0, LONG, BLOCK)
    ],
)
def test_changed_headers_and_images(contents, first, tmp_path):
    """One to three changes with a checksum that is right again: what is taken can be used."""
    path, taken = tmp_path / "p", 0
    for seed in range(first, first + BLOCK):
        rng = random.Random(seed)
        header, image = copy.deepcopy(rng.choice(contents))
        for _ in range(rng.randint(0, 3)):
            change(rng, header)
        if rng.randrange(3) == 0:
            data = bytearray(image)
            for _ in range(rng.randint(1, 3)):
                data[rng.randrange(min(len(data), 800))] ^= 1 << rng.randrange(8)
            image = bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        write(path, header, image)
        program = load_or_sentence(path, seed)
        if program is not None:
            taken += 1
            use(program, path)
    assert BLOCK // 10 < taken < BLOCK // 2


def use(program: Program, path) -> None:
    """Whatever a reader does with a program."""
    assert len(list(program.decoded())) == len(program.command_layers)
    assert all(0 <= layer < len(program.layers) for layer in program.command_layers)
    for port in program.outputs:
        assert program.tensors[port.tensor].bytes
    for place in program.tensors.values():
        data = bytes(place.bytes)
        array = place.unpack(data, program.config)
        assert array.shape == place.tensor.shape
        assert len(place.pack(array, program.config)) == place.bytes
        onnx = place.tensor.to_onnx(array)
        assert onnx.shape == place.tensor.onnx_shape
        assert (place.tensor.from_onnx(onnx) == array).all()
    program.save(path)
    assert Program.load(path) == program


def test_changed_bytes(contents, tmp_path):
    path = tmp_path / "p"
    for seed in range(300):
        rng = random.Random(seed)
        write(path, *rng.choice(contents))
        data = bytearray(path.read_bytes())
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(rng.choice([48, len(data)]))] = rng.randrange(256)
        path.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        load_or_sentence(path, seed)


@pytest.mark.parametrize(
    ("way", "value", "message"),
    [
        (("memory_bytes",), 1 << 32, r"header: memory_bytes is 4294967296; it must be a whole"),
        (("command_offset",), 8, r"command_offset is 8; it must be a multiple of 64"),
        (("command_words",), 1 << 30, r"command_words is 1073741824; it must be a whole number"),
        (("command_layers",), [[0, 1 << 40]], r"command_layers is .* how many of the \d+ words"),
        (("command_layers",), [[0, 1]], r"command_layers is \[\[0, 1\]\]; it must be one for each"),
        (("config", "rows"), 1 << 40, r"configuration: rows = 1099511627776: must be 4..64"),
        (("inputs", 0, "dtype"), "float64", r"dtype is 'float64'; it must be one of float32, int8"),
        (("outputs", 0, "tensor"), "gone", r"outputs is .* tensors of the program, and \['gone'\]"),
        (("tensors", "t0", "bytes"), 1, r"tensors\['t0'\]: bytes is 1; it must be \d+, by its"),
        (("tensors", "t0", "tensor", "shape"), [1] * 5, r"shape is .* 4 whole numbers from 1"),
        (("tensors", "t0", "tensor", "scale"), 0, r"scale is 0; it must be a number above 0"),
        (("tensors", "t0", "tensor", "perm"), [0, 0, 1, 2], r"must be an order of the axes"),
        (("layers", 0, "table"), [0] * 255, r"table is .* 256 whole numbers from -128 to 127"),
        (("layers", 0, "more"), 1, r"header: layers\[0\] has an unknown field 'more'"),
        (("model",), 5, r"header: model is 5; it must be text"),
    ],
)
def test_errors_name_field_value_and_limit(contents, way, value, message, tmp_path):
    header = copy.deepcopy(contents[0][0])
    holder = header
    for key in way[:-1]:
        holder = holder[key]
    holder[way[-1]] = value
    write(tmp_path / "p", header, contents[0][1])
    with pytest.raises(ProgramError, match=rf"^program .*: .*{message}"):
        Program.load(tmp_path / "p")


def test_headers_that_are_no_objects(contents, tmp_path):
    for header in ([], None, 7, "text", {"isa_version": 1}):
        write(tmp_path / "p", header, b"")
        with pytest.raises(ProgramError, match=r"^program .*"):
            Program.load(tmp_path / "p")
    text = b"[" * 100_000
    digest = hashlib.sha256(text).digest()
    head = struct.pack("<8sII32s", b"SYSTOLE\0", 1, len(text), digest)
    (tmp_path / "p").write_bytes(head + text)
    with pytest.raises(ProgramError, match="its header is not JSON"):
        Program.load(tmp_path / "p")


def test_files_without_an_end_are_not_read():
    with pytest.raises(ProgramError, match=r"^program /dev/zero: not a program file"):
        Program.load("/dev/zero")


def test_files_that_are_too_large_are_not_read(contents, monkeypatch, tmp_path):
    write(tmp_path / "p", *contents[0])
    monkeypatch.setattr(program_file, "MAX_FILE", 100)
    with pytest.raises(ProgramError, match="larger than 100 bytes"):
        Program.load(tmp_path / "p")


def test_programs_of_illegal_commands_say_so(contents, tmp_path):
    write(tmp_path / "p", *contents[0])
    program = Program.load(tmp_path / "p")
    broken = dataclasses.replace(program, image=b"\7" + program.image[1:])
    with pytest.raises(ProgramError, match=r"^commands: word 0: illegal opcode 7"):
        list(broken.decoded())
    short = dataclasses.replace(program, command_words=program.command_words - 1)
    with pytest.raises(ProgramError, match=r"^commands: there is no END"):
        list(short.decoded())
