"""The command-level simulator's commands against plain loops."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest

from systole.isa import Config, Encoder, Engine, Opcode, PostOp, PostSource, WindowOp
from systole.isa.tools import assembler
from systole.sw.simulate.commands import run_program
from systole.sw.simulate.engines import Memories
from tests.helpers.command_reference import DATA, POINTWISE, Reference, image, tiny

SHAPES = [(4, 4), (4, 8), (12, 20), (8, 4)]


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


def serialised(commands: list[tuple[Opcode, Engine, dict[str, int]]]) -> list[int]:
    """The program with every command waiting for the one before."""
    words, encoder = [], Encoder()
    for i, (opcode, engine, fields) in enumerate(commands):
        before = commands[i - 1][1] if i else engine
        after = commands[i + 1][1] if i + 1 < len(commands) else engine
        wait = 1 << before if before != engine else 0
        signal = 1 << after if after != engine else 0
        words += encoder.encode(opcode, engine, wait=wait, signal=signal, **fields)
    return words + encoder.encode(Opcode.END)


KINDS = ["conv", "post", *WindowOp.__members__, "transfer"]
CASES = [(shape, kind, False) for kind in KINDS for shape in SHAPES]
CASES += [(shape, kind, True) for kind in ("conv", "DEPTHWISE") for shape in SHAPES]


@pytest.mark.parametrize(("shape", "kind", "zero_points"), CASES)
def test_commands_equal_plain_loops(shape, kind, zero_points):
    seed = f"{shape} {kind}"
    rng = random.Random(seed)
    config = tiny(*shape, zero_points=zero_points)
    vector, weight_vector = config.vector_bytes, config.weight_vector_bytes
    # Everything has a value before the commands under test: all words loaded, accumulators set
    # by a convolution that covers them.
    scratchpad_data = bytearray(rng.randbytes(vector * 1024))
    packed = parameters(rng, 192 * config.rows // 8)
    for i in range(192):
        at = (320 + i) * vector
        word = packed[i * config.rows : (i + 1) * config.rows]
        scratchpad_data[at : at + len(word)] = word
    weights_at = DATA + len(scratchpad_data)
    data = bytes(scratchpad_data) + rng.randbytes(weight_vector * config.weight_words)
    one = {"count1": 1, "count2": 1}
    small = {"stride_x": 1, "stride_y": 1, "dilation_x": 1, "dilation_y": 1, "kernel_h": 1}
    setup = [
        (Opcode.LOAD, Engine.LOAD, {"dram": DATA, "count0": 1024, **one}),
        (
            Opcode.LOAD,
            Engine.WLOAD,
            {"target": 1, "dram": weights_at, "count0": config.weight_words, **one},
        ),
        (
            Opcode.CONV,
            Engine.CONV,
            {"blocks": 3, "src_block": 100, "in_w": 64, "in_h": 1, "out_w": 64, "out_h": 1}
            | {"kernel_w": 2, **small},
        ),
    ]
    tested = []
    for _ in range(12):
        if kind == "transfer":
            opcode, engine, v = rng.choice(
                [
                    (Opcode.LOAD, Engine.LOAD, vector),
                    (Opcode.LOAD, Engine.WLOAD, weight_vector),
                    (Opcode.STORE, Engine.STORE, vector),
                ]
            )
            fields = transfer_fields(rng, v)
            if v == weight_vector and engine == Engine.WLOAD:
                fields |= {"target": 1, "local": rng.randrange(4), "local1": 3, "local2": 7}
        else:
            opcode, fields = random_command(rng, config, kind)
            engine = Engine[opcode.name]
        tested.append((opcode, engine, fields))
    words = serialised(setup + tested)
    memory = image(words, data, 1 << 17)
    reference = Reference(config, memory.tobytes())
    memories = Memories(config)
    changed = 0

    def compare(index, fields, memories):
        nonlocal changed
        before = [list(w) for w in reference.scratchpad], [list(a) for a in reference.accumulators]
        before_dram = list(reference.dram)
        reference.execute(SimpleNamespace(**fields))
        text = f"command {index}: {assembler.format_command(fields)}"
        assert memories.scratchpad.tolist() == reference.scratchpad, text
        assert memories.weights.tolist() == reference.weights, text
        assert memories.accumulators.tolist() == reference.accumulators, text
        if index >= len(setup):
            after = reference.scratchpad, reference.accumulators
            changed += before != after or before_dram != reference.dram

    ended = run_program(config, memory, 0, len(words), memories=memories, on_command=compare)
    assert ended == len(setup) + len(tested)
    assert memory.tolist() == reference.dram
    assert changed > len(tested) / 2, "the commands hardly did anything"


def test_deep_convolution_is_exact_and_wraps():
    """More tiles and outputs than are multiplied at a time, extreme values, sums past 2^31."""
    config = Config.sized(16, 16, weight_bytes=16 * 16 * 300, accumulator_bytes=4 * 16 * 4096)
    blocks, outputs = 300, 2500
    window = f"blocks={blocks} src_block=1 in_w=2500 in_h=1 out_w={outputs} out_h=1 {POINTWISE}"
    text = f"""
    LOAD signal=CONV dram={DATA} count0=2800 count1=1 count2=1
    LOAD engine=WLOAD target=WEIGHTS signal=CONV dram={1 << 20} count0=4800 count1=1 count2=1
    CONV wait=LOAD,WLOAD {window}
    CONV accumulate=1 {window}
    END
    """
    words = assembler.assemble(text)
    rng = np.random.default_rng(1)
    x = rng.choice(np.array([-128, -128, -128, 127, 5], np.int8), (2800, 16))
    w = rng.choice(np.array([-128, -128, -128, 127, 3], np.int8), (4800, 16))
    x[:400], w[:, 0] = -128, -128
    memory = image(words, size=1 << 21)
    memory[DATA : DATA + x.size] = x.view(np.uint8).ravel()
    memory[1 << 20 : (1 << 20) + w.size] = w.view(np.uint8).ravel()
    gathered = np.stack([x[b : b + outputs] for b in range(blocks)], axis=1).reshape(outputs, -1)
    sums = gathered.astype(np.float64) @ w.astype(np.float64)
    assert sums.max() > 1 << 26
    start = (1 << 31) - (1 << 20)
    memories = Memories(config)

    def compare(index, fields, memories):
        expected = sums.astype(np.int64) + (start if index == 3 else 0)
        if index >= 2:
            wrapped = (expected + (1 << 31)) % (1 << 32) - (1 << 31)
            assert (memories.accumulators[:outputs] == wrapped).all()
            assert index == 2 or (wrapped != expected).any()
        memories.accumulators[:outputs] = start

    assert run_program(config, memory, 0, len(words), memories=memories, on_command=compare) == 4
