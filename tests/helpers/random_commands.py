"""Random commands that do something, and programs of them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from systole.isa import Config, Encoder, Engine, Opcode, PostOp, PostSource, WindowOp
from systole.isa.commands import ROW_OPS
from systole.isa.params import NORMALISE_PARAMS, ROW_PARAM_BYTES, SOFTMAX_PARAMS, pack
from systole.sw.runtime.device import Device
from systole.sw.runtime.driver import Driver
from systole.sw.simulate.commands import CommandDevice
from tests.helpers.command_reference import DATA, image

POINTWISE_FIELDS = [
    f"{name}_{axis}"
    for name, axes in {"kernel": "wh", "stride": "xy", "dilation": "xy"}.items()
    for axis in axes
]

Commands = list[tuple[Opcode, Engine, dict[str, int]]]


def window_fields(rng: random.Random) -> dict[str, int]:
    """A window over words 0..255, with padding on every side, now and then none of it inside."""
    in_w, in_h = rng.randrange(8), rng.randrange(8)
    pitch = in_w + rng.randrange(3)
    return {
        "src": rng.randrange(20),
        "src_pitch": pitch,
        "src_block": in_h * pitch + rng.randrange(4),
        "in_w": in_w,
        "in_h": in_h,
        "x0": rng.randint(-4, 3),
        "y0": rng.randint(-4, 3),
        "out_w": rng.randint(1, 5),
        "out_h": rng.randint(1, 5),
        "kernel_w": rng.randint(1, 3),
        "kernel_h": rng.randint(1, 3),
        "stride_x": rng.randint(1, 3),
        "stride_y": rng.randint(1, 3),
        "dilation_x": rng.randint(1, 3),
        "dilation_y": rng.randint(1, 3),
        "pad": rng.randint(-128, 127),
    }


def output_fields(rng: random.Random, width: int, height: int) -> dict[str, int]:
    """Outputs at words 512.., blocks apart."""
    pitch = width + rng.randrange(3)
    return {
        "out": 512 + rng.randrange(9),
        "out_pitch": pitch,
        "out_block": pitch * height + rng.randrange(3),
    }


def clamp_fields(rng: random.Random) -> dict[str, int]:
    return {
        "zero": rng.randint(-128, 127),
        "low": rng.choice([-128, -20]),
        "high": rng.choice([127, 90]),
    }


def random_command(rng: random.Random, config: Config, kind: str) -> tuple[Opcode, dict[str, int]]:
    """Reads words under 512 (parameters and weights from 320), writes from 512."""
    fields = window_fields(rng)
    if kind == "conv":
        taps = fields["kernel_w"] * fields["kernel_h"]
        fields["blocks"] = rng.randint(1, min(3, 24 // taps))
        tiles = fields["blocks"] * taps
        fields["weights"] = rng.randint(0, (24 - tiles) * config.rows)
        fields["acc"] = rng.randrange(64 - 25)
        fields["accumulate"] = rng.randrange(2)
        if config.zero_points:
            for name in ("input_zero", "weight_zero"):
                fields[name] = rng.choice([-128, 0, 127, rng.randint(-128, 127)])
        return Opcode.CONV, fields
    if kind == "post":
        per_word = config.rows // config.lanes
        source, op = rng.choice(list(PostSource)), rng.choice(list(PostOp))
        groups = rng.randint(1, 5 if source == PostSource.SCRATCHPAD else config.groups)
        width, height = rng.randint(1, 5), rng.randint(1, 5)
        fields = {"source": source, "op": op, "groups": groups, "lane": rng.randrange(per_word)}
        fields |= {"out_w": width, "out_h": height, "acc": rng.randrange(64 - 25)}
        fields["out_step"] = step = rng.choice([1, 1, 2, 3])
        fields |= output_fields(rng, width * step, height) | clamp_fields(rng)
        for name in "ab":
            fields |= {name: rng.randrange(40), f"{name}_pitch": rng.randint(5, 8)}
            fields[f"{name}_block"] = rng.randrange(50)
        fields["b_step"] = rng.randrange(2)
        if fields["b_step"] == 0 and rng.randrange(2):
            fields["b_pitch"] = 0
        if rng.randrange(3) == 0:  # in place
            fields |= {"b": fields["out"], "b_pitch": fields["out_pitch"]}
            fields |= {"b_block": fields["out_block"], "b_step": 1, "out_step": 1}
        fields |= {"lut": rng.randrange(2), "table": rng.randrange(200)}
        fields |= {name: rng.randint(-128, 127) for name in ("za", "zb", "zo")}
        fields |= {"low2": rng.choice([-128, -9]), "high2": rng.choice([127, 99])}
        fields |= {"ma": rng.randrange(1 << 24), "mb": rng.randrange(1 << 24)}
        fields |= {"shift": rng.randint(18, 28), "params": 320 + rng.randrange(100)}
        return Opcode.POST, fields
    if WindowOp[kind] in ROW_OPS:
        return Opcode.WINDOW, row_fields(rng, config, WindowOp[kind])
    fields["op"] = WindowOp[kind]
    fields["blocks"] = 1 if kind == "IM2COL" else rng.randint(1, 3)
    fields["run"] = rng.randint(1, 9)
    if kind == "IM2COL":
        fields["in_w"] = rng.randrange(3 * config.rows)
        fields["src_pitch"] = rng.randint(3, 5)
    fields |= output_fields(rng, fields["out_w"], fields["out_h"]) | clamp_fields(rng)
    fields |= {"weights": 320 + rng.randrange(9), "params": 380 + rng.randrange(9)}
    if config.zero_points:
        fields["weight_zero"] = rng.choice([-128, 127, rng.randint(-128, 127)])
    return Opcode.WINDOW, fields


ROW_PARAMS = 190
"""The word where row operations' parameters are; they go on into whatever is there."""


def row_fields(rng: random.Random, config: Config, op: WindowOp) -> dict[str, int]:
    """A row operation, now and then in place."""
    positions, blocks = rng.randint(1, 9), rng.randint(1, 3)
    fields = {"op": op, "out_w": positions, "out_h": 1, "blocks": blocks, "params": ROW_PARAMS}
    fields |= dict.fromkeys(POINTWISE_FIELDS, 1)
    fields |= {"src": rng.randrange(40), "src_block": positions + rng.randrange(3)}
    fields |= output_fields(rng, positions, 1) | clamp_fields(rng)
    if rng.randrange(3) == 0:
        fields |= {"src": fields["out"], "src_block": fields["out_block"]}
    fields |= {"pad": rng.randint(-128, 127), "features": rng.randint(1, blocks * config.rows)}
    if op == WindowOp.SOFTMAX:
        fields |= {name: rng.randrange(2) for name in ("causal", "masked", "mask_step")}
        fields |= {"weights": rng.randrange(40), "mask_block": rng.randrange(40)}
    return fields


def row_parameters() -> bytes:
    """The own parameters of SOFTMAX, which are some of NORMALISE, too."""
    own = pack(SOFTMAX_PARAMS, numerator=0xC0FFEE, shift=16) | pack(
        NORMALISE_PARAMS, centred=1, epsilon=0
    )
    return own.to_bytes(ROW_PARAM_BYTES, "little")


def transfer_fields(rng: random.Random, vector: int) -> dict[str, int]:
    return {
        "dram": DATA + vector * rng.randrange(50),
        "dram1": vector * rng.randrange(12),
        "dram2": vector * rng.randrange(40),
        "count0": rng.randint(1, 4),
        "count1": rng.randint(1, 4),
        "count2": rng.randint(1, 4),
        "local": rng.randrange(200),
        "local1": rng.randrange(9),
        "local2": rng.randrange(30),
    }


def parameters(rng: random.Random, count: int) -> bytes:
    """Requantisation parameters whose results are neither all 0 nor all clamped."""
    out = b""
    for _ in range(count):
        bias = rng.choice([rng.randrange(-(1 << 31), 1 << 31), rng.randrange(-5000, 5000)])
        multiplier = rng.choice(
            [0, rng.randrange(1 << 23, 1 << 24), rng.randrange(1 << 23, 1 << 24)]
        )
        number = bias & 0xFFFF_FFFF | multiplier << 32 | rng.randint(26, 54) << 56
        out += number.to_bytes(8, "little")
    return out


def serialised(commands: Commands) -> list[int]:
    """The program with every command waiting for the one before."""
    words, encoder = [], Encoder()
    for i, (opcode, engine, fields) in enumerate(commands):
        before = commands[i - 1][1] if i else engine
        after = commands[i + 1][1] if i + 1 < len(commands) else engine
        wait = 1 << before if before != engine else 0
        signal = 1 << after if after != engine else 0
        words += encoder.encode(opcode, engine, wait=wait, signal=signal, **fields)
    return words + encoder.encode(Opcode.END)


def first_values(rng: random.Random, config: Config) -> tuple[Commands, bytes]:
    """Commands after which everything that random commands read has a value: all words are loaded,
    accumulators set by a convolution that covers them. And what is loaded, from DATA on."""
    vector, weight_words = config.vector_bytes, 24 * config.rows
    scratchpad = bytearray(rng.randbytes(vector * 1024))
    packed = parameters(rng, 192 * config.rows // 8)
    for i in range(192):
        at = (320 + i) * vector
        word = packed[i * config.rows : (i + 1) * config.rows]
        scratchpad[at : at + len(word)] = word
    own = row_parameters()
    for i in range(0, len(own), config.rows):
        at, part = (ROW_PARAMS + i // config.rows) * vector, own[i : i + config.rows]
        scratchpad[at : at + len(part)] = part
    weights_at = DATA + len(scratchpad)
    one = {"count1": 1, "count2": 1}
    small = {"stride_x": 1, "stride_y": 1, "dilation_x": 1, "dilation_y": 1, "kernel_h": 1}
    commands: Commands = [
        (Opcode.LOAD, Engine.LOAD, {"dram": DATA, "count0": 1024, **one}),
        (
            Opcode.LOAD,
            Engine.WLOAD,
            {"target": 1, "dram": weights_at, "count0": weight_words, **one},
        ),
        (
            Opcode.CONV,
            Engine.CONV,
            {"blocks": 3, "src_block": 100, "in_w": 64, "in_h": 1, "out_w": 64, "out_h": 1}
            | {"kernel_w": 2, **small},
        ),
    ]
    return commands, bytes(scratchpad) + rng.randbytes(config.weight_vector_bytes * weight_words)


STORED = 1 << 17
"""Byte address of what :func:`check_on_both` stores."""
MEMORY = 4 << 20


def check_on_both(rng: random.Random, device: Device, config: Config, kinds: Sequence[str]) -> None:
    """Random commands of these kinds leave the same first words of the scratchpad on ``device``,
    which has at least MEMORY bytes, and on the command-level simulator."""
    commands, data = first_values(rng, config)
    for kind in kinds:
        opcode, values = random_command(rng, config, kind)
        commands.append((opcode, Engine[opcode.name], values))
    stored = {"dram": STORED, "count0": 1024, "count1": 1, "count2": 1}
    commands.append((Opcode.STORE, Engine.STORE, stored))
    words = serialised(commands)
    results = []
    for each in (CommandDevice(config, MEMORY), device):
        driver = Driver(each)
        place = dict(command_offset=0, command_words=len(words), memory_bytes=2 * STORED)
        driver.load(image(words, data, STORED).tobytes(), **place)
        driver.run()
        results.append(driver.read_data(STORED, 1024 * config.vector_bytes))
    assert results[0] == results[1]
