"""Damaged model files: a verdict or one sentence, never a traceback. Replay one with its seed:
``damaged(np.random.default_rng(SEED))`` is the content of the file."""

from __future__ import annotations

import numpy as np
import pytest

from systole.sw.compiler.partition import partition
from systole.sw.frontend.dataflow import run_reference
from systole.sw.frontend.inputs import random_inputs
from systole.sw.ir.graph import ModelError
from systole.sw.session.segments import follow
from tests.helpers.mutations import damaged

BLOCK = 30
SHORT, LONG = 300, 3000


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(i, marks=[pytest.mark.long] if i >= SHORT else [])
        for i in range(0, LONG, BLOCK)
    ],
)
def test_damaged_files(first, tmp_path):
    path, verdicts = tmp_path / "model.onnx", 0
    for seed in range(first, first + BLOCK):
        path.write_bytes(damaged(np.random.default_rng(seed)))
        try:
            plan = partition(path)
            arrays = random_inputs(plan.inputs, seed)
            values = follow(plan, arrays).values
            reference = run_reference(path, arrays)
            assert reference.keys() <= values.keys(), seed
            verdicts += 1
        except ModelError as e:
            assert len(str(e).splitlines()) == 1, (seed, str(e))
        except Exception as e:
            raise AssertionError(f"seed {seed}: {type(e).__name__}: {e}") from e
    assert verdicts, "every file was refused"
