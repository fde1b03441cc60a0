"""What can be synthesised: the blocks of the accelerator, each as its own top, and the chip."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from amaranth.lib import wiring

from systole.hw.conv.array import SystolicArray
from systole.hw.top import READERS, writers
from systole.hw.verilog import write_verilog
from systole.isa import Config, Engine, Opcode

TOP = "top"
"""The name of every synthesised module."""


def _one(config: Config) -> int:
    return 1


def _if_rows(config: Config) -> int:
    return int(config.row_ops)


@dataclass(frozen=True)
class Block:
    """A class of hardware, how it is built in a machine, and how often."""

    where: str
    """Module below ``systole.hw``, and class: ``conv.array:SystolicArray``."""
    arguments: Callable[[Config], dict[str, Any]] = lambda config: {}
    """Arguments of the constructor besides ``config``, as the machine of a configuration has
    them."""
    instances: Callable[[Config], int] = _one
    """How many of it the machine of a configuration has."""


def _array(config: Config) -> SystolicArray:
    """An array to ask for latencies and widths; it is not built."""
    array = SystolicArray(config)
    array._MustUse__silence = True  # type: ignore[attr-defined]
    return array


BLOCKS: dict[str, Block] = {
    "array": Block("conv.array:SystolicArray"),
    "accumulators": Block("conv.engine:Accumulators", lambda config: {"array": _array(config)}),
    "weight-sequencer": Block(
        "conv.sequencer:WeightSequencer", lambda config: {"array": _array(config)}
    ),
    "activation-sequencer": Block("conv.sequencer:ActivationSequencer"),
    "conv": Block("conv.engine:ConvEngine"),
    "requantise": Block(
        "arithmetic.requantise:Requantise",
        lambda config: {"lanes": config.lanes},
        lambda config: 2 if config.window else 1,
    ),
    "combine": Block("post.combine:PostCombine", lambda config: {"lanes": config.lanes}),
    "table": Block("post.table:PostTable"),
    "post-walk": Block("post.walk:PostWalk"),
    "parameters": Block("post.parameters:ParameterPrefetch"),
    "post": Block("post.engine:PostEngine"),
    "reduce": Block("window.lines:WindowReduce"),
    "issue": Block("window.issue:TokenIssue"),
    "walk-setup": Block("window.walk:WalkSetup"),
    "tap-walk": Block("window.walk:TapWalk"),
    "output-walk": Block("window.walk:OutputWalk"),
    "collector": Block("window.im2col:Collector"),
    "row-sequencer": Block("window.rows:RowSequencer", instances=_if_rows),
    "row-lanes": Block("window.row_lanes:RowLanes", instances=_if_rows),
    "row-scalar": Block("window.row_scalar:RowScalar", instances=_if_rows),
    "window": Block("window.engine:WindowEngine"),
    "scratchpad": Block(
        "memory.scratchpad:Scratchpad",
        lambda config: {
            "readers": len(READERS) - (not config.window),
            "writers": len(writers(config)) - (not config.window),
        },
    ),
    "weight-arbiter": Block("memory.scratchpad:WeightArbiter"),
    "load": Block("transfer.engines:LoadEngine", instances=lambda config: 2),
    "store": Block("transfer.engines:StoreEngine"),
    "read-manager": Block("bus.axi:ReadManager", lambda config: {"clients": 3}),
    "write-manager": Block(
        "bus.axi:WriteManager", lambda config: {"clients": 2 if config.trace else 1}
    ),
    "fetch": Block("control.fetch:Fetch"),
    "shell": Block(
        "control.shell:Shell",
        lambda config: {"engine": Engine.CONV, "opcode": Opcode.CONV},
        lambda config: 6 if config.window else 5,
    ),
    "csr": Block("control.csr:ControlStatus"),
    "trace": Block("control.trace:Trace", instances=lambda config: int(config.trace)),
    "control": Block("control.control:ControlUnit"),
    "chip": Block("top:Systole"),
}
"""The blocks by name. Some are parts of others: ``array`` is in ``conv``, all are in ``chip``."""


class BlockError(ValueError):
    """A block or parameter that does not exist; the message is a sentence."""


def _class_of(where: str) -> type[wiring.Component]:
    module, _, name = where.partition(":")
    module = module.removeprefix("systole.").removeprefix("hw.")
    try:
        found = getattr(importlib.import_module(f"systole.hw.{module}"), name)
    except (ImportError, AttributeError, ValueError):
        found = None
    if not (inspect.isclass(found) and issubclass(found, wiring.Component)):
        raise BlockError(
            f"no block {where!r}: give one of {', '.join(BLOCKS)}, or a class of hw/ as "
            "module:Class, like conv.array:SystolicArray"
        )
    return found


def design(block: str, config: Config, given: Mapping[str, Any]) -> wiring.Component:
    """An instance of ``block``, as a machine of ``config`` has it.

    ``given``: arguments of its constructor to take instead. Raises :class:`BlockError`.
    """
    known = BLOCKS.get(block, Block(block))
    kind = _class_of(known.where)
    names = inspect.signature(kind.__init__).parameters
    usual = {"config": config, "lanes": config.lanes} | known.arguments(config)
    values = {n: v for n, v in (usual | dict(given)).items() if n in names}
    for name in given:
        if name not in names:
            raise BlockError(f"block {block}: {kind.__name__} has no parameter {name!r}")
    try:
        return kind(**values)
    except TypeError as e:
        raise BlockError(f"block {block}: {e}") from None


def split(settings: Mapping[str, Any], base: Config | None) -> tuple[Config, dict[str, Any]]:
    """The configuration with those of ``settings`` that are its fields, and the others.

    Without ``base``, memories are the smallest bench's (16 KiB scratchpad, 4 KiB weights, 8 KiB
    accumulators) where nothing else is said, so that they do not hide the logic."""
    fields = {f.name for f in dataclasses.fields(Config)}
    own = {k: v for k, v in settings.items() if k in fields}
    others = {k: v for k, v in settings.items() if k not in fields}
    if base is not None:
        return dataclasses.replace(base, **own), others
    shape = {"rows": own.pop("rows", 4), "cols": own.pop("cols", 4)}
    return small(**shape, **own), others


def small(rows: int, cols: int, **fields: Any) -> Config:
    """The machine of a shape whose memories keep the proportions of the 4x4 one with 16, 4 and
    8 KiB: as many words each, whatever a word's width."""
    values = {
        "scratchpad_bytes": 4096 * rows,
        "weight_bytes": max(1024 // rows, 2) * rows * cols,
        "accumulator_bytes": 512 * 4 * cols,
    }
    return Config.from_dict({"rows": rows, "cols": cols} | values | fields)


def write_rtl(block: str, config: Config, given: Mapping[str, Any], directory: Path) -> str:
    """Write the SystemVerilog of a block, as module ``TOP``, into ``directory``; returns its hash.

    Raises :class:`BlockError`, ``ConfigError`` or ``GenerateError``."""
    write_verilog(design(block, config, given), TOP, directory)
    return rtl_hash(directory)


def rtl_hash(directory: Path) -> str:
    """What identifies the SystemVerilog in a folder, comments aside: they name tools' versions."""
    digest = sha256()
    for path in sorted(directory.glob("*.sv")):
        for line in path.read_text().splitlines():
            if not line.startswith(("/*", "//")):
                digest.update(line.encode() + b"\n")
    return digest.hexdigest()[:16]
