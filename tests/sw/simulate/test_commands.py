"""The command-level simulator's commands against plain loops."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest

from systole.isa import Config, Engine, Opcode, WindowOp
from systole.isa.tools import assembler
from systole.sw.simulate.commands import run_program
from systole.sw.simulate.engines import Memories
from tests.helpers.command_reference import DATA, POINTWISE, Reference, image, tiny
from tests.helpers.random_commands import first_values, random_command, serialised, transfer_fields

SHAPES = [(4, 4), (4, 8), (12, 20), (8, 4)]


KINDS = ["conv", "post", *WindowOp.__members__, "transfer"]
CASES = [(shape, kind, False) for kind in KINDS for shape in SHAPES]
CASES += [(shape, kind, True) for kind in ("conv", "DEPTHWISE") for shape in SHAPES]


@pytest.mark.parametrize(("shape", "kind", "zero_points"), CASES)
def test_commands_equal_plain_loops(shape, kind, zero_points):
    seed = f"{shape} {kind}"
    rng = random.Random(seed)
    row_ops = kind in ("SOFTMAX", "NORMALISE")
    config = tiny(*shape, zero_points=zero_points, row_ops=row_ops)
    vector, weight_vector = config.vector_bytes, config.weight_vector_bytes
    setup, data = first_values(rng, config)
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
