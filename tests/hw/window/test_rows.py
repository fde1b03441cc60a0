"""WindowEngine's row operations against the plain reference; their rates."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from systole.isa import Config, Opcode, WindowOp
from systole.isa.params import CHANNEL_FLAGS, NORMALISE_PARAMS, REQUANT_PARAMS, SOFTMAX_PARAMS, pack
from systole.isa.rows import SoftmaxParameters
from systole.isa.timing import WINDOW_DEPTH, WINDOW_SET_UP, row_cycles, window_set_up_bits
from tests.helpers.command_reference import Reference
from tests.hw.window.test_engine import OUT, PARAMS, WEIGHTS, WORDS, fields, run

ROW_OPS = [WindowOp.SOFTMAX, WindowOp.NORMALISE]
Command = dict[str, int]

SMALL = ["4x4", "6x4/3", "8x8/2"]
"""Shapes: rows, columns, and lanes of the window engine if they are fewer."""
LARGE = pytest.param("16x16", marks=pytest.mark.long)


def machine(shape: str) -> Config:
    size, _, lanes = shape.partition("/")
    rows, cols = map(int, size.split("x"))
    return Config.sized(
        rows,
        cols,
        window_width=16,
        window_lanes=int(lanes or 0),
        scratchpad_bytes=WORDS * rows,
        row_ops=True,
    )


class Content:
    """The scratchpad's content, and the reference that executes a command on it."""

    def __init__(self, config: Config, rng: np.random.Generator):
        self.config, self.rng = config, rng
        self.words = rng.integers(-128, 128, (WORDS, config.rows)).astype(np.int8)

    def execute(self, c: Command) -> None:
        reference = Reference(self.config, b"")
        reference.scratchpad = self.words.tolist()
        reference.execute(SimpleNamespace(**c | {"opcode": Opcode.WINDOW}))
        self.words[:] = reference.scratchpad

    def place(self, word: int, content: bytes) -> None:
        """Write bytes from a word on."""
        self.words.reshape(-1)[word * self.config.rows :][: len(content)] = np.frombuffer(
            content, np.int8
        )

    def row(self, op: WindowOp, *, blocks: int, positions: int, **values: Any) -> Command:
        """A command whose parameters are in place. ``epsilon``, ``centred``, ``scale``: its own
        parameters, if not any."""
        rng, rows = self.rng, self.config.rows
        own = {k: values.pop(k) for k in ("epsilon", "centred", "scale") if k in values}
        low, high = sorted(int(n) for n in rng.integers(-128, 128, 2))
        block, out_block = positions + int(rng.integers(0, 3)), positions + int(rng.integers(0, 3))
        c = fields(
            op=op,
            blocks=blocks,
            out_w=positions,
            features=int(rng.integers(1, blocks * rows + 1)),
            src=int(rng.integers(0, 100)),
            src_block=block,
            pad=int(rng.integers(-128, 128)),
            out=OUT + int(rng.integers(100)),
            out_block=out_block,
            params=PARAMS,
            zero=int(rng.integers(-128, 128)),
            low=min(low, 0),
            high=max(high, 0),
        )
        c |= values
        if op == WindowOp.SOFTMAX:
            scale = own.get("scale", float(rng.choice([0.5, 0.05, 0.005])))
            p = SoftmaxParameters.of_scales(scale, 1 / float(rng.choice([1, 256, 200, 4096])))
            packed = pack(SOFTMAX_PARAMS, numerator=p.numerator, shift=p.shift)
            content = p.table.astype("<u4").tobytes()
        else:
            epsilon = own.get("epsilon", int(rng.integers(0, 1 << int(rng.integers(1, 40)))))
            centred = own.get("centred", int(rng.integers(2)))
            packed = pack(NORMALISE_PARAMS, epsilon=epsilon, centred=centred)
            content = self._channels(blocks * rows)
        self.place(c["params"], packed.to_bytes(16, "little"))
        self.place(c["params"] + self.config.row_param_words, content)
        return c

    def _channels(self, count: int) -> bytes:
        """Parameters of NORMALISE's channels."""
        rng, out = self.rng, b""
        for _ in range(count):
            coarse = bool(rng.integers(4) == 0)
            values = {
                "bias": int(rng.integers(-(1 << 30), 1 << 30)) >> int(rng.integers(0, 20)),
                "multiplier": int(rng.integers(1 << 23, 1 << 24)),
                "shift": int(rng.integers(24, 34) if coarse else rng.integers(36, 46)),
                "negate": int(rng.integers(2)),
                "coarse": coarse,
            }
            number = pack((*REQUANT_PARAMS, *CHANNEL_FLAGS), **values)
            out += number.to_bytes(8, "little")
        return out


def content_of(shape: str, seed: int) -> Content:
    return Content(machine(shape), np.random.default_rng(seed))


def random_row(content: Content, op: WindowOp) -> Command:
    rng = content.rng
    c = content.row(op, blocks=int(rng.integers(1, 6)), positions=int(rng.integers(1, 9)))
    if rng.random() < 0.3:
        c |= {"out": c["src"], "out_block": c["src_block"]}
    if op == WindowOp.SOFTMAX:
        c |= {"causal": int(rng.integers(2)), "masked": int(rng.integers(2))}
        c |= {"mask_step": int(rng.integers(2)), "mask_block": int(rng.integers(0, 12))}
        c["weights"] = WEIGHTS + int(rng.integers(1000))
        if rng.random() < 0.3:
            c["features"] = content.config.rows * c["blocks"]
    return c


@pytest.mark.parametrize("stall", [0.0, 0.3])
@pytest.mark.parametrize("op", ROW_OPS)
@pytest.mark.parametrize("shape", [*SMALL, LARGE])
def test_random(shape: str, op: WindowOp, stall: float) -> None:
    """Two commands, the second on the first one's results, in place or not."""
    for seed in range(2 if op == WindowOp.SOFTMAX else 3):
        content = content_of(shape, 100 * op + seed + round(10 * stall))
        command = random_row(content, op)
        run(
            content.config,
            [command, command | {"src": command["out"], "out": command["out"] + 300}],
            seed=seed,
            read_stall=stall,
            write_stall=stall,
            content=content,
        )


@pytest.mark.parametrize("shape", ["4x4/2", pytest.param("8x8/1", marks=pytest.mark.long)])
def test_other_operations_between(shape: str) -> None:
    """Row operations and others take turns; each reads what the one before wrote."""
    content = content_of(shape, 7)
    rows = [random_row(content, op) | {"params": PARAMS + 600 * op} for op in ROW_OPS]
    for c in rows:
        c |= content.row(c["op"], blocks=2, positions=6, params=c["params"], zero=-50)
        c |= {"low": -128, "high": 127}
    size = {"kernel_w": 3, "kernel_h": 1, "in_w": 6, "out_w": 6, "blocks": 2}
    size |= {"src_block": 6, "out_block": 6, "x0": -1}
    others = [fields(op=op, **size) for op in (WindowOp.DEPTHWISE, WindowOp.MAX, WindowOp.SUM)]
    chain = [rows[1], others[0], rows[1], rows[0], others[1], rows[0], others[2], rows[1], rows[1]]
    places = [OUT + 40 * i for i in range(len(chain) + 1)]
    blocks = {"src_block": 6, "out_block": 6}
    chain = [
        c | {"src": src, "out": out} | (blocks if c["op"] in ROW_OPS else {})
        for c, src, out in zip(chain, places, places[1:], strict=False)
    ]
    run(content.config, chain, read_stall=0.1, write_stall=0.2, content=content)


@pytest.mark.parametrize("op", ROW_OPS)
@pytest.mark.parametrize("shape", ["4x4", "6x4/3"])
def test_extreme_rows(shape: str, op: WindowOp) -> None:
    """Rows of the same number, of the least and the largest, and far from the zero point; rows of
    SOFTMAX in which nothing counts."""
    content = content_of(shape, op)
    rows, positions = content.config.rows, 8
    values = {"src_block": positions, "out_block": positions, "features": 3 * rows - 1}
    command = content.row(op, blocks=3, positions=positions, epsilon=0, scale=0.02, **values) | {
        "low": -128,
        "high": 127,
    }
    words = content.words[command["src"] :][: 3 * positions].reshape(3, positions, rows)
    for position, value in enumerate((-128, 127, 0, 5)):
        words[:, position] = value
    words[:, 4] = np.where(words[:, 4] < 0, -128, 127)
    words[:, 5] = -128
    words[1, 5, 2] = 127
    words[:, 6] = np.where(words[:, 6] < 0, 126, 127)
    commands = [command, command | {"pad": -128, "out": OUT + 200}]
    if op == WindowOp.SOFTMAX:
        content.words[WEIGHTS : WEIGHTS + 40] = -1
        content.words[WEIGHTS + 3] = 0
        masked = {"masked": 1, "mask_step": 1, "mask_block": positions, "weights": WEIGHTS}
        commands.append(command | masked | {"out": OUT + 300})
        commands.append(command | {"out": OUT + 400, "features": 1, "causal": 1})
    run(content.config, commands, content=content)


def test_longest() -> None:
    """All the positions that a command takes; then one."""
    content = content_of("4x4", 3)
    for op in ROW_OPS:
        command = content.row(op, blocks=2, positions=256, features=7)
        run(content.config, [command, command | {"out_w": 1, "out": OUT + 600}], content=content)


@pytest.mark.parametrize("op", ROW_OPS)
@pytest.mark.parametrize("shape", ["4x4", "6x4/3", LARGE])
def test_cycles(shape: str, op: WindowOp) -> None:
    """As the timing contract has them, for rows as they mostly are."""
    for blocks, positions in ((2, 12), (30, 4)):
        content = content_of(shape, blocks)
        config, masked = content.config, int(op == WindowOp.SOFTMAX and blocks == 2)
        features = blocks * config.rows
        command = content.row(op, blocks=blocks, positions=positions, features=features)
        command |= {"masked": masked, "mask_step": 1, "mask_block": positions}
        (cycles,) = run(config, [command], content=content)
        around = WINDOW_SET_UP + window_set_up_bits(command) + WINDOW_DEPTH[op]
        assert cycles == pytest.approx(row_cycles(command, config) + around, rel=0.02)
