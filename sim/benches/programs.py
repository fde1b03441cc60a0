"""Small random programs for the benches, with the DRAM content they must leave behind."""

from __future__ import annotations

import random
from dataclasses import dataclass

from systole.isa import Config, Encoder, Engine, LoadTarget, Opcode, encode


@dataclass(frozen=True)
class BenchProgram:
    """A program, the DRAM window that it starts from and the one that it must leave behind."""

    image: bytes
    command_offset: int
    command_words: int
    expected: bytes
    commands: int
    """Without END."""


def assemble(commands: list[list[int]], memory: bytearray) -> tuple[bytes, int, int]:
    """Put commands and END behind ``memory``: the image, their offset in it, their 64-bit words."""
    words = [w for command in [*commands, encode(Opcode.END)] for w in command]
    offset = -(-len(memory) // 64) * 64
    image = memory.ljust(offset, b"\0") + b"".join(w.to_bytes(8, "little") for w in words)
    return bytes(image), offset, len(words)


def round_trip(config: Config, rng: random.Random, *, copies: int) -> BenchProgram:
    """``copies`` pairs of a LOAD (of both load engines) and a STORE with random 3-D shapes.

    Every pair has its own part of the DRAM and the same part of the scratchpad, so that each LOAD
    has to wait for the STORE before it.
    """
    vector, rows = config.vector_bytes, config.rows
    chunk = 512 * vector
    memory = bytearray(rng.randbytes(2 * copies * chunk))
    expected = bytearray(memory)
    commands, encoder = [], Encoder()
    engines = [rng.choice((Engine.LOAD, Engine.WLOAD)) for _ in range(copies)]
    for i in range(copies):
        counts = [rng.randint(1, 5) for _ in range(3)]
        source, target = 2 * i * chunk, (2 * i + 1) * chunk
        load, load_at = _steps(counts, vector, rng)
        store, store_at = _steps(counts, vector, rng)
        local = rng.randrange(config.scratchpad_words - 512)
        place, _ = _steps(counts, 1, rng)
        shape = dict(zip(("count0", "count1", "count2"), counts, strict=True))
        where = {"local": local, "local1": place[0], "local2": place[1]}
        commands.append(
            encoder.encode(
                Opcode.LOAD,
                engines[i],
                wait=1 << Engine.STORE if i else 0,
                signal=1 << Engine.STORE,
                target=LoadTarget.SCRATCHPAD,
                dram=source,
                dram1=load[0],
                dram2=load[1],
                **shape,
                **where,
            )
        )
        commands.append(
            encoder.encode(
                Opcode.STORE,
                Engine.STORE,
                wait=1 << engines[i],
                signal=1 << engines[i + 1] if i + 1 < copies else 0,
                dram=target,
                dram1=store[0],
                dram2=store[1],
                **shape,
                **where,
            )
        )
        for at, to in zip(load_at, store_at, strict=True):
            data = memory[source + at : source + at + rows]
            expected[target + to : target + to + vector] = data.ljust(vector, b"\0")
    image, offset, words = assemble(commands, memory)
    return BenchProgram(image, offset, words, bytes(expected), len(commands))


def _steps(counts: list[int], unit: int, rng: random.Random) -> tuple[tuple[int, int], list[int]]:
    """Random strides of runs and of groups that do not overlap, and every vector's offset."""
    run = (counts[0] + rng.randrange(4)) * unit
    group = run * counts[1] + rng.randrange(4) * unit
    offsets = [
        group * g + run * r + unit * v
        for g in range(counts[2])
        for r in range(counts[1])
        for v in range(counts[0])
    ]
    return (run, group), offsets
