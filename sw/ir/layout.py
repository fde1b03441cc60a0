"""How tensors, weights and parameters lie in DRAM.

A scratchpad word of ``rows`` bytes takes ``vector_bytes`` in DRAM, a weight word of ``cols`` bytes
``weight_vector_bytes`` (powers of two; the bytes beyond are zero).

* *blocked*: activations as words [N][C / rows][H][W], channels of a block in the lanes.
* *packed*: few-channel inputs; each image row is its bytes (x, c), c fastest, filled up to whole
  words."""

from __future__ import annotations

import numpy as np

from systole.isa import Config
from systole.isa.numerics import wrap_int32
from systole.isa.params import PARAM_BYTES


def blocks_of(channels: int, lanes: int) -> int:
    """Words that ``channels`` take side by side."""
    return -(-channels // lanes)


def to_dram(words: np.ndarray, vector_bytes: int) -> bytes:
    """int8 words (..., lanes) as DRAM bytes."""
    flat = np.ascontiguousarray(words, np.int8).reshape(-1, words.shape[-1])
    out = np.zeros((len(flat), vector_bytes), np.int8)
    out[:, : flat.shape[1]] = flat
    return out.tobytes()


def from_dram(data: bytes, vector_bytes: int, lanes: int) -> np.ndarray:
    """DRAM bytes as int8 words (count, lanes)."""
    return np.frombuffer(data, np.int8).reshape(-1, vector_bytes)[:, :lanes]


def pad_axis(array: np.ndarray, axis: int, multiple: int) -> np.ndarray:
    """Zeros appended along ``axis`` up to a multiple."""
    short = -array.shape[axis] % multiple
    if not short:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, short)
    return np.pad(array, widths)


def pack_blocked(array: np.ndarray, rows: int) -> np.ndarray:
    """int8 (N, C, H, W) as words (N, C / rows, H, W, rows)."""
    a = pad_axis(array, 1, rows)
    n, c, h, w = a.shape
    return a.reshape(n, c // rows, rows, h, w).transpose(0, 1, 3, 4, 2)


def unpack_blocked(words: np.ndarray, shape: tuple[int, int, int, int], rows: int) -> np.ndarray:
    """The inverse of :func:`pack_blocked`; ``words`` is (count, rows)."""
    n, c, h, w = shape
    a = words.reshape(n, blocks_of(c, rows), h, w, rows).transpose(0, 1, 4, 2, 3)
    return np.ascontiguousarray(a.reshape(n, -1, h, w)[:, :c])


def packed_pitch(channels: int, width: int, rows: int) -> int:
    """Words of one image row in the packed layout."""
    return -(-channels * width // rows)


def words_of(shape: tuple[int, int, int, int], rows: int, *, packed: bool) -> int:
    """Words of a tensor of shape (N, C, H, W) in either layout."""
    n, c, h, w = shape
    return n * h * (packed_pitch(c, w, rows) if packed else blocks_of(c, rows) * w)


def pack_packed(array: np.ndarray, rows: int) -> np.ndarray:
    """int8 (N, C, H, W) as words (N, H, pitch, rows), packed."""
    n, c, h, w = array.shape
    a = pad_axis(array.transpose(0, 2, 3, 1).reshape(n, h, w * c), 2, rows)
    return a.reshape(n, h, -1, rows)


def unpack_packed(words: np.ndarray, shape: tuple[int, int, int, int], rows: int) -> np.ndarray:
    """The inverse of :func:`pack_packed`; ``words`` is (count, rows)."""
    n, c, h, w = shape
    a = words.reshape(n, h, -1)[:, :, : w * c].reshape(n, h, w, c)
    return np.ascontiguousarray(a.transpose(0, 3, 1, 2))


def pack_weights(weights: np.ndarray, config: Config) -> np.ndarray:
    """int8 (O, C, kh, kw) as weight words (O / cols, C / rows, kh, kw, rows, cols)."""
    w = pad_axis(pad_axis(weights, 0, config.cols), 1, config.rows)
    o, c, kh, kw = w.shape
    w = w.reshape(o // config.cols, config.cols, c // config.rows, config.rows, kh, kw)
    return w.transpose(0, 2, 4, 5, 3, 1)


def pack_params(
    bias: np.ndarray, multiplier: np.ndarray, shift: np.ndarray, group: int, rows: int
) -> np.ndarray:
    """Per-channel parameters as scratchpad words (channels / group * words per group, rows)."""
    raw = (
        (wrap_int32(bias).view(np.uint32).astype(np.uint64))
        | (multiplier.astype(np.uint64) << np.uint64(32))
        | (shift.astype(np.uint64) << np.uint64(56))
    )
    data = pad_axis(raw, 0, group).astype("<u8").view(np.int8).reshape(-1, group * PARAM_BYTES)
    return pad_axis(data, 1, rows).reshape(-1, rows)
