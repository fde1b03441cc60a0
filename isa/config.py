"""The hardware configuration: one frozen dataclass from which every width and depth is derived."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path

from systole.isa.commands import ACC_ADDRESS_BITS, ADDRESS_BITS, WindowOp
from systole.isa.params import ROW_PARAM_BYTES


class ConfigError(ValueError):
    """An illegal configuration; the message names the field, its value and the limit."""


def bits_for(count: int) -> int:
    """Bits of an unsigned number in ``range(count)``, at least 1."""
    return max(1, (count - 1).bit_length())


def ceil_pow2(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


def largest_divisor(n: int, at_most: int) -> int:
    """The largest divisor of ``n`` that is at most ``at_most``."""
    return max(d for d in range(1, at_most + 1) if n % d == 0)


LARGEST_SQUARE = 5
"""Rows and columns of the largest window that the window engine holds in registers."""


WINDOW_PASSES = (1, 2, 4, 8)
"""Passes that the window engine may take over a block of channels. They share its 8 words of
parameters evenly."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One accelerator. All sizes in bytes; ``rows``/``cols`` need not be equal or powers of two.

    ``rows`` is the reduction dimension (input channels), ``cols`` the output channels of one pass.
    Raises :class:`ConfigError` on construction when a value is illegal.
    """

    rows: int = 16
    """Rows of the array: input channels of one pass, and the int8 lanes of a scratchpad word."""
    cols: int = 16
    """Columns of the array: output channels of one pass."""
    cell: int = 4
    """Processing elements chained between two pipeline registers, in both directions, at most
    (the largest divisor of ``rows`` and of ``cols`` is taken). 1 is the classic systolic array;
    more means a shorter wavefront at a lower clock."""
    inner_product: str = "plain"
    """How the array multiplies. plain: a multiplier for each row and column. fast: one for every
    two rows of a column (Winograd's inner product), with the same results and commands; ``cell``
    then counts these. It takes ``rows / 2 + cols`` multipliers besides, at the edges."""
    post_lanes: int = 0
    """Output channels that the post-processing handles a cycle: a divisor of ``gcd(rows, cols)``. 0
    is all of that. Half of it saves half of the post-processing's logic, and costs time where the
    array has little to add up."""
    scratchpad_bytes: int = 256 * 1024
    """Activations, parameters and tables on chip."""
    weight_bytes: int = 64 * 1024
    """The weight buffer, in front of the array."""
    accumulator_bytes: int = 128 * 1024
    """int32 sums behind the array; both halves together."""
    banks: int = 4
    """Scratchpad banks (power of two), interleaved by word address."""
    axi_data_bits: int = 128
    """Width of the AXI4 data bus; one beat a cycle in each direction."""
    axi_addr_bits: int = 40
    """Width of the AXI4 addresses."""
    axi_burst_beats: int = 64
    """Longest burst issued; also bounded by AXI's 4 KiB boundary."""
    axi_outstanding: int = 8
    """Read bursts in flight, per device."""
    queue_depth: int = 16
    """Commands each engine's queue holds."""
    window: bool = True
    """The window engine (depthwise convolution, pooling, im2col) exists."""
    window_width: int = 256
    """Words of the window engine's line buffer: the widest row its fast path can hold. Wider images
    are cut into columns."""
    window_kernel: int = 7
    """Kernel height and width up to which the window engine's fast path goes. 3: a line buffer
    and a window smaller by more than half; larger kernels take a cycle a tap. 7: nearly twice the
    line buffer; kernels of more than 5 rows or columns take a cycle for each of their columns, and
    those dilated by 2 or 3 that span no more than 7 are as fast."""
    window_lanes: int = 0
    """Channels that the window engine reduces a cycle: ``rows``, its half, quarter or eighth; 0 is
    all of them. It goes over each block of channels in as many passes. Half of them saves half of
    its multipliers and of its line buffer, and makes depthwise convolution and pooling take twice
    as long."""
    zero_points: bool = False
    """Zero points are taken off where operands enter the array (activations and weights) and the
    window engine (weights). uint8 weights with a zero point in common, and products of two
    activations, then take one pass, not two or three. The array's multipliers are of 9 bits, the
    window engine's of 8 by 9."""
    row_ops: bool = False
    """The window engine does Softmax and layer normalisation, too."""
    trace: bool = True
    """The trace unit exists."""
    counters: bool = True
    """The engines' performance counters (BUSY, MEMORY, WAIT of each engine) exist. Without them,
    which costs no cycles, their registers read as 0; the trace tells the same and more."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            want = type(f.default)
            self._need(
                type(getattr(self, f.name)) is want, f.name, f"must be of type {want.__name__}"
            )
        self._check_engines()
        self._check_memories()

    def _need(self, ok: bool, field: str, limit: str) -> None:
        if not ok:
            raise ConfigError(f"configuration: {field} = {getattr(self, field)!r}: {limit}")

    def _check_engines(self) -> None:
        """Check the array, its lanes and the bus."""
        self._need(4 <= self.rows <= 64, "rows", "must be 4..64")
        self._need(4 <= self.cols <= 64, "cols", "must be 4..64")
        self._need(1 <= self.cell <= 8, "cell", "must be 1..8")
        self._need(
            self.inner_product in ("plain", "fast"), "inner_product", "must be plain or fast"
        )
        self._need(
            self.inner_product == "plain" or self.rows % 2 == 0,
            "inner_product",
            f"fast takes rows in pairs, and rows must be even, not {self.rows}",
        )
        self._need(
            self.post_lanes == 0
            or (self.post_lanes > 0 and self.most_lanes % self.post_lanes == 0),
            "post_lanes",
            f"must be a divisor of gcd(rows, cols) = {self.most_lanes}, or 0 for all of that",
        )
        self._need(self.banks in (2, 4, 8, 16), "banks", "must be 2, 4, 8 or 16")
        self._need(
            self.axi_data_bits in (32, 64, 128, 256, 512),
            "axi_data_bits",
            "must be 32, 64, 128, 256 or 512",
        )
        self._need(32 <= self.axi_addr_bits <= 64, "axi_addr_bits", "must be 32..64")
        self._need(
            self.axi_burst_beats in (1, 2, 4, 8, 16, 32, 64, 128, 256),
            "axi_burst_beats",
            "must be a power of two, 1..256",
        )
        self._need(
            self.axi_burst_beats * self.axi_data_bits // 8 <= 4096,
            "axi_burst_beats",
            "a burst must not exceed 4096 bytes",
        )
        self._need(1 <= self.axi_outstanding <= 64, "axi_outstanding", "must be 1..64")
        self._need(2 <= self.queue_depth <= 256, "queue_depth", "must be 2..256")
        self._need(
            16 <= self.window_width <= 4096 and self.window_width.bit_count() == 1,
            "window_width",
            "must be a power of two, 16..4096",
        )
        self._need(self.window_kernel in (3, 5, 7), "window_kernel", "must be 3, 5 or 7")
        self._need(
            self.window or not self.row_ops, "row_ops", "must be false without the window engine"
        )
        self._need(
            self.window_lanes == 0 or self.rows in [n * self.window_lanes for n in WINDOW_PASSES],
            "window_lanes",
            f"must be rows = {self.rows}, its half, quarter or eighth, or 0 for all of them",
        )

    def _check_memories(self) -> None:
        """Check the sizes of memories."""
        words = self.scratchpad_words
        self._need(
            self.scratchpad_bytes == words * self.rows and words % self.banks == 0,
            "scratchpad_bytes",
            f"must be a multiple of rows * banks = {self.rows * self.banks}",
        )
        self._need(
            64 <= words <= 1 << ADDRESS_BITS,
            "scratchpad_bytes",
            f"must hold 64..{1 << ADDRESS_BITS} words of rows bytes",
        )
        self._need(
            self.weight_bytes == self.weight_words * self.cols
            and self.weight_words % self.rows == 0,
            "weight_bytes",
            f"must be a multiple of rows * cols = {self.rows * self.cols}",
        )
        self._need(
            2 * self.rows <= self.weight_words <= 1 << ADDRESS_BITS,
            "weight_bytes",
            f"must hold 2..{(1 << ADDRESS_BITS) // self.rows} tiles of rows * cols bytes",
        )
        self._need(
            self.accumulator_bytes == self.acc_words * 4 * self.cols and self.acc_words % 2 == 0,
            "accumulator_bytes",
            f"must be a multiple of 8 * cols = {8 * self.cols}",
        )
        self._need(
            32 <= self.acc_words <= 1 << ACC_ADDRESS_BITS,
            "accumulator_bytes",
            f"must hold 32..{1 << ACC_ADDRESS_BITS} words",
        )

    # Derived widths ------------------------------------------------------------------------------

    @property
    def most_lanes(self) -> int:
        """Output channels the post-processing handles a cycle, at most: ``gcd(rows, cols)``."""
        return math.gcd(self.rows, self.cols)

    @property
    def lanes(self) -> int:
        """Output channels the post-processing handles a cycle."""
        return self.post_lanes or self.most_lanes

    @property
    def groups(self) -> int:
        """Passes of the post-processing over one accumulator word: ``cols / lanes``."""
        return self.cols // self.lanes

    @property
    def word_groups(self) -> int:
        """Groups of ``lanes`` channels in a scratchpad word: ``rows / lanes``."""
        return self.rows // self.lanes

    @property
    def last_group(self) -> int:
        """The last group's position in a scratchpad word, in groups: ``rows / lanes - 1``."""
        return self.word_groups - 1

    @property
    def last_window_op(self) -> int:
        """The last of the operations that the window engine has."""
        return WindowOp.NORMALISE if self.row_ops else WindowOp.IM2COL

    @property
    def row_param_words(self) -> int:
        """Words of a row operation's own parameters."""
        return -(-ROW_PARAM_BYTES // self.rows)

    @property
    def fast(self) -> bool:
        """The array multiplies by the fast inner product."""
        return self.inner_product == "fast"

    @property
    def multiplier_rows(self) -> int:
        """Rows that share a multiplier of the array: MACs a multiplier and cycle, at most."""
        return 2 if self.fast else 1

    @property
    def cell_rows(self) -> int:
        pair = self.multiplier_rows
        return pair * largest_divisor(self.rows // pair, self.cell)

    @property
    def cell_cols(self) -> int:
        return largest_divisor(self.cols, self.cell)

    @property
    def scratchpad_words(self) -> int:
        return self.scratchpad_bytes // self.rows

    @property
    def weight_words(self) -> int:
        return self.weight_bytes // self.cols

    @property
    def acc_words(self) -> int:
        """Accumulator words (of ``cols`` int32) in both halves together."""
        return self.accumulator_bytes // (4 * self.cols)

    @property
    def acc_half(self) -> int:
        """Accumulator words in one half."""
        return self.acc_words // 2

    @property
    def operand_bits(self) -> int:
        """Bits of the array's operands and of the window engine's weights: int8, or int8 less a
        zero point."""
        return 9 if self.zero_points else 8

    @property
    def least_zero_point(self) -> int:
        """The least zero point that a command may name."""
        return -128 if self.zero_points else 0

    @property
    def most_zero_point(self) -> int:
        """The largest zero point that a command may name."""
        return 127 if self.zero_points else 0

    @property
    def reduced_lanes(self) -> int:
        """Channels that the window engine reduces a cycle."""
        return self.window_lanes or self.rows

    @property
    def window_passes(self) -> int:
        """Passes of the window engine over a block of channels: ``rows / reduced_lanes``."""
        return self.rows // self.reduced_lanes

    @property
    def written_lanes(self) -> int:
        """Channels of a scratchpad word that are written together, whatever writes them."""
        return math.gcd(self.lanes, self.reduced_lanes)

    @property
    def word_parts(self) -> int:
        """Parts of a scratchpad word that can be written alone: ``rows / written_lanes``."""
        return self.rows // self.written_lanes

    @property
    def window_square(self) -> int:
        """Rows and columns of the window that the window engine holds in registers. A larger kernel
        on the fast path is reduced a column a cycle."""
        return min(self.window_kernel, LARGEST_SQUARE)

    @property
    def window_by_columns(self) -> bool:
        """The window engine's fast path takes kernels that its registers do not hold."""
        return self.window_kernel > self.window_square

    @property
    def window_lines(self) -> int:
        """Rows in the window engine's line buffer: all but the newest of a window in registers;
        where columns are read again, that one, too."""
        return self.window_kernel if self.window_by_columns else self.window_kernel - 1

    @property
    def beat_bytes(self) -> int:
        return self.axi_data_bits // 8

    @property
    def vector_bytes(self) -> int:
        """Bytes one scratchpad word takes in DRAM: ``rows`` rounded up to a power of two."""
        return ceil_pow2(self.rows)

    @property
    def weight_vector_bytes(self) -> int:
        """Bytes one weight word takes in DRAM: ``cols`` rounded up to a power of two."""
        return ceil_pow2(self.cols)

    @property
    def param_words(self) -> int:
        """Scratchpad words holding the requantisation parameters of ``lanes`` channels."""
        return -(-8 * self.lanes // self.rows)

    @property
    def window_param_words(self) -> int:
        """Scratchpad words holding the requantisation parameters of ``rows`` channels."""
        return 8

    @property
    def pass_param_words(self) -> int:
        """Those of them that a pass of the window engine reads."""
        return self.window_param_words // self.window_passes

    # Serialisation -------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, int | bool | str]:
        return dataclasses.asdict(self)

    @property
    def hash(self) -> int:
        """32 bits that identify the configuration; the CONFIG_HASH register holds them."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Config:
        """Raises :class:`ConfigError` on unknown keys or illegal values."""
        known = {f.name for f in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise ConfigError(
                    f"configuration: unknown field {key!r}; known: {', '.join(sorted(known))}"
                )
        return cls(**values)  # type: ignore[arg-type]

    @classmethod
    def from_toml(cls, path: str | Path) -> Config:
        """Read a flat TOML file of fields. Raises :class:`ConfigError` naming the file."""
        try:
            with open(path, "rb") as f:
                values = tomllib.load(f)
        except OSError as e:
            raise ConfigError(f"configuration file {path}: {e.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            raise ConfigError(f"configuration file {path}: {e}") from None
        return cls.from_dict(values)

    @classmethod
    def sized(cls, rows: int, cols: int, **overrides: object) -> Config:
        """A configuration of ``rows`` x ``cols`` with memories near the defaults' byte sizes,
        rounded down to what the array's shape asks for."""
        if not (4 <= rows <= 64 and 4 <= cols <= 64):
            raise ConfigError(f"configuration: rows x cols = {rows} x {cols}: each must be 4..64")
        banks = overrides.get("banks", cls.banks)
        values: dict[str, object] = {"rows": rows, "cols": cols}
        for name, multiple in (
            ("scratchpad_bytes", rows * int(banks)),  # type: ignore[call-overload]
            ("weight_bytes", rows * cols),
            ("accumulator_bytes", 8 * cols),
        ):
            default = getattr(cls, name)
            values[name] = max(default // multiple, 2) * multiple
        return cls.from_dict(values | overrides)
