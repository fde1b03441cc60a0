"""Programs the command-level simulator refuses: races, missing tokens, illegal fields and words."""

from __future__ import annotations

import numpy as np
import pytest

from systole.isa import Fault
from systole.isa.csr import TOKEN_BITS
from systole.isa.tools import assembler
from systole.sw.simulate.commands import HardwareFault, run_program
from systole.sw.simulate.engines import OutsideMemory, OwnResult, ProgramWrite
from systole.sw.simulate.races import (
    MissingToken,
    Race,
    TokenOverflow,
    UninitialisedRead,
    progressions,
)
from tests.helpers.command_reference import image, tiny


def run(text: str, **options) -> int:
    words = assembler.assemble(text)
    return run_program(tiny(4, 4), image(words), 0, len(words), **options)


LOADS = "LOAD signal=CONV,STORE dram=8192 count0=64 count1=1 count2=1\n"
WEIGHTS = "LOAD engine=WLOAD signal=CONV target=WEIGHTS dram=9000 count0=8 count1=1 count2=1\n"
ONE = (
    "kernel_w=1 kernel_h=1 stride_x=1 stride_y=1 dilation_x=1 dilation_y=1 blocks=1 in_h=1 out_h=1"
)
CONV = f"CONV {{}} in_w=8 out_w=8 {ONE} {{}}\n"
POST = "POST {} out_w=8 out_h=1 groups=1 out=100 out_step=1 params=40 {}\n"
MOVE = "{} count0={} count1=1 count2=1 {}\n"

RACES = {
    # name: program with {} where the ordering tokens go, those tokens, the pair and the field.
    "scratchpad read after write": (
        "LOAD {} dram=8192 count0=8 count1=1 count2=1\n"
        "STORE {} dram=16384 count0=1 count1=1 count2=1 local=7\nEND",
        ("signal=STORE", "wait=LOAD"),
        (0, 1, "local", "scratchpad word 7"),
    ),
    "scratchpad write after read": (
        "LOAD signal=STORE dram=8192 count0=8 count1=1 count2=1\n"
        "STORE {} wait=LOAD dram=16384 count0=8 count1=1 count2=1\n"
        "LOAD {} dram=8192 count0=1 count1=1 count2=1 local=3\nEND",
        ("signal=LOAD", "wait=STORE"),
        (1, 2, "local", "scratchpad word 3"),
    ),
    "scratchpad write after write": (
        "LOAD {} dram=8192 count0=8 count1=1 count2=1\n"
        "LOAD {} engine=WLOAD dram=8192 count0=8 count1=1 count2=1 local=5\nEND",
        ("signal=WLOAD", "wait=LOAD"),
        (0, 1, "local", "scratchpad word 5"),
    ),
    "scratchpad strided": (
        "LOAD {} dram=8192 count0=1 count1=4 count2=1 local=1 local1=3\n"
        "LOAD {} engine=WLOAD dram=8192 count0=1 count1=4 count2=1 local=0 local1=5\nEND",
        ("signal=WLOAD", "wait=LOAD"),
        (0, 1, "local", "scratchpad word 10"),
    ),
    "weights read after write": (
        LOADS + WEIGHTS.replace("signal=CONV", "{}") + CONV.format("wait=LOAD{}", "") + "END",
        ("signal=CONV", ",WLOAD"),
        (1, 2, "weights", "weight word 0"),
    ),
    "weights write after read": (
        LOADS
        + WEIGHTS
        + CONV.format("wait=LOAD,WLOAD {}", "weights=4")
        + "LOAD engine=WLOAD {} target=WEIGHTS dram=9000 count0=8 count1=1 count2=1\nEND",
        ("signal=WLOAD", "wait=CONV"),
        (2, 3, "local", "weight word 4"),
    ),
    "accumulator half": (
        LOADS.replace("CONV,STORE", "CONV,POST")
        + WEIGHTS
        + CONV.format("wait=LOAD,WLOAD {}", "acc=8")
        + POST.format("wait=LOAD{}", "acc=8")
        + "END",
        ("signal=POST", ",CONV"),
        (2, 3, "acc", "accumulator half 0"),
    ),
    "accumulator half, other words": (
        LOADS.replace("CONV,STORE", "CONV,POST")
        + WEIGHTS
        + CONV.format("wait=LOAD,WLOAD signal=POST", "acc=32")
        + POST.format("wait=LOAD,CONV {}", "acc=32")
        + CONV.format("{}", "acc=48")
        + "END",
        ("signal=CONV", "wait=POST"),
        (3, 4, "acc", "accumulator half 1"),
    ),
    "DRAM read after write": (
        "LOAD signal=STORE dram=8192 count0=8 count1=1 count2=1\n"
        "STORE {} wait=LOAD dram=16384 count0=8 count1=1 count2=1\n"
        "LOAD {} dram=16412 count0=8 count1=1 count2=1 local=64\nEND",
        ("signal=LOAD", "wait=STORE"),
        (1, 2, "dram", "4 bytes at 0x401c of the DRAM window"),
    ),
    "DRAM write after read": (
        "LOAD signal=STORE dram=8192 count0=8 count1=1 count2=1\n"
        "LOAD {} engine=WLOAD dram=16384 count0=8 count1=1 count2=1 local=64\n"
        "STORE wait=LOAD{} dram=16412 count0=8 count1=1 count2=1\nEND",
        ("signal=STORE", ",WLOAD"),
        (1, 2, "dram", "4 bytes at 0x401c of the DRAM window"),
    ),
    "transitive order": (
        "LOAD signal=STORE dram=8192 count0=8 count1=1 count2=1\n"
        "STORE {} wait=LOAD dram=16384 count0=1 count1=1 count2=1\n"
        "LOAD {} engine=WLOAD dram=8192 count0=1 count1=1 count2=1 local=6\nEND",
        ("signal=WLOAD", "wait=STORE"),
        (0, 2, "local", "scratchpad word 6"),
    ),
    "tokens pair in order": (
        # The first token STORE takes is the first LOAD's, whatever has ended by then.
        "LOAD signal=STORE dram=8192 count0=8 count1=1 count2=1\n"
        "LOAD {} dram=8192 count0=8 count1=1 count2=1 local=8\n"
        "STORE wait=LOAD dram=16384 count0=8 count1=1 count2=1\n"
        "STORE {} dram=16448 count0=8 count1=1 count2=1 local=8\nEND",
        ("signal=STORE", "wait=LOAD"),
        (1, 3, "local", "scratchpad word 8"),
    ),
}


@pytest.mark.parametrize("name", RACES)
def test_races_are_found_and_order_accepted(name):
    text, tokens, (other, index, field, word) = RACES[name]
    with pytest.raises(Race) as e:
        run(text.format("", ""))
    assert (e.value.other, e.value.index, e.value.field) == (other, index, field)
    lines = text.format("", "").splitlines()
    for i in (other, index):
        canonical = assembler.disassemble(assembler.assemble(lines[i])).strip()
        assert f"command {i} ({canonical})" in str(e.value)
    assert word in str(e.value)
    run(text.format("", ""), check_races=False)
    assert run(text.format(*tokens)) == len(lines) - 1


def test_a_token_pairs_with_its_signal_not_with_what_has_ended():
    text, _, _ = RACES["tokens pair in order"]
    swapped = text.format("signal=STORE", "wait=LOAD").replace("local=8\nEND", "local=0\nEND")
    early = swapped.replace("16384 count0=8", "16384 local=8 count0=8")
    with pytest.raises(Race, match="written by command 1"):
        run(early)


def test_other_accumulator_half_is_no_race():
    text = (
        LOADS.replace("CONV,STORE", "CONV,POST")
        + WEIGHTS
        + CONV.format("wait=LOAD,WLOAD signal=POST", "acc=8")
        + POST.format("wait=LOAD,CONV", "acc=8")
        + CONV.format("", "acc=32")
        + "END"
    )
    assert run(text) == 5


def test_progressions():
    assert progressions(np.array([3, 6, 9])) == [(3, 3, 3)]
    assert progressions(np.array([0, 1, 3, 4, 6])) == [(0, 2, 1), (3, 2, 1), (6, 1, 1)]
    assert progressions(np.array([], int)) == []


# Other refusals ----------------------------------------------------------------------------------

LOAD8 = "LOAD signal=STORE,CONV,POST,WINDOW dram=8192 count0=64 count1=1 count2=1\n"
WIN = "WINDOW wait=LOAD op={} in_w=4 src_pitch=4 out_w=4 out=80 params=32 out_block=4 " + ONE


@pytest.mark.parametrize(
    ("text", "error", "field", "message"),
    [
        (
            "STORE wait=LOAD count0=1",
            MissingToken,
            "wait",
            "STORE waits before command 0, missing token: LOAD",
        ),
        (
            LOAD8 + "STORE wait=LOAD count0=65 count1=1 count2=1 dram=16384",
            UninitialisedRead,
            "local",
            "scratchpad word 64, which was never written",
        ),
        (LOAD8 + CONV.format("wait=LOAD", ""), UninitialisedRead, "weights", "weight word 0"),
        (
            LOAD8 + WEIGHTS + CONV.format("wait=LOAD,WLOAD accumulate=1", ""),
            UninitialisedRead,
            "acc",
            "accumulator word 0",
        ),
        (LOAD8 + POST.format("wait=LOAD", ""), UninitialisedRead, "acc", "accumulator word 0"),
        (LOAD8 + POST.format("wait=LOAD", "source=1 a=60"), UninitialisedRead, "a", "word 64"),
        (
            "LOAD dram=8192 count0=2 count1=1 count2=1 local=1023",
            OutsideMemory,
            "local",
            "scratchpad word 1024; there are 1024",
        ),
        (
            "LOAD dram=8192 target=WEIGHTS count0=97 count1=1 count2=1",
            OutsideMemory,
            "local",
            "weight word 96; there are 96",
        ),
        (
            LOAD8 + CONV.format("wait=LOAD", "weights=96"),
            OutsideMemory,
            "weights",
            "weight word 99",
        ),
        (LOAD8 + CONV.format("wait=LOAD", "acc=57"), OutsideMemory, "acc", "accumulator word 64"),
        (
            LOAD8 + WEIGHTS + CONV.format("wait=LOAD,WLOAD", "src=1020"),
            OutsideMemory,
            "src",
            "scratchpad word 1027",
        ),
        (
            LOAD8 + POST.format("wait=LOAD", "source=1 lut=1 table=40"),
            UninitialisedRead,
            "table",
            "word 64",
        ),
        (
            LOAD8 + POST.format("wait=LOAD", "source=1 lut=1").replace("out=100", "out=31"),
            OwnResult,
            "table",
            "itself writes",
        ),
        (
            LOAD8 + POST.format("wait=LOAD", "source=1").replace("out=100", "out=1020"),
            OutsideMemory,
            "out",
            "scratchpad word 1027",
        ),
        (LOAD8 + WIN.format("SUM").replace("80", "36"), OwnResult, "params", "itself writes"),
        (LOAD8 + WIN.format("DEPTHWISE") + " weights=80", UninitialisedRead, "weights", "80"),
        (LOAD8 + WIN.format("MAX").replace("80", "1"), OwnResult, "src", "itself writes"),
        (LOAD8 + WIN.format("IM2COL").replace("80", "0") + " run=4", OwnResult, "src", "itself"),
        (
            LOAD8 + POST.format("wait=LOAD", "source=1").replace("100", "1"),
            OwnResult,
            "a",
            "itself writes",
        ),
        (
            LOAD8 + "STORE wait=LOAD dram=64 count0=1 count1=1 count2=1",
            ProgramWrite,
            "dram",
            "writes into the program",
        ),
    ],
)
def test_refusals_name_command_and_field(text, error, field, message):
    with pytest.raises(error) as e:
        run(text + "\nEND")
    assert e.value.field == field and message in str(e.value)
    assert str(e.value).startswith(f"command {e.value.index} ({e.value.command}): {field}: ")


@pytest.mark.parametrize(
    ("text", "field", "refusal"),
    [
        (LOAD8 + "STORE wait=LOAD\nSTORE wait=LOAD", "count0", "0; it must be at least 1"),
        ("LOAD dram=8194 count0=1 count1=1 count2=1", "dram", "8194; it must be a multiple of 4"),
        ("LOAD dram1=6 count0=1 count1=1 count2=1", "dram1", "6; it must be a multiple of 4"),
        (LOAD8 + POST.format("wait=LOAD", "source=1 lane=1"), "lane", "1; it must be at most 0"),
        (LOAD8 + "POST groups=2 out_w=1 out_h=1 out_step=1", "groups", "2; it must be at most 1"),
        (LOAD8 + POST.format("", "source=1 op=ADD"), "shift", "0; it must be at least 1 for ADD"),
        (
            LOAD8 + POST.format("", "source=1").replace("p=1", "p=0"),
            "out_step",
            "0; it must be at least 1",
        ),
        (
            LOAD8 + WIN.format("MAX").replace("stride_y=1", ""),
            "stride_y",
            "0; it must be at least 1",
        ),
        (LOAD8 + WIN.format("IM2COL"), "run", "0; it must be at least 1 for IM2COL"),
        (
            LOAD8 + WIN.format("IM2COL").replace("ks=1", "ks=2 run=1"),
            "blocks",
            "2; it must be at most 1",
        ),
    ],
)
def test_illegal_fields_name_command_and_field(text, field, refusal):
    with pytest.raises(HardwareFault) as e:
        run(text + "\nEND")
    assert e.value.code == Fault.ILLEGAL_FIELD
    assert f"{field} is {refusal}" in str(e.value)
    assert str(e.value).startswith(f"ILLEGAL_FIELD at command {e.value.index} (")


def test_in_place_is_allowed_where_reads_come_first():
    for text in (WIN.format("MAX").replace("80", "0"), POST.format("wait=LOAD", "source=1 a=100")):
        text = text.replace("out=100", "out=8").replace("a=100", "a=9")
        assert run(LOAD8 + text + "\nEND") == 2


def test_token_overflow():
    limit = (1 << TOKEN_BITS) - 1
    load = "LOAD signal=STORE dram=8192 count0=1 count1=1 count2=1\n"
    assert run(load * limit + "END") == limit
    with pytest.raises(TokenOverflow, match="token 256 of LOAD; its counter has 8 bits") as e:
        run(load * (limit + 1) + "END")
    assert e.value.index == limit
