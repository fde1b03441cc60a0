"""What a program's commands do, counted: accesses of every memory, and arithmetic.

The counts follow from the fields of the commands alone. They are those at the ports of the
hardware's memories, whatever the commands wait for; the trace's own memories are left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass

from systole.isa import Config, LoadTarget, Opcode, PostOp, PostSource, WindowOp
from systole.isa.commands import ROW_OPS, TABLE_BYTES
from systole.isa.params import EXP_ENTRY_BYTES
from systole.isa.timing import WindowShape, post_keeps_operand, table_reads
from systole.sw.runtime.program import Program
from systole.sw.simulate.cycles.engines import im2col_row
from systole.sw.simulate.cycles.prediction import command_traffic


@dataclass(frozen=True, kw_only=True)
class Accesses:
    """Accesses of memories, and arithmetic: of a command, a layer or a program."""

    macs: int = 0
    """Multiply-accumulates of the array, those of unused lanes included."""
    window_macs: int = 0
    """Multiply-accumulates (DEPTHWISE) and additions (SUM) of WINDOW that make up its results."""
    requantised: int = 0
    """Values that POST and WINDOW requantise."""
    combined: int = 0
    """Values that POST combines with a second operand."""
    scratchpad_reads: int = 0
    """Words of ``rows`` bytes."""
    scratchpad_writes: int = 0
    """Parts of ``written_lanes`` bytes: a word is written whole or in parts."""
    weight_reads: int = 0
    """Words of ``cols`` bytes of the weight buffer."""
    weight_writes: int = 0
    accumulator_reads: int = 0
    """Words of ``cols`` int32."""
    accumulator_writes: int = 0
    table_reads: int = 0
    """Lookups, one for each value."""
    table_writes: int = 0
    """Words of POST's table memory."""
    line_reads: int = 0
    """Words of WINDOW's line memory: ``window_square - 1`` times ``reduced_lanes`` bytes."""
    line_writes: int = 0
    older_line_reads: int = 0
    """Words of the line memory that only kernels by columns use: the other ``window_lines``."""
    older_line_writes: int = 0
    row_products: int = 0
    """Products of 9 by 18 bits of WINDOW's row operations."""
    row_table_reads: int = 0
    """Lookups in SOFTMAX's table, one for each value."""
    row_table_writes: int = 0
    """Its entries."""
    row_number_reads: int = 0
    """Words of the two memories of rows' numbers, of 36 bits."""
    row_number_writes: int = 0
    queue_reads: int = 0
    """Words of the commands as they are in the program, from their engines' queues."""
    queue_writes: int = 0
    fetch_reads: int = 0
    """Beats of the bus, in the buffer between bus and queues."""
    fetch_writes: int = 0
    dram_read_bytes: int = 0
    dram_write_bytes: int = 0

    def __add__(self, other: Accesses) -> Accesses:
        return Accesses.of(a + b for a, b in zip(astuple(self), astuple(other), strict=True))

    @classmethod
    def of(cls, counts: Iterable[int]) -> Accesses:
        """The counts in the order of the fields."""
        return cls(**dict(zip(cls.__dataclass_fields__, counts, strict=True)))


def layer_accesses(program: Program) -> list[Accesses]:
    """What each layer of a program does, without the fetching of its commands."""
    totals = [[0] * len(Accesses.__dataclass_fields__) for _ in program.layers]
    for layer, c in zip(program.command_layers, program.decoded()):
        for i, count in enumerate(astuple(command_accesses(c, program.config))):
            totals[layer][i] += count
    return [Accesses.of(counts) for counts in totals]


def fetch_accesses(program: Program) -> Accesses:
    """The fetching of a program's commands."""
    beats = program.fetched_bytes // program.config.beat_bytes
    return Accesses(fetch_reads=beats, fetch_writes=beats, dram_read_bytes=program.fetched_bytes)


def command_accesses(c: Mapping[str, int], config: Config) -> Accesses:
    """What a command does, from its engine's queue on. ``c``: its fields; not END, which goes to no
    queue."""
    words = 1 + c["present"].bit_count()
    counts = _COUNTS[Opcode(c["opcode"])](c, config)
    return Accesses(queue_reads=words, queue_writes=words) + counts


def _load(c: Mapping[str, int], config: Config) -> Accesses:
    words = c["count0"] * c["count1"] * c["count2"]
    read, _ = command_traffic(c, config)
    if c["target"] == LoadTarget.WEIGHTS:
        return Accesses(weight_writes=words, dram_read_bytes=read)
    return Accesses(scratchpad_writes=words * config.word_parts, dram_read_bytes=read)


def _store(c: Mapping[str, int], config: Config) -> Accesses:
    _, written = command_traffic(c, config)
    words = c["count0"] * c["count1"] * c["count2"]
    return Accesses(scratchpad_reads=words, dram_write_bytes=written)


def _conv(c: Mapping[str, int], config: Config) -> Accesses:
    outputs = c["out_w"] * c["out_h"]
    tiles = c["blocks"] * c["kernel_w"] * c["kernel_h"]
    vectors = tiles * outputs
    return Accesses(
        macs=vectors * config.rows * config.cols,
        scratchpad_reads=c["blocks"] * _taps_inside(c),
        weight_reads=tiles * config.rows,
        # The first tile overwrites unless the command accumulates.
        accumulator_reads=vectors if c["accumulate"] else vectors - outputs,
        accumulator_writes=vectors,
    )


def _post(c: Mapping[str, int], config: Config) -> Accesses:
    words = c["groups"] * c["out_w"] * c["out_h"]
    values = words * config.lanes
    sums = c["source"] == PostSource.ACCUMULATOR
    combines = c["op"] != PostOp.NONE
    keeps = not sums and bool(post_keeps_operand(c["b_step"], c["b_pitch"]))
    operands = 0 if sums else words
    if combines:
        operands += c["groups"] if keeps else words
    return Accesses(
        requantised=values if sums else 0,
        combined=values if combines else 0,
        scratchpad_reads=operands
        + (c["groups"] * config.param_words if sums else 0)
        + (table_reads(config) if c["lut"] else 0),
        scratchpad_writes=words * (config.lanes // config.written_lanes),
        # Every group reads the whole word and takes its lanes.
        accumulator_reads=words if sums else 0,
        table_reads=values if c["lut"] else 0,
        table_writes=table_reads(config) if c["lut"] else 0,
    )


def _window(c: Mapping[str, int], config: Config) -> Accesses:
    if c["op"] == WindowOp.IM2COL:
        return _im2col(c, config)
    if c["op"] in ROW_OPS:
        return _row(c, config)
    shape = WindowShape.of_command(c)
    fast, maximum = shape.is_fast(config), c["op"] == WindowOp.MAX
    passes = c["blocks"] * config.window_passes
    results = passes * shape.pixels
    words = passes * (shape.region[0] * shape.region[1] if fast else shape.pixels * shape.taps)
    read = passes * (_region_inside(c, shape) if fast else _taps_inside(c))
    # By columns, a column of a window but the newest is read again.
    by_columns = fast and shape.by_columns
    columns = results * (shape.kernel[1] - 1) if by_columns else 0
    stored = 0
    if c["op"] == WindowOp.DEPTHWISE:
        again = shape.rereads_weights(config)
        read += passes * shape.taps * (shape.pixels if again else 1)
        stored = 0 if fast or again else passes * shape.taps
    return Accesses(
        window_macs=0 if maximum else results * shape.taps * config.reduced_lanes,
        requantised=0 if maximum else results * config.reduced_lanes,
        scratchpad_reads=read + (0 if maximum else passes * config.pass_param_words),
        scratchpad_writes=results * (config.reduced_lanes // config.written_lanes),
        line_reads=words + columns,
        line_writes=words if fast else stored,
        older_line_reads=words + columns if by_columns else 0,
        older_line_writes=words if by_columns else 0,
    )


def _row(c: Mapping[str, int], config: Config) -> Accesses:
    """SOFTMAX and NORMALISE."""
    positions = c["out_w"]
    results = c["blocks"] * config.window_passes * positions
    values, own = results * config.reduced_lanes, config.row_param_words
    written = {
        "requantised": values,
        "scratchpad_writes": results * (config.reduced_lanes // config.written_lanes),
    }
    if c["op"] == WindowOp.SOFTMAX:
        # The highest byte of an entry is not looked at.
        table = -(-(EXP_ENTRY_BYTES * TABLE_BYTES - 1) // config.rows)
        return Accesses(
            **written,
            scratchpad_reads=own + table + 3 * results * (1 + c["masked"]),
            row_table_reads=2 * values,
            row_table_writes=TABLE_BYTES,
            # The largest element in two passes; multiplier and shift.
            row_number_reads=3 * results,
            row_number_writes=2 * positions,
        )
    return Accesses(
        **written,
        scratchpad_reads=own + config.window_param_words * c["blocks"] + 2 * results,
        # A square; two digits of a factor.
        row_products=3 * values,
        row_number_reads=2 * results,
        row_number_writes=2 * positions,
    )


def _im2col(c: Mapping[str, int], config: Config) -> Accesses:
    row = im2col_row(c, config)
    depth = c["kernel_w"] * c["kernel_h"] * c["run"]
    words = -(-depth // config.rows) * c["out_w"] * c["out_h"]
    return Accesses(
        scratchpad_reads=sum(_rows_inside(c, ky) for _, ky, _ in row.reads),
        scratchpad_writes=words * config.word_parts,
        line_reads=c["out_h"] * row.steps,
        line_writes=c["out_h"] * row.fetches,
    )


def _inside(first: int, step: int, count: int, size: int) -> int:
    """How many of ``count`` coordinates from ``first`` on, ``step`` apart, lie in an axis of
    ``size``."""
    below = min(count, max(0, -(first // step)))
    return max(0, min(count, -((first - size) // step)) - below)


def _rows_inside(c: Mapping[str, int], ky: int) -> int:
    """Output rows whose tap row ``ky`` lies in the input."""
    first = c["y0"] + ky * c["dilation_y"]
    return _inside(first, c["stride_y"], c["out_h"], c["in_h"])


def _taps_inside(c: Mapping[str, int]) -> int:
    """Pairs of an output and a tap that lie in the input, of one channel block."""
    rows = sum(_rows_inside(c, ky) for ky in range(c["kernel_h"]))
    columns = sum(
        _inside(c["x0"] + kx * c["dilation_x"], c["stride_x"], c["out_w"], c["in_w"])
        for kx in range(c["kernel_w"])
    )
    return rows * columns


def _region_inside(c: Mapping[str, int], shape: WindowShape) -> int:
    """Words of the padded input under an undilated window that lie in the input, of one channel
    block."""
    height, width = shape.region
    return _inside(c["y0"], 1, height, c["in_h"]) * _inside(c["x0"], 1, width, c["in_w"])


_COUNTS: dict[Opcode, Callable[[Mapping[str, int], Config], Accesses]] = {
    Opcode.LOAD: _load,
    Opcode.STORE: _store,
    Opcode.CONV: _conv,
    Opcode.POST: _post,
    Opcode.WINDOW: _window,
}
