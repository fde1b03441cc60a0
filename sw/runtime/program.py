"""The program file: everything a run needs, in one versioned, checksummed file.

Layout: 8 bytes magic, u32 format version, u32 length of the JSON header, 32 bytes SHA-256 of what
follows, JSON header, DRAM image. The image is the start of the DRAM window: commands, then
constants; tensors lie behind it."""

from __future__ import annotations

import builtins
import dataclasses
import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

import numpy as np

from systole.isa import VERSION, Config, ConfigError
from systole.isa.commands import TABLE_BYTES
from systole.isa.streams import decode_stream
from systole.sw.files import write_atomically
from systole.sw.ir import layout
from systole.sw.ir.graph import Port, PortType, Tensor
from systole.sw.runtime.driver import MAX_MEMORY, PROGRAM_ALIGN
from systole.sw.runtime.fields import FieldError, Fields

MAGIC = b"SYSTOLE\0"
FORMAT = 1
MAX_FILE = 2 * MAX_MEMORY
"""Bytes of a file: the image is no larger than a DRAM window, nor is the header."""
MAX_MACS = 1 << 62
MAX_RANK = 64
"""Axes of an array, numpy's limit."""
LAYOUTS = ("blocked", "packed")
_HEAD = struct.Struct("<8sII32s")


class ProgramError(ValueError):
    """A program file that cannot be used; one sentence."""


@dataclass(frozen=True)
class DramTensor:
    """A tensor in DRAM: byte offset in the window, bytes, and ``blocked`` or ``packed``."""

    tensor: Tensor
    offset: int
    bytes: int
    layout: str

    def pack(self, array: np.ndarray, config: Config) -> builtins.bytes:
        """int8 (N, C, H, W) as the bytes at ``offset``."""
        pack = layout.pack_packed if self.layout == "packed" else layout.pack_blocked
        return layout.to_dram(pack(array, config.rows), config.vector_bytes)

    def unpack(self, data: builtins.bytes, config: Config) -> np.ndarray:
        """The bytes at ``offset`` as int8 (N, C, H, W)."""
        words = layout.from_dram(data, config.vector_bytes, config.rows)
        unpack = layout.unpack_packed if self.layout == "packed" else layout.unpack_blocked
        return unpack(words, self.tensor.shape, config.rows)


@dataclass(frozen=True)
class Layer:
    """One row of the report."""

    name: str
    op: str
    output: str
    """The model's tensor that it computes."""
    shape: tuple[int, ...]
    """Shape (N, C, H, W) of its output."""
    macs: int
    stored: str
    """The program's tensor that it writes, if any: ``output``, or a function of it."""
    table: list[int] | None = None
    """That function, as a table of 256 int8; None: the identity."""


@dataclass(frozen=True)
class Program:
    """A compiled model for one configuration."""

    model: str
    config: Config
    image: bytes
    """Initial content of the DRAM window from byte 0."""
    command_offset: int
    command_words: int
    memory_bytes: int
    """Size of the DRAM window, the trace buffer excluded."""
    inputs: list[Port]
    outputs: list[Port]
    tensors: dict[str, DramTensor]
    """Tensors that are in DRAM at the end: inputs, outputs, spilled or dumped intermediates."""
    layers: list[Layer]
    command_layers: list[int]
    """For every command (END excluded) the index of its layer."""

    @property
    def fetched_bytes(self) -> int:
        """DRAM bytes that the commands take, in whole beats of the bus."""
        beat = self.config.beat_bytes
        return -(-8 * self.command_words // beat) * beat

    def commands(self) -> list[int]:
        """The 64-bit words of the command stream."""
        return self._words().tolist()

    def _words(self) -> np.ndarray:
        """:meth:`commands`, uint64."""
        data = self.image[self.command_offset : self.command_offset + 8 * self.command_words]
        return np.frombuffer(data, "<u8")

    def decoded(self) -> Iterator[Mapping[str, int]]:
        """The fields of every command in program order, END excluded. Raises
        :class:`ProgramError` for what is no command."""
        try:
            yield from decode_stream(self._words())
        except ValueError as e:
            raise ProgramError(f"commands: {e}") from None

    def save(self, path: str | Path) -> None:
        """Write the file whole or not at all."""
        header = {
            "isa_version": VERSION,
            "model": self.model,
            "config": self.config.to_dict(),
            "command_offset": self.command_offset,
            "command_words": self.command_words,
            "memory_bytes": self.memory_bytes,
            "inputs": [dataclasses.asdict(p) for p in self.inputs],
            "outputs": [dataclasses.asdict(p) for p in self.outputs],
            "tensors": {name: _placement_to_json(p) for name, p in self.tensors.items()},
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "command_layers": _run_lengths(self.command_layers),
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        body = text + self.image
        head = _HEAD.pack(MAGIC, FORMAT, len(text), hashlib.sha256(body).digest())
        write_atomically(path, head + body)

    @classmethod
    def load(cls, path: str | Path) -> Program:
        """Raises :class:`ProgramError` when the file is no program, damaged, of another version, or
        holds what no program can."""
        try:
            with open(path, "rb") as f:
                head = f.read(_HEAD.size)
                if len(head) < _HEAD.size or not head.startswith(MAGIC):
                    raise ProgramError(f"program {path}: not a program file")
                if os.fstat(f.fileno()).st_size > MAX_FILE:
                    raise ProgramError(f"program {path}: larger than {MAX_FILE:,} bytes")
                body = f.read()
        except OSError as e:
            raise ProgramError(f"program {path}: {e.strerror}") from None
        _, version, length, digest = _HEAD.unpack(head)
        if version != FORMAT:
            raise ProgramError(f"program {path}: format version {version}, expected {FORMAT}")
        if hashlib.sha256(body).digest() != digest:
            raise ProgramError(f"program {path}: checksum mismatch, the file is damaged")
        try:
            return _read(json.loads(body[:length]), body[length:])
        except (FieldError, ProgramError, ConfigError) as e:
            raise ProgramError(f"program {path}: {e}") from None
        except (ValueError, RecursionError):
            raise ProgramError(f"program {path}: its header is not JSON") from None


_HEADER = (
    *("isa_version", "model", "config", "command_offset", "command_words", "memory_bytes"),
    *("inputs", "outputs", "tensors", "layers", "command_layers"),
)


def _names(kind: type) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(kind))


def _read(header: object, image: bytes) -> Program:
    """The program of a file's header and image, every value checked. Raises :class:`FieldError`,
    :class:`ProgramError` and :class:`~isa.ConfigError`."""
    if isinstance(header, dict) and header.get("isa_version") != VERSION:
        raise ProgramError("it was compiled for another version of the command set")
    h = Fields(header, "header", _HEADER)
    config = Config.from_dict(h.table("config"))
    memory = h.whole("memory_bytes", len(image), MAX_MEMORY - 1)
    offset = h.whole("command_offset", 0, len(image))
    h.need("command_offset", offset % PROGRAM_ALIGN == 0, f"a multiple of {PROGRAM_ALIGN}")
    layers = [_layer_from(x) for x in h.each("layers", _names(Layer))]
    program = Program(
        model=h.text("model"),
        config=config,
        image=image,
        command_offset=offset,
        command_words=h.whole("command_words", 1, (len(image) - offset) // 8),
        memory_bytes=memory,
        inputs=[_port_from(x) for x in h.each("inputs", _names(Port))],
        outputs=[_port_from(x) for x in h.each("outputs", _names(Port))],
        tensors={
            name: _placement_from(name, x, config, memory)
            for name, x in h.named("tensors", _names(DramTensor)).items()
        },
        layers=layers,
        command_layers=_from_run_lengths(h, len(layers)),
    )
    missing = [p.tensor for p in program.outputs if p.tensor not in program.tensors]
    h.need("outputs", not missing, f"tensors of the program, and {missing[:1]} is none")
    commands = sum(1 for _ in program.decoded())
    h.need(
        "command_layers",
        len(program.command_layers) == commands,
        f"one for each of {commands} commands",
    )
    return program


def _port_from(fields: Fields) -> Port:
    dtype = fields.choice("dtype", get_args(PortType))
    return Port(fields.text("name"), fields.text("tensor"), cast(PortType, dtype))


def _layer_from(fields: Fields) -> Layer:
    table = None
    if not fields.missing("table"):
        table = list(fields.wholes("table", -128, 127, [TABLE_BYTES]))
    return Layer(
        name=fields.text("name"),
        op=fields.text("op"),
        output=fields.text("output"),
        shape=fields.wholes("shape", 1, MAX_MEMORY, [4]),
        macs=fields.whole("macs", 0, MAX_MACS),
        stored=fields.text("stored"),
        table=table,
    )


def _tensor_from(name: str, fields: Fields) -> Tensor:
    fields.need("name", fields.text("name") == name, f"the tensor's, {name!r}")
    shape = fields.wholes("shape", 1, MAX_MEMORY, [4])
    onnx_shape = fields.wholes("onnx_shape", 1, MAX_MEMORY, range(MAX_RANK + 1))
    fields.need(
        "onnx_shape",
        math.prod(onnx_shape) == math.prod(shape),
        f"of as many elements as {list(shape)}",
    )
    perm = fields.wholes("perm", 0, MAX_RANK, [len(onnx_shape)])
    fields.need("perm", sorted(perm) == list(range(len(perm))), "an order of the axes")
    return Tensor(
        name=name,
        shape=cast("tuple[int, int, int, int]", shape),
        scale=np.float32(fields.positive("scale", float(np.finfo(np.float32).max))),
        zero=fields.whole("zero", -128, 127),
        unsigned=fields.flag("unsigned"),
        onnx_shape=onnx_shape,
        perm=perm,
    )


def _placement_from(name: str, fields: Fields, config: Config, memory: int) -> DramTensor:
    """A tensor that lies in a DRAM window of ``memory`` bytes."""
    tensor = _tensor_from(name, fields.inner("tensor", _names(Tensor)))
    kind = fields.choice("layout", LAYOUTS)
    size = layout.words_of(tensor.shape, config.rows, packed=kind == "packed") * config.vector_bytes
    fields.need("bytes", fields.whole("bytes", 1, memory) == size, f"{size}, by its shape")
    offset = fields.whole("offset", 0, memory - size)
    return DramTensor(tensor, offset, size, kind)


def _from_run_lengths(header: Fields, layers: int) -> list[int]:
    key, most = "command_layers", header.whole("command_words", 1, MAX_MEMORY)
    out: list[int] = []
    for run in header.lists(key):
        ok = len(run) == 2 and all(type(v) is int for v in run)
        ok = ok and 0 <= run[0] < layers and 0 < run[1] <= most - len(out)
        header.need(key, ok, f"pairs of a layer and how many of the {most} words are its commands")
        out += [run[0]] * run[1]
    return out


def _run_lengths(values: list[int]) -> list[list[int]]:
    out: list[list[int]] = []
    for v in values:
        if out and out[-1][0] == v:
            out[-1][1] += 1
        else:
            out.append([v, 1])
    return out


def _placement_to_json(p: DramTensor) -> dict[str, object]:
    values = dataclasses.asdict(p)
    values["tensor"]["scale"] = float(p.tensor.scale)
    return values
