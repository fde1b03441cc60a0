"""The program file: everything a run needs, in one versioned, checksummed file.

Layout: 8 bytes magic, u32 format version, u32 length of the JSON header, 32 bytes SHA-256 of what
follows, JSON header, DRAM image. The image is the start of the DRAM window: commands, then
constants; tensors lie behind it."""

from __future__ import annotations

import builtins
import dataclasses
import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from systole.isa import VERSION, Config, Decoder, Opcode
from systole.sw.files import write_atomically
from systole.sw.ir import layout
from systole.sw.ir.graph import Port, Tensor

MAGIC = b"SYSTOLE\0"
FORMAT = 1
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

    def commands(self) -> list[int]:
        """The 64-bit words of the command stream."""
        data = self.image[self.command_offset : self.command_offset + 8 * self.command_words]
        return np.frombuffer(data, "<u8").tolist()

    def decoded(self) -> Iterator[Mapping[str, int]]:
        """The fields of every command in program order, END excluded."""
        words, at, decoder = self.commands(), 0, Decoder()
        while at < len(words):
            command, at = decoder.decode(words, at)
            if command["opcode"] == Opcode.END:
                return
            yield command

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
        """Raises :class:`ProgramError` when the file is no program, damaged, or of another
        version."""
        try:
            data = Path(path).read_bytes()
        except OSError as e:
            raise ProgramError(f"program {path}: {e.strerror}") from None
        if len(data) < _HEAD.size or not data.startswith(MAGIC):
            raise ProgramError(f"program {path}: not a program file")
        _, version, length, digest = _HEAD.unpack_from(data)
        if version != FORMAT:
            raise ProgramError(f"program {path}: format version {version}, expected {FORMAT}")
        body = data[_HEAD.size :]
        if hashlib.sha256(body).digest() != digest:
            raise ProgramError(f"program {path}: checksum mismatch, the file is damaged")
        try:
            return cls._parse(path, json.loads(body[:length]), body[length:])
        except ProgramError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ProgramError(f"program {path}: its header is damaged") from None

    @classmethod
    def _parse(cls, path: str | Path, header: dict, image: bytes) -> Program:
        if header.pop("isa_version") != VERSION:
            raise ProgramError(
                f"program {path}: it was compiled for another version of the command set"
            )
        return cls(
            model=header["model"],
            config=Config.from_dict(header["config"]),
            image=image,
            command_offset=header["command_offset"],
            command_words=header["command_words"],
            memory_bytes=header["memory_bytes"],
            inputs=[Port(**p) for p in header["inputs"]],
            outputs=[Port(**p) for p in header["outputs"]],
            tensors={name: _placement_from_json(p) for name, p in header["tensors"].items()},
            layers=[Layer(**{**x, "shape": tuple(x["shape"])}) for x in header["layers"]],
            command_layers=[v for v, count in header["command_layers"] for _ in range(count)],
        )


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


def _placement_from_json(values: dict) -> DramTensor:
    t = values["tensor"]
    for key in ("shape", "onnx_shape", "perm"):
        t[key] = tuple(t[key])
    t["scale"] = np.float32(t["scale"])
    return DramTensor(Tensor(**t), values["offset"], values["bytes"], values["layout"])
