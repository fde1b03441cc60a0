"""Requantisation: the parameters' format and the arithmetic that they drive.

A channel's parameters are 64 bits. The parameters of a group of channels (``lanes`` for POST,
``rows`` for WINDOW) are consecutive, little-endian, from byte 0 of a scratchpad word, going on into
following words when a word of ``rows`` bytes is full; the rest of the last word is unused. Each
group starts at a word of its own.

``requantise`` maps an int32 accumulator to an int8 exactly as onnxruntime's float32 arithmetic does
(``saturate(rint(float32(acc + bias) * scale) + zero)``), in integers:

1. ``s = (acc + bias) mod 2^32`` as int32.
2. ``s`` rounded to 24 significant bits, half to even (float32 of an int32).
3. ``p = s * multiplier * 2^-shift`` exactly; rounded to 24 significant bits, half to even (the
   float32 product); rounded to an integer, half to even. Values beyond the clamp need no exact
   rounding.
4. ``clamp(p + zero, low, high)``.

NORMALISE's channels have two bits more (:data:`CHANNEL_FLAGS`), and what :mod:`systole.isa.rows`
says is done in front of step 1. The parameters of a row operation begin with 16 bytes for all
channels (:data:`SOFTMAX_PARAMS`, :data:`NORMALISE_PARAMS`); SOFTMAX's table follows, then or
otherwise the channels' parameters, block by block, each from a word of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from systole.isa.commands import Field, unpack

REQUANT_PARAMS = (
    Field("bias", 32, "added to the accumulator, modulo 2^32", signed=True),
    Field("multiplier", 24, "the scale's significand: 2^23..2^24-1, or 0"),
    Field("shift", 6, "scale = multiplier * 2^-shift"),
)
"""Fields packed from bit 0; the two highest bits are zero, but for NORMALISE."""

CHANNEL_FLAGS = (
    Field("negate", 1, "the normal number changes its sign"),
    Field("coarse", 1, "it has fewer fraction bits"),
)
"""NORMALISE: what follows the fields of ``REQUANT_PARAMS``."""

SOFTMAX_PARAMS = (
    Field("numerator", 24, "of the reciprocal of the result's scale, numerator * 2^-shift"),
    Field("shift", 8, "of the same", signed=True),
)
"""SOFTMAX's own parameters, packed from bit 0."""
NORMALISE_PARAMS = (
    Field("epsilon", 56, "added to the scaled variance"),
    Field("centred", 1, "1: the mean is taken off"),
)
"""NORMALISE's own parameters, packed from bit 0."""
ROW_PARAM_BYTES = 16
"""Bytes in which they stand; what is not named is zero."""
EXP_ENTRY_BYTES = 4
"""Bytes of an entry of SOFTMAX's table, little-endian."""

PARAM_BYTES = 8
"""Bytes of one channel's parameters."""

PARAM_AT = dict(
    zip(
        (f.name for f in REQUANT_PARAMS),
        accumulate((f.bits for f in REQUANT_PARAMS), initial=0),
        strict=False,
    )
)
"""First bit of each of ``REQUANT_PARAMS`` by name."""


def pack_param(bias: int, multiplier: int, shift: int) -> int:
    """The 64 bits of one channel's parameters; each value modulo the size of its field."""
    return pack(REQUANT_PARAMS, bias=bias, multiplier=multiplier, shift=shift)


def unpack_param(number: int) -> tuple[int, int, int]:
    """Bias, multiplier and shift in the 64 bits of one channel's parameters."""
    values = unpack_signed(REQUANT_PARAMS, number)
    return values["bias"], values["multiplier"], values["shift"]


def pack(fields: Sequence[Field], **values: int) -> int:
    """``values`` of all ``fields``, each modulo the size of its field, packed from bit 0."""
    number = 0
    for f in reversed(fields):
        number = number << f.bits | (values[f.name] & ((1 << f.bits) - 1))
    return number


def unpack_signed(fields: Sequence[Field], number: int) -> dict[str, int]:
    """The bits of ``fields``, packed from bit 0 of ``number``, by name."""
    values = unpack(fields, number)
    return {
        f.name: values[f.name] - (f.signed and values[f.name] >> (f.bits - 1) << f.bits)
        for f in fields
    }
