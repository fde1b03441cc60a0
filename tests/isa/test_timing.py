"""The timing contract: its rules, and that the hardware has the latencies it states."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest

from systole.hw.arithmetic.requantise import Requantise
from systole.hw.conv.fast_array import array_of
from systole.hw.post.combine import PostCombine
from systole.hw.post.engine import IN_FLIGHT as POST_IN_FLIGHT
from systole.hw.post.table import PostTable
from systole.hw.window.lines import WindowReduce
from systole.hw.window.writeback import IN_FLIGHT as WINDOW_IN_FLIGHT
from systole.isa import COMMANDS, CSRS, Config, Engine, Opcode, PostOp, PostSource, WindowOp, timing
from systole.isa.commands import MAX_KERNEL, MAX_RUN, MAX_STRIDE, unpack
from systole.isa.csr import ENGINE_STATE, EngineState
from systole.isa.params import PARAM_AT, PARAM_BYTES, pack_param, unpack_param
from systole.isa.timing import WindowShape

CONFIG = Config()


def shape(kernel: int = 3, stride: int = 1, dilation: int = 1, out: int = 16) -> WindowShape:
    return WindowShape(
        kernel=(kernel, kernel),
        stride=(stride, stride),
        dilation=(dilation, dilation),
        out=(out, out),
    )


@pytest.mark.parametrize(
    "fast, fields",
    [
        (True, {}),
        (True, {"kernel": 5}),
        (True, {"kernel": 6}),
        (True, {"kernel": 7}),
        (False, {"kernel": 8}),
        (True, {"kernel": 7, "stride": 4}),
        # By columns, a cycle for each word and column would be more than one for each tap.
        (False, {"kernel": 7, "stride": 5}),
        (False, {"kernel": 7, "out": 1}),
        (True, {"stride": 3}),
        (False, {"stride": 4}),
        (True, {"dilation": 2}),
        (True, {"dilation": 3}),
        (False, {"dilation": 4}),
        (False, {"kernel": 2, "dilation": 4}),  # more than FAST_DILATION
        (False, {"dilation": 2, "out": 2}),  # outputs that lie apart from each other
        (True, {"dilation": 2, "out": 3}),
        (True, {"kernel": 1, "dilation": 2}),  # of one tap, a dilation says nothing
        (True, {"out": 254}),
        (False, {"out": 255}),  # a padded row of 257 words
        (False, {"kernel": 1, "out": 1}),  # a row of one word
    ],
)
def test_fast_path(fast: bool, fields: dict[str, int]) -> None:
    config = dataclasses.replace(CONFIG, window_kernel=7)
    assert shape(**fields).is_fast(config) is fast
    limited = dataclasses.replace(CONFIG, window_kernel=5)
    undilated = fields.get("dilation", 1) == 1 or fields.get("kernel") == 1
    assert shape(**fields).is_fast(limited) is (fast and fields.get("kernel", 3) <= 5 and undilated)


def test_a_row_of_columns_is_no_gain() -> None:
    config = dataclasses.replace(CONFIG, window_kernel=7)
    for kernel, fast in (((1, 7), False), ((2, 7), True), ((7, 1), True)):
        assert dataclasses.replace(shape(), kernel=kernel).is_fast(config) is fast


def test_fast_path_needs_both_axes() -> None:
    for axis in (0, 1):
        kernel = (3, 8) if axis else (8, 3)
        assert not dataclasses.replace(shape(), kernel=kernel).is_fast(CONFIG)
    assert not shape(kernel=5).is_fast(dataclasses.replace(CONFIG, window_kernel=3))


def test_tokens_of_a_block() -> None:
    assert shape().block_tokens(CONFIG, WindowOp.MAX) == 18 * 18
    assert shape().block_tokens(CONFIG, WindowOp.SUM) == 18 * 18 + 8
    assert shape().block_tokens(CONFIG, WindowOp.DEPTHWISE) == 18 * 18 + 9 + 8
    # 5 x 5: two further parts for each output.
    assert shape(kernel=5).block_tokens(CONFIG, WindowOp.MAX) == 20 * 20 + 2 * 16 * 16
    # 7 x 7: by columns, six further ones.
    config = dataclasses.replace(CONFIG, window_kernel=7)
    assert shape(kernel=7).block_tokens(config, WindowOp.MAX) == 22 * 22 + 6 * 16 * 16
    assert (
        shape(kernel=7).block_tokens(dataclasses.replace(CONFIG, window_kernel=5), WindowOp.MAX)
        == 49 * 16 * 16
    )
    # The general path: a token for each tap; with too many taps, another for its weights.
    assert shape(dilation=4).block_tokens(CONFIG, WindowOp.DEPTHWISE) == 9 * 16 * 16 + 9 + 8
    # Dilated: as a kernel that spans as much; by columns, only those of the kernel.
    assert shape(dilation=2).block_tokens(CONFIG, WindowOp.MAX) == 20 * 20 + 2 * 16 * 16
    assert shape(dilation=3).block_tokens(CONFIG, WindowOp.MAX) == 22 * 22 + 2 * 16 * 16
    assert shape(kernel=17).block_tokens(CONFIG, WindowOp.DEPTHWISE) == 2 * 289 * 16 * 16 + 8


def test_window_shape_of_command() -> None:
    fields = dict(kernel_h=1, kernel_w=2, stride_y=3, stride_x=4, dilation_y=5, dilation_x=6)
    expected = WindowShape(kernel=(1, 2), stride=(3, 4), dilation=(5, 6), out=(7, 8))
    assert WindowShape.of_command({**fields, "out_h": 7, "out_w": 8}) == expected
    assert expected.region == (19, 35) and expected.pixels == 56 and expected.taps == 2


@pytest.mark.parametrize("size", [3, 5])
def test_window_parts_cover_every_position_once(size: int) -> None:
    parts = timing.window_part_positions(size)
    assert max(map(len, parts)) <= timing.WINDOW_MACS
    assert sorted(itertools.chain(*parts)) == list(itertools.product(range(size), repeat=2))
    for height, width in itertools.product(range(1, size + 1), repeat=2):
        # A kernel lies in the newest corner; parts without any of its positions are skipped.
        used = set(itertools.product(range(size - height, size), range(size - width, size)))
        needed = [p for p in parts if used & set(p)]
        kernel = dataclasses.replace(shape(), kernel=(height, width))
        assert len(needed) - 1 == kernel.further_parts


def test_window_set_up() -> None:
    fields = {"op": WindowOp.MAX, "y0": -5, "stride_y": 1, "dilation_y": 1, "kernel_h": 3}
    fields["stride_x"] = 1
    assert timing.window_set_up_bits(fields) == 3
    assert timing.window_set_up_bits({**fields, "y0": 0, "stride_x": 7}) == 3
    assert timing.window_set_up_bits({**fields, "y0": 0, "stride_x": 8}) == 2
    assert timing.window_set_up_bits({**fields, "op": WindowOp.IM2COL}) == 17


def test_post_rules() -> None:
    assert timing.post_keeps_operand(0, 0)
    assert not timing.post_keeps_operand(1, 0) and not timing.post_keeps_operand(0, 1)
    for source, op, lut in itertools.product(PostSource, PostOp, (0, 1)):
        expected = (source, op, lut) == (PostSource.ACCUMULATOR, PostOp.NONE, 0)
        assert timing.post_overlaps(source, op, lut) == expected
    assert timing.post_group_reads(9, op=PostOp.NONE, keeps_operand=False) == 9
    assert timing.post_group_reads(9, op=PostOp.ADD, keeps_operand=False) == 18
    assert timing.post_group_reads(9, op=PostOp.ADD, keeps_operand=True) == 10


@pytest.mark.parametrize("kind", ["plain", "fast"])
@pytest.mark.parametrize("rows, cols", [(4, 4), (16, 16), (24, 8), (64, 32)])
def test_hardware_has_these_latencies(rows: int, cols: int, kind: str) -> None:
    config = Config.sized(rows, cols, inner_product=kind)
    array = array_of(config)
    assert array.SWAP_LEAD == timing.SWAP_LEAD
    assert array.capture_lead == timing.capture_lead(config)
    assert [array.latency(c) for c in range(cols)] == [
        timing.array_latency(config, c) for c in range(cols)
    ]
    assert Requantise.LATENCY == timing.REQUANTISE_LATENCY
    assert PostCombine.LATENCY == timing.COMBINE_LATENCY
    assert PostTable.LATENCY == timing.TABLE_LATENCY
    assert PostTable(config).load_words == timing.table_reads(config)
    assert WindowReduce.LATENCY == timing.REDUCE_LATENCY


def test_results_under_way_find_room() -> None:
    """MUL and a table behind accumulators, and DEPTHWISE: the longest ways of POST and WINDOW."""
    assert timing.POST_DEPTH[PostOp.MUL] + timing.TABLE_LATENCY + 1 <= POST_IN_FLIGHT
    assert timing.WINDOW_DEPTH[WindowOp.DEPTHWISE] <= WINDOW_IN_FLIGHT


def test_limits_follow_from_the_command_set() -> None:
    assert (MAX_KERNEL, MAX_STRIDE, MAX_RUN) == (63, 255, 255)
    for opcode in (Opcode.CONV, Opcode.WINDOW):
        command = COMMANDS[opcode]
        for axis, of in ("wx", "hy"):
            assert command.high(f"kernel_{axis}") == MAX_KERNEL
            assert command.high(f"stride_{of}") == command.high(f"dilation_{of}") == MAX_STRIDE
    with pytest.raises(KeyError):
        COMMANDS[Opcode.CONV].high("no such field")


def test_write_masks() -> None:
    masks = {name: csr.mask for name, csr in CSRS.items() if csr.mask}
    aligned = {"DRAM_BASE_LO": 4096, "PROGRAM": 64, "TRACE_ADDR": 64}
    plain = ["DRAM_BASE_HI", "DRAM_LIMIT", "PROGRAM_WORDS", "WATCHDOG", "TRACE_EVENTS"]
    expected = {name: (1 << 32) - size for name, size in aligned.items()}
    assert masks == expected | dict.fromkeys(plain, (1 << 32) - 1)


def test_state_register() -> None:
    assert sum(f.bits for f in ENGINE_STATE) == 32
    value = EngineState.WAITING | 1 << Engine.STORE << 8 | 0xBEEF << 16
    assert unpack(ENGINE_STATE, value) == {
        "state": EngineState.WAITING,
        "reserved": 0,
        "missing": 1 << Engine.STORE,
        "head": 0xBEEF,
    }


def test_parameters_pack_and_unpack() -> None:
    assert PARAM_AT == {"bias": 0, "multiplier": 32, "shift": 56}
    for bias, multiplier, shift in ((-1, 1 << 23, 63), (5, 0, 0), (-(1 << 31), (1 << 24) - 1, 1)):
        number = pack_param(bias, multiplier, shift)
        assert math.ceil(number.bit_length() / 8) <= PARAM_BYTES
        assert unpack_param(number) == (bias, multiplier, shift)
