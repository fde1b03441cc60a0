"""Predictions: when a program's commands run, and what follows for its layers and for units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from systole.isa import Config, LoadTarget, Opcode, PostSource
from systole.sw.runtime.program import Program
from systole.sw.simulate.cycles.conflicts import Conflicts
from systole.sw.simulate.cycles.engines import post_reads, window_timing
from systole.sw.simulate.cycles.machine import MachineModel

PASSES = 2
"""How often conflicts are looked for, each time where the pass before put the commands. Against the
RTL, a second look brought mobilenetv1-0.25-vww's total within 0.1 % and its layers within 2 %
(commit a9d144e)."""
WRITE_LATENCY = 64
"""The memory's cycles from a write's last beat to its response, unless told otherwise."""


@dataclass(frozen=True)
class Timing:
    """Start and end cycle of a command."""

    start: int
    end: int


@dataclass(frozen=True)
class LayerPrediction:
    """Cycles of one layer (see :func:`layer_cycles`) and what it moves to and from DRAM."""

    cycles: int
    read_bytes: int
    write_bytes: int


@dataclass(frozen=True)
class Prediction:
    """The cycles of a whole program and the DRAM bytes that it moves."""

    cycles: int
    read_bytes: int
    """With the commands, in whole beats. (The layers' are without.)"""
    write_bytes: int
    layers: list[LayerPrediction]


def predict(
    program: Program, *, read_latency: int, write_latency: int = WRITE_LATENCY
) -> list[Timing]:
    """Start and end of every command; the last end is the program's."""
    return _predict(list(program.decoded()), program.config, read_latency, write_latency)


def _predict(
    commands: Sequence[Mapping[str, int]], config: Config, read_latency: int, write_latency: int
) -> list[Timing]:
    machine = MachineModel(commands, config, read_latency, write_latency)
    schedule = machine.run({})
    conflicts = Conflicts(commands, machine.windows, config, read_latency)
    delays: dict[int, int] = {}
    for _ in range(PASSES):
        before = delays
        delays = conflicts.lost(schedule)
        if delays == before:
            break
        schedule = machine.run(delays)
    return [
        Timing(round(start), round(end))
        for start, end in zip(schedule.starts, schedule.ends, strict=True)
    ]


def busy(program: Program) -> dict[str, int]:
    """Cycles of work for each unit, without those in which it waits: array, POST, WINDOW, and the
    bus's reads and writes."""
    config = program.config
    out: dict[str, int] = dict.fromkeys(("array", "POST", "WINDOW"), 0)
    for c in program.decoded():
        size = c["out_w"] * c["out_h"] if "out_w" in c else 0
        if c["opcode"] == Opcode.CONV:
            tiles = c["blocks"] * c["kernel_h"] * c["kernel_w"]
            out["array"] += tiles * max(size, config.rows)
        elif c["opcode"] == Opcode.POST:
            from_scratchpad = c["source"] == PostSource.SCRATCHPAD
            out["POST"] += c["groups"] * (post_reads(c) if from_scratchpad else size)
        elif c["opcode"] == Opcode.WINDOW:
            out["WINDOW"] += window_timing(c, config).words
    moved = traffic(program)
    beat = config.beat_bytes
    out["reads"] = (sum(read for read, _ in moved) + 8 * program.command_words) // beat
    out["writes"] = sum(written for _, written in moved) // beat
    return out


def traffic(program: Program) -> list[tuple[int, int]]:
    """DRAM bytes (read, written) by each command, END excluded."""
    return [command_traffic(c, program.config) for c in program.decoded()]


def command_traffic(c: Mapping[str, int], config: Config) -> tuple[int, int]:
    """DRAM bytes (read, written) by a command."""
    if c["opcode"] not in (Opcode.LOAD, Opcode.STORE):
        return 0, 0
    count = c["count0"] * c["count1"] * c["count2"]
    if c["opcode"] == Opcode.STORE:
        return 0, count * config.vector_bytes
    to_weights = c["target"] == LoadTarget.WEIGHTS
    return count * (config.weight_vector_bytes if to_weights else config.vector_bytes), 0


def layer_cycles(program: Program, ends: list[int]) -> list[int]:
    """Cycles of each layer: from the end of what ended before it to its own last command's end.

    Layers overlap; a cycle counts for the layer that ends next, so that the layers add up to the
    whole (less the end of the program)."""
    last = [0] * len(program.layers)
    for layer, end in zip(program.command_layers, ends):
        last[layer] = max(last[layer], end)
    out, before = [0] * len(last), 0
    for i in sorted(range(len(last)), key=lambda i: last[i]):
        out[i] = last[i] - before
        before = last[i]
    return out


def predict_layers(
    program: Program, read_latency: int, write_latency: int = WRITE_LATENCY
) -> Prediction:
    """The whole program's and every layer's cycles and DRAM bytes."""
    commands = list(program.decoded())
    timings = _predict(commands, program.config, read_latency, write_latency)
    cycles = layer_cycles(program, [t.end for t in timings])
    moved = [[0, 0] for _ in program.layers]
    for layer, c in zip(program.command_layers, commands):
        read, write = command_traffic(c, program.config)
        moved[layer][0] += read
        moved[layer][1] += write
    layers = [LayerPrediction(n, *both) for n, both in zip(cycles, moved, strict=True)]
    return Prediction(
        max((t.end for t in timings), default=0) + 1,
        sum(layer.read_bytes for layer in layers) + program.fetched_bytes,
        sum(layer.write_bytes for layer in layers),
        layers,
    )
