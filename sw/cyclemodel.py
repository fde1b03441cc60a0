"""A cycle model: predicts when every command of a program starts and ends.

One pass over the command stream, which is a legal sequential order: a command starts when it has
been fetched, its engine is free and its tokens have been given; it lasts as long as its engine
needs for it without disturbance. The memory bus serves transfers in stream order. Bank conflicts
are not modelled."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from isa import Config, Engine, LoadTarget, Opcode, PostOp, PostSource, WindowOp, decode
from isa.commands import TABLE_BYTES
from sw.program import Program

HANDOVER = 3
"""Cycles from the end of a command to the start of one that waited for its token."""
REQUEST = 6
"""Cycles from the start of a transfer to its first address on the bus."""
POST_START = 6
"""Cycles from the start of POST to its first parameter, and from its last result to its end."""
POST_DEPTH = 10
WINDOW_DEPTH = 22
CONV_DEPTH = 8
"""Cycles through the sequencer, the accumulators and back, the array's own latency excluded."""


@dataclass(frozen=True)
class Timing:
    """Start and end cycle of a command."""

    start: int
    end: int


def _window_cycles(c: Mapping[str, int], config: Config) -> int:
    out_h, out_w = c["out_h"], c["out_w"]
    if c["op"] == WindowOp.IM2COL:
        # A run takes as many cycles as it touches words.
        ox, kx = np.arange(out_w)[:, None], np.arange(c["kernel_w"])
        byte = (c["x0"] + ox * c["stride_x"] + kx * c["dilation_x"]) % config.rows
        words = (byte + c["run"] - 1) // config.rows + 1
        return out_h * c["kernel_h"] * int(words.sum())
    sizes, plain = [], True
    for axis in "wh":
        kernel, stride = c[f"kernel_{axis}"], c["stride_x" if axis == "w" else "stride_y"]
        dilation = c["dilation_x" if axis == "w" else "dilation_y"]
        plain &= kernel <= 3 and stride <= kernel and (dilation == 1 or kernel == 1)
        sizes.append((c[f"out_{axis}"] - 1) * stride + kernel)
    taps = c["kernel_w"] * c["kernel_h"]
    cycles = out_h * out_w * taps
    if plain and 2 <= sizes[0] <= config.window_width:
        cycles = sizes[0] * sizes[1]
    elif c["op"] == WindowOp.DEPTHWISE and taps > config.window_width:
        cycles *= 2
    start = config.window_param_words if c["op"] != WindowOp.MAX else 0
    start += taps if c["op"] == WindowOp.DEPTHWISE else 0
    return c["blocks"] * (cycles + start)


def _conv_cycles(c: Mapping[str, int], config: Config) -> int:
    tiles = c["blocks"] * c["kernel_h"] * c["kernel_w"]
    return tiles * max(config.rows, c["out_w"] * c["out_h"])


def _post_cycles(c: Mapping[str, int], config: Config) -> int:
    rate = 2 if c["source"] == PostSource.SCRATCHPAD and c["op"] != PostOp.NONE else 1
    params = config.param_words if c["source"] == PostSource.ACCUMULATOR else 0
    # A table is read in words of 16 bytes at most, behind the command before.
    table = c["lut"] * (-(-TABLE_BYTES // config.rows) * -(-config.rows // 16) + POST_DEPTH)
    return c["groups"] * (c["out_w"] * c["out_h"] * rate + params) + table + POST_START


def _beats(c: Mapping[str, int], config: Config) -> int:
    """Bus cycles of a transfer: whole beats per run, at most one word a cycle."""
    size = config.vector_bytes
    if c["opcode"] == Opcode.LOAD and c["target"] == LoadTarget.WEIGHTS:
        size = config.weight_vector_bytes
    run = c["count0"] * size
    return c["count1"] * c["count2"] * max(-(-run // config.beat_bytes), c["count0"])


def predict(program: Program, *, read_latency: int) -> list[Timing]:
    """Start and end of every command; the last end is the program's."""
    config = program.config
    words = program.commands()
    queues: dict[Engine, deque[int]] = {e: deque(maxlen=config.queue_depth) for e in Engine}
    free = dict.fromkeys(Engine, 0)
    tokens: dict[tuple[int, int], deque[int]] = defaultdict(deque)
    bus = {"read": 0, "write": 0}
    array = config.rows // config.cell_rows + config.cols // config.cell_cols
    fetched = read_latency + REQUEST
    out: list[Timing] = []
    at = 0
    while at < len(words):
        c, end_at = decode(words, at)
        fetched += end_at - at
        at = end_at
        if c["opcode"] == Opcode.END:
            break
        engine = Engine(c["engine"])
        queue = queues[engine]
        if len(queue) == queue.maxlen:
            fetched = max(fetched, queue[0])
        start = max(fetched + HANDOVER, free[engine])
        for e in Engine:
            if c["wait"] >> e & 1:
                start = max(start, tokens[(e, engine)].popleft() + HANDOVER)
        queue.append(start)
        if engine in (Engine.LOAD, Engine.WLOAD):
            busy = _beats(c, config)
            done = max(start + REQUEST + read_latency, bus["read"]) + busy
            bus["read"] = done
            # The next command's requests go out while this one's data arrive.
            free[engine] = max(start, done - read_latency)
        elif engine == Engine.STORE:
            busy = _beats(c, config)
            done = max(start + REQUEST, bus["write"]) + busy
            bus["write"] = done
            free[engine] = done
            done += REQUEST
        elif engine == Engine.CONV:
            free[engine] = start + _conv_cycles(c, config)
            done = free[engine] + array + CONV_DEPTH
        elif engine == Engine.POST:
            done = start + _post_cycles(c, config) + POST_DEPTH
            free[engine] = done
        else:
            done = start + _window_cycles(c, config) + WINDOW_DEPTH
            free[engine] = done
        for e in Engine:
            if c["signal"] >> e & 1:
                tokens[(engine, e)].append(done)
        out.append(Timing(start, done))
    return out


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
