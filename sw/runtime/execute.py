"""Runs a compiled program on a device and compares its tensors with the golden model's."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from systole.isa import Config, Engine, Opcode
from systole.isa.commands import COMMANDS
from systole.isa.numerics import lookup
from systole.sw.runtime.driver import DEFAULT_TIMEOUT, Driver, Waiting
from systole.sw.runtime.program import Program

EVENTS_PER_COMMAND = 2


@dataclass(frozen=True)
class Execution:
    """One run of a program. ``tensors``: every tensor that is in DRAM at the end, by name, int8
    (N, C, H, W). ``events``: None if not asked for, or if the hardware had to drop some."""

    tensors: dict[str, np.ndarray]
    cycles: int
    counters: dict[str, int]
    events: np.ndarray | None
    seconds: float


def memory_needed(program: Program) -> int:
    """Bytes of device memory for the program and its trace."""
    return program.memory_bytes + 64 + 16 * EVENTS_PER_COMMAND * len(program.command_layers)


def load(driver: Driver, program: Program) -> None:
    """Load a program; it can then be executed any number of times."""
    driver.load(
        program.image,
        command_offset=program.command_offset,
        command_words=program.command_words,
        memory_bytes=program.memory_bytes,
    )


def execute(
    driver: Driver,
    program: Program,
    inputs: Mapping[str, np.ndarray],
    *,
    trace: bool,
    waiting: Waiting | None = None,
    timeout_cycles: int = DEFAULT_TIMEOUT,
) -> Execution:
    """Run the loaded program on int8 (N, C, H, W) inputs by tensor name. ``waiting`` and
    ``timeout_cycles`` as for :meth:`Driver.run`.

    Raises :class:`sw.runtime.driver.DeviceFault` when the device faults or hangs."""
    start = time.perf_counter()
    for port in program.inputs:
        place = program.tensors.get(port.tensor)
        if place is not None:
            driver.write_data(place.offset, place.pack(inputs[port.tensor], program.config))
    trace = trace and program.config.trace
    events = EVENTS_PER_COMMAND * len(program.command_layers) if trace else 0
    cycles = driver.run(trace_events=events, waiting=waiting, timeout_cycles=timeout_cycles)
    tensors = {
        name: place.unpack(driver.read_data(place.offset, place.bytes), program.config)
        for name, place in program.tensors.items()
    }
    counters = driver.counters()
    return Execution(
        tensors,
        cycles,
        counters,
        driver.trace() if trace and not counters["TRACE_DROPPED"] else None,
        time.perf_counter() - start,
    )


@dataclass(frozen=True)
class Divergence:
    """The first element, in layer order, that is not what the golden model says."""

    layer: str
    tensor: str
    element: tuple[int, ...]
    got: int
    expected: int
    command: int | None
    """Index of the command that wrote it."""

    def __str__(self) -> str:
        where = "" if self.command is None else f", written by command {self.command}"
        return (
            f"layer {self.layer}: tensor {self.tensor} element {list(self.element)} (N, C, H, W) "
            f"is {self.got}, the golden model says {self.expected}{where}"
        )


def compare(
    program: Program, tensors: Mapping[str, np.ndarray], golden: Mapping[str, np.ndarray]
) -> tuple[int, Divergence | None]:
    """Elements that differ from the golden model over all layers that are in DRAM, and the
    first."""
    total, first = 0, None
    for layer in program.layers:
        if layer.stored not in tensors:
            continue
        got, expected = tensors[layer.stored], golden[layer.output]
        if layer.table is not None:
            expected = lookup(expected, np.array(layer.table, np.int8))
        wrong = np.argwhere(got != expected)
        total += len(wrong)
        if len(wrong) and first is None:
            at = tuple(int(i) for i in wrong[0])
            first = Divergence(
                layer=layer.name,
                tensor=layer.stored,
                element=at,
                got=int(got[at]),
                expected=int(expected[at]),
                command=writer_of(program, layer.stored, at),
            )
    return total, first


def writer_of(program: Program, tensor: str, element: tuple[int, ...]) -> int | None:
    """Index of the command that computed an element of a tensor in DRAM: the last POST or WINDOW
    that wrote the scratchpad word that the last STORE to the element's address read."""
    config = program.config
    place = program.tensors[tensor]
    n, c, y, x = element
    _, channels, h, w = place.tensor.shape
    blocks = -(-channels // config.rows)
    vector = ((n * blocks + c // config.rows) * h + y) * w + x
    address = place.offset + vector * config.vector_bytes
    lane = c % config.rows // config.lanes
    writers: list[tuple[int, dict[str, int]]] = []
    writer = None
    for index, command in enumerate(program.decoded()):
        if command["opcode"] in (Opcode.POST, Opcode.WINDOW):
            writers.append((index, dict(command)))
        elif command["opcode"] == Opcode.STORE:
            word = _stored_word(command, address, config.vector_bytes)
            if word is not None:
                writer = next(
                    (i for i, w in reversed(writers) if _writes(w, word, lane, config)), None
                )
    return writer


def _stored_word(c: Mapping[str, int], address: int, vector: int) -> int | None:
    """The scratchpad word that a STORE copies to a DRAM address."""
    for j in range(c["count2"]):
        for i in range(c["count1"]):
            k, rest = divmod(address - c["dram"] - j * c["dram2"] - i * c["dram1"], vector)
            if rest == 0 and 0 <= k < c["count0"]:
                return c["local"] + j * c["local2"] + i * c["local1"] + k
    return None


def _writes(c: Mapping[str, int], word: int, lane: int, config: Config) -> bool:
    """Whether a POST or WINDOW writes a lane group of a scratchpad word."""
    per_word = config.rows // config.lanes
    step = c.get("out_step", 1)
    if c["opcode"] == Opcode.POST:
        positions = [divmod(c["lane"] + g, per_word) for g in range(c["groups"])]
        blocks = [block for block, position in positions if position == lane]
    else:
        blocks = list(range(c["blocks"]))
    for block in blocks:
        offset = word - c["out"] - block * c["out_block"]
        for y in range(c["out_h"]):
            column, rest = divmod(offset - y * c["out_pitch"], step)
            if rest == 0 and 0 <= column < c["out_w"]:
                return True
    return False


def describe(program: Program, index: int) -> str:
    """A command for people: engine and fields that are not 0."""
    command = next(itertools.islice(program.decoded(), index, None))
    opcode = Opcode(command["opcode"])
    fields = COMMANDS[opcode].own_fields
    values = " ".join(f"{f.name}={command[f.name]}" for f in fields if command[f.name])
    return f"{Engine(command['engine']).name} {opcode.name} {values}"
