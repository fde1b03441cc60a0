"""CONV, POST and WINDOW, one command at a time: how many cycles they are at work, and which words
they read and write in each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from systole.isa import Config, WindowOp
from systole.isa.commands import ROW_OPS
from systole.isa.timing import (
    READ_AHEAD,
    WINDOW_SET_UP,
    WindowShape,
    im2col_keeps_words,
    post_group_reads,
    post_keeps_operand,
    row_cycles,
    row_output_cycles,
    window_modes,
    window_set_up_bits,
    window_walk_start,
)


class Im2colRow(NamedTuple):
    """How IM2COL collects a row of outputs."""

    steps: int
    """Cycles."""
    reads: list[tuple[int, int, int]]
    """Those that read, if the row of the input exists: step, row of the kernel, word in its row of
    the input."""
    fetches: int
    """Those that fetch a word, be it read or all padding."""


@lru_cache(1024)
def _im2col_row(
    *,
    x0: int,
    stride_x: int,
    dilation_x: int,
    kernel_w: int,
    kernel_h: int,
    run: int,
    in_w: int,
    out_w: int,
    rows: int,
    keeps: bool,
) -> Im2colRow:
    steps = fetches = 0
    reads: list[tuple[int, int, int]] = []
    newest, words = 0, 0
    # An output whose last run ends in its next word takes a step more.
    flush = (kernel_w * kernel_h * run - 1) % rows < (run - 1) % rows
    for ox in range(out_w):
        fetched = []
        taken = 0
        for kx in range(kernel_w):
            words = words if keeps else 0
            word, byte = divmod(x0 + ox * stride_x + kx * dilation_x, rows)
            for done in range(0, run, rows):
                spills = byte + min(run - done, rows) > rows
                first = words > 0 and newest == word
                if not (words == 2 and newest == word + 1) and (spills or not first):
                    if spills and not first:
                        fetched.append((taken, word))
                        taken += 1
                    newest, words = word + spills, 1 + spills
                    fetched.append((taken, newest))
                taken += 1
                word += 1
        for ky in range(kernel_h):
            reads += [(steps + at, ky, w) for at, w in fetched if 0 <= w < -(-in_w // rows)]
            steps += taken
        fetches += kernel_h * len(fetched)
        steps += flush
    return Im2colRow(steps, reads, fetches)


def im2col_row_cycles(config: Config, **fields: int) -> int:
    """Cycles of IM2COL for a row of outputs. ``fields``: those of the command that this depends
    on."""
    return im2col_row(fields, config).steps


def im2col_row(c: Mapping[str, int], config: Config) -> Im2colRow:
    """How IM2COL collects a row of outputs (:class:`hw.window.walk.TapWalk`)."""
    names = ("x0", "stride_x", "dilation_x", "kernel_w", "kernel_h", "run", "in_w", "out_w")
    keeps = im2col_keeps_words(config, kernel_w=c["kernel_w"], kernel_h=c["kernel_h"])
    return _im2col_row(**{n: c[n] for n in names}, rows=config.rows, keeps=bool(keeps))


@lru_cache(1024)
def _conv_words(
    *,
    blocks: int,
    src_block: int,
    src_pitch: int,
    kernel: tuple[int, int],
    out: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    first: tuple[int, int],
    present: tuple[int, int],
    least: int,
) -> np.ndarray:
    """The words CONV reads, cycle by cycle, from ``src``; -1: none. Pairs are (y, x); ``present``:
    rows and columns of the input; ``least``: cycles that a tile takes at least."""
    rows, columns = (
        (first[i] + np.arange(out[i])[:, None] * stride[i] + np.arange(kernel[i]) * dilation[i]).T
        for i in (0, 1)
    )
    # Blocks, kernel rows, kernel columns, output rows, output columns.
    y, x = rows[None, :, None, :, None], columns[None, None, :, None, :]
    block = np.arange(blocks)[:, None, None, None, None] * src_block
    inside = (y >= 0) & (y < present[0]) & (x >= 0) & (x < present[1])
    words = np.where(inside, block + y * src_pitch + x, -1)
    words = words.reshape(-1, out[0] * out[1])
    if words.shape[1] < least:
        words = np.pad(words, ((0, 0), (0, least - words.shape[1])), constant_values=-1)
    return words.reshape(-1)


def conv_banks(c: Mapping[str, int], config: Config) -> np.ndarray:
    """The bank that CONV reads in each cycle from its first; -1: none."""
    words = _conv_words(
        blocks=c["blocks"],
        src_block=c["src_block"],
        src_pitch=c["src_pitch"],
        kernel=(c["kernel_h"], c["kernel_w"]),
        out=(c["out_h"], c["out_w"]),
        stride=(c["stride_y"], c["stride_x"]),
        dilation=(c["dilation_y"], c["dilation_x"]),
        first=(c["y0"], c["x0"]),
        present=(c["in_h"], c["in_w"]),
        least=config.rows,
    )
    return np.where(words < 0, -1, (c["src"] + words) % config.banks)


@dataclass(frozen=True)
class WindowTiming:
    """How long a WINDOW command is at work."""

    set_up: int
    """Cycles to prepare it."""
    walk_start: int
    """Cycles from then on, or from the end of the command before, to its first word."""
    words: int
    """Cycles in which it issues words."""
    fast: bool
    """It takes the fast path."""
    mode: tuple[int, ...]
    """What the next command must have in common with it to follow before its pipeline is empty."""


def window_timing(c: Mapping[str, int], config: Config) -> WindowTiming:
    """The timing of a WINDOW command."""
    if c["op"] == WindowOp.IM2COL:
        fast, words = False, c["out_h"] * im2col_row(c, config).steps
    elif c["op"] in ROW_OPS:
        fast, words = False, row_cycles(c, config)
    else:
        shape = WindowShape.of_command(c)
        fast = shape.is_fast(config)
        words = c["blocks"] * shape.block_tokens(config, c["op"])
    set_up = WINDOW_SET_UP + window_set_up_bits(c)
    mode = (fast, *(c[n] for n in window_modes(config)))
    return WindowTiming(set_up, window_walk_start(c["op"]), words, fast, mode)


def window_banks(c: Mapping[str, int], window: WindowTiming, config: Config) -> np.ndarray | None:
    """The banks that WINDOW reads, step by step; -1: none. None where they are not known: on the
    general path, and with windows in several parts."""
    if c["op"] == WindowOp.IM2COL:
        return _im2col_banks(c, config)
    if c["op"] in ROW_OPS:
        return None
    shape = WindowShape.of_command(c)
    if not window.fast or shape.further_parts:
        return None
    taps = shape.taps if c["op"] == WindowOp.DEPTHWISE else 0
    parameters = 0 if c["op"] == WindowOp.MAX else config.pass_param_words
    y, x = (c[f"{a}0"] + np.arange(n) for a, n in zip("yx", shape.region, strict=True))
    inside = ((y >= 0) & (y < c["in_h"]))[:, None] & (x >= 0) & (x < c["in_w"])
    pixels = c["src"] + y[:, None] * c["src_pitch"] + x
    words: list[np.ndarray] = []
    for block, part in np.ndindex(c["blocks"], config.window_passes):
        words += [
            c["weights"] + block * taps + np.arange(taps),
            c["params"]
            + (block * config.window_passes + part) * parameters
            + np.arange(parameters),
            np.where(inside, pixels + block * c["src_block"], -1).reshape(-1),
        ]
    read = np.concatenate(words)
    return np.where(read < 0, -1, read % config.banks)


def _im2col_banks(c: Mapping[str, int], config: Config) -> np.ndarray:
    """:func:`window_banks` of IM2COL."""
    steps, reads, _ = im2col_row(c, config)
    out = np.full((c["out_h"], steps), -1)
    if reads:
        step, kernel_row, word = np.array(reads).T
        y = c["y0"] + np.arange(c["out_h"])[:, None] * c["stride_y"] + kernel_row * c["dilation_y"]
        banks = (c["src"] + y * c["src_pitch"] + word) % config.banks
        out[:, step] = np.where((y >= 0) & (y < c["in_h"]), banks, -1)
    return out.reshape(-1)


def window_writes(
    c: Mapping[str, int], window: WindowTiming, config: Config
) -> tuple[np.ndarray, np.ndarray]:
    """The step that completes each word that WINDOW writes, and the bank that the word is in."""
    out_w, out_h, blocks, inner = c["out_w"], c["out_h"], c["blocks"], 1
    im2col = c["op"] == WindowOp.IM2COL
    passes = 1 if im2col else config.window_passes
    # Of a pass over a block.
    block_words, parts = window.words / blocks / passes, 0
    if im2col:
        inner = -(-c["kernel_w"] * c["kernel_h"] * c["run"] // config.rows)
        first, across, down = 0.0, block_words / out_h / out_w, block_words / out_h
    elif c["op"] in ROW_OPS:
        # In the last pass.
        across = 2 if c["op"] == WindowOp.NORMALISE else 1 + c["masked"]
        down = block_words = row_output_cycles(c, config) / blocks / passes
        first = window.words - blocks * passes * block_words
    elif window.fast:
        shape = WindowShape.of_command(c)
        across, down = c["stride_x"], shape.region[1] * c["stride_y"]
        parts = shape.further_parts
        words = block_words - parts * out_w * out_h
        first = words - 1 - (out_h - 1) * down - (out_w - 1) * across
    else:
        across = c["kernel_w"] * c["kernel_h"]
        down = across * out_w
        first = block_words - down * out_h
    n, y, x, k = np.ix_(*map(np.arange, (blocks * passes, out_h, out_w, inner)))
    steps = n * block_words + first + y * down + x * across + parts * (y * out_w + x + 1)
    places = c["out"] + (n // passes + k) * c["out_block"] + y * c["out_pitch"] + x
    return np.rint(steps + k * across / inner).astype(int).ravel(), (places % config.banks).ravel()


def post_group_cycles(pixels: int, config: Config) -> int:
    """Cycles from one group of a POST command from the accumulators to the next, whose parameters
    are read meanwhile."""
    return max(pixels, config.param_words + READ_AHEAD)


def post_reads(c: Mapping[str, int]) -> int:
    """Cycles in which a POST command from the scratchpad issues words for a group."""
    keeps = bool(post_keeps_operand(c["b_step"], c["b_pitch"]))
    return post_group_reads(c["out_w"] * c["out_h"], op=c["op"], keeps_operand=keeps)
