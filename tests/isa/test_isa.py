"""The contract's own tools: encoding, text form, generated documentation and C header."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from systole.isa import (
    COMMANDS,
    CSRS,
    TRACE_EVENT,
    Config,
    Decoder,
    Encoder,
    Engine,
    Opcode,
    broken_limit,
    command_at,
    encode,
)
from systole.isa.params import REQUANT_PARAMS
from systole.isa.streams import StreamCommand, encode_stream
from systole.isa.tools import assembler, document, header
from systole.isa.tools.assembler import AssemblyError, assemble, disassemble


@st.composite
def commands(draw):
    """A legal command: opcode, engine, fields."""
    command = COMMANDS[draw(st.sampled_from(Opcode))]
    engine = draw(st.sampled_from(command.engines)) if command.engines else None
    fields = {}
    for f in command.fields[1:]:
        if f.name in ("engine", "present"):
            continue
        legal = st.sampled_from(f.enum) if f.enum else st.integers(f.low, f.high)
        fields[f.name] = draw(st.one_of(st.just(0), legal))
    return command.opcode, engine, fields


@settings(max_examples=80)
@given(st.lists(commands(), max_size=4))
def test_encode_decode_text_round_trip(program):
    complete = [w for opcode, engine, fields in program for w in encode(opcode, engine, **fields)]
    encoder = Encoder()
    short = [
        w for opcode, engine, fields in program for w in encoder.encode(opcode, engine, **fields)
    ]
    for words in (complete, short):
        at, decoder = 0, Decoder()
        for opcode, engine, fields in program:
            values, at = decoder.decode(words, at)
            expected = {"opcode": opcode, "engine": engine or 0, **fields}
            assert values == expected | {"present": values["present"]}
        assert at == len(words)
        text = disassemble(words)
        assert len(text.splitlines()) == len(program)
        assert assemble(text) == words


@settings(max_examples=80)
@given(st.lists(commands().filter(lambda c: c[0] != Opcode.END), max_size=6))
def test_whole_streams_are_encoded_as_command_by_command(program):
    header = ("wait", "signal", "present")
    listed = [
        StreamCommand(
            opcode,
            COMMANDS[opcode].engines[0] if engine is None else engine,
            fields.get("wait", 0),
            fields.get("signal", 0),
            {name: value for name, value in fields.items() if name not in header},
        )
        for opcode, engine, fields in program
    ]
    encoder, expected, starts = Encoder(), [], []
    for c in listed:
        starts.append(len(expected))
        expected += encoder.encode(c.opcode, c.engine, wait=c.wait, signal=c.signal, **c.values)
    stream = encode_stream(listed)
    assert stream.words.tolist() == [*expected, *encode(Opcode.END)]
    assert stream.starts.tolist() == [*starts, len(expected)]


@pytest.mark.parametrize("values", [{"acc": -1}, {"nonsense": 1}, {"out_w": 1 << 16}])
def test_whole_streams_refuse_what_commands_refuse(values):
    with pytest.raises(ValueError) as one:
        encode(Opcode.POST, **values)
    with pytest.raises(ValueError, match=re.escape(str(one.value))):
        encode_stream(
            [StreamCommand(Opcode.POST, Engine.POST, 0, 0, v) for v in ({"acc": 1}, values)]
        )


def test_words_that_stay_are_left_out():
    encoder = Encoder()
    post = lambda engine=None, **fields: encoder.encode(Opcode.POST, engine, **fields)  # noqa: E731
    assert len(post(acc=1, table=2)) == COMMANDS[Opcode.POST].words
    assert len(encoder.encode(Opcode.CONV)) == COMMANDS[Opcode.CONV].words
    assert len(post(acc=2, table=2, wait=1)) == 1
    changed = post(acc=2, table=3)
    assert len(changed) == 2 and len(post(acc=2, table=3)) == 1
    assert len(post(table=3, present=0b111111)) == 7
    for engine in (Engine.LOAD, Engine.WLOAD):
        assert len(encoder.encode(Opcode.LOAD, engine, count0=5)) == 4
    assert len(encoder.encode(Opcode.LOAD, dram=9, count0=5)) == 1


def test_hot_fields_share_few_words():
    """What changes from one command to the next of an ordinary layer."""
    for opcode, fields, most in (
        (Opcode.LOAD, "dram target local count0", 2),
        (Opcode.CONV, "weights acc accumulate", 1),
        (Opcode.CONV, "weights acc accumulate src blocks", 2),
        (Opcode.POST, "acc out", 1),
        (Opcode.POST, "acc out params a b", 2),
        (Opcode.WINDOW, "out src weights params y0", 2),
    ):
        encoder = Encoder()
        encoder.encode(opcode)
        changed = dict.fromkeys(fields.split(), 1)
        assert len(encoder.encode(opcode, **changed)) == most


@pytest.mark.parametrize("opcode", Opcode)
def test_out_of_range_fields_are_refused_by_name(opcode):
    for f in COMMANDS[opcode].fields:
        if f.name in ("opcode", "engine"):
            continue
        for value in (f.low - 1, f.high + 1):
            with pytest.raises(ValueError, match=rf"{opcode.name}: {f.name} = "):
                encode(opcode, **{f.name: value})
    with pytest.raises(ValueError, match="no field 'nonsense'"):
        encode(opcode, nonsense=1)


def test_decode_refuses_what_is_no_command():
    with pytest.raises(ValueError, match="illegal opcode 0"):
        Decoder().decode([0])
    with pytest.raises(ValueError, match="CONV is truncated"):
        Decoder().decode(encode(Opcode.CONV)[:-1])
    with pytest.raises(ValueError, match="illegal engine"):
        Decoder().decode([encode(Opcode.STORE)[0] & ~0o70, 0, 0, 0])
    with pytest.raises(ValueError, match="word 0: CONV: the first of its engine, but not complete"):
        Decoder().decode(encode(Opcode.CONV, present=7))
    with pytest.raises(ValueError, match="LOAD: illegal present 0xf"):
        Decoder().decode([*encode(Opcode.LOAD, present=15), 0])


def test_every_value_of_an_enumeration_is_a_member():
    """Nothing else need be checked: neither by the shells nor by who decodes a legal command."""
    for command in COMMANDS.values():
        for f in command.own_fields:
            whole = f.enum is None or len(f.enum) == 1 << f.bits
            assert whole or any(limit.most is not None for limit in f.limits), f.name


POST = "source=1 groups=1 out_w=1 out_h=1 out_step=1"
WINDOW = (
    "out_w=1 out_h=1 kernel_w=1 kernel_h=1 stride_x=1 stride_y=1 dilation_x=1 dilation_y=1 blocks=1"
)


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("LOAD dram=48 dram1=16 dram2=32 count0=1 count1=1 count2=1", None),
        ("LOAD dram=40 count0=1 count1=1 count2=1", ("dram", "a multiple of 16 for SCRATCHPAD")),
        ("LOAD target=WEIGHTS dram=40 count0=1 count1=1 count2=1", None),
        ("LOAD count0=1 count1=1", ("count2", "at least 1")),
        (f"POST {POST} lane=1", None),
        (f"POST {POST} lane=2", ("lane", "at most 1")),
        (f"POST {POST} groups=9".replace(" groups=1", ""), None),
        ("POST groups=2 out_w=1 out_h=1 out_step=1", ("groups", "at most 1 for ACCUMULATOR")),
        (f"POST {POST} op=MUL", ("shift", "at least 1 for ADD or SUB or MUL")),
        (f"WINDOW {WINDOW} op=MAX".replace("ks=1", "ks=9"), None),
        (f"WINDOW {WINDOW} op=IM2COL", ("run", "at least 1 for IM2COL")),
        (
            f"WINDOW {WINDOW} op=IM2COL run=1".replace("ks=1", "ks=2"),
            ("blocks", "at most 1 for IM2COL"),
        ),
        (f"WINDOW {WINDOW}".replace("kernel_h=1", ""), ("kernel_h", "at least 1")),
        ("END", None),
    ],
)
def test_limits(text, broken):
    """Two groups to a scratchpad word, one to an accumulator word, vectors of 16 and 8 bytes."""
    found = broken_limit(command_at(assemble(text), 0), Config.sized(12, 6))
    assert (found is None) == (broken is None)
    if broken is not None:
        assert found[0] == broken[0] and found[1].endswith(f"; it must be {broken[1]}")


def test_limits_are_in_the_documentation():
    for text in (document.document(), header.header(Config())):
        assert "input channel blocks (>= 1)" in text
        assert "(ADD, SUB, MUL: >= 1)" in text and "(>= 1; ACCUMULATOR: <= groups)" in text
        assert "ILLEGAL_FIELD" in text


def test_text_form():
    text = """
    # two loads
    LOAD engine=WLOAD target=WEIGHTS wait=CONV,POST dram=0x1000 count0=2 # and a comment
    CONV x0=-3 wait=3
    CONV x0=-3 weights=5
    CONV x0=-3 weights=5 present=1
    END
    """
    expected = encode(
        Opcode.LOAD, Engine.WLOAD, wait=0b1100, target=1, dram=4096, count0=2
    ) + encode(Opcode.CONV, x0=-3, wait=3)
    again = encode(Opcode.CONV, x0=-3, weights=5, present=0)[:1]
    again += encode(Opcode.CONV, x0=-3, weights=5, present=1)[:2]
    words = assemble(text)
    assert words == expected + again + encode(Opcode.END)
    assert disassemble(words) == (
        "LOAD engine=WLOAD wait=CONV,POST dram=4096 target=WEIGHTS count0=2\n"
        "CONV wait=LOAD,WLOAD x0=-3\n"
        "CONV weights=5 x0=-3\n"
        "CONV weights=5 x0=-3 present=1\n"
        "END\n"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("JUMP", "line 2: 'JUMP' is no command"),
        ("CONV weights", "line 2: CONV: 'weights' is not field=value"),
        ("CONV colour=1", "line 2: CONV: no field 'colour'"),
        ("CONV src=1 src=2", "line 2: CONV: src given twice"),
        ("CONV src=x", "line 2: CONV: src: 'x' is not a number"),
        ("CONV src=1048576", "line 2: CONV: src = 1048576 outside 0..1048575"),
        ("CONV wait=LOAD,ALU", "line 2: CONV: wait: 'ALU' is no engine"),
        ("CONV engine=POST", "line 2: CONV: engine"),
        ("CONV engine=9", "line 2: CONV: engine"),
        ("POST op=DIV", "line 2: POST: op: 'DIV' is none of NONE, ADD, SUB, MUL"),
        ("POST op=4", "line 2: POST: op: 4 is not a valid PostOp"),
    ],
)
def test_assembler_errors_name_line_and_field(line, message):
    with pytest.raises(AssemblyError, match=r"^line 2: ") as e:
        assemble(f"END\n{line}\nEND")
    assert message in str(e.value)


def test_disassembler_refuses_bits_outside_the_fields():
    words = encode(Opcode.END)
    with pytest.raises(ValueError, match="word 1: END: bits set outside its fields"):
        disassemble([*words, words[0] | 1 << 40])


def test_assembler_command_line(tmp_path):
    source, runner = tmp_path / "program.s", CliRunner()
    source.write_text("STORE dram=64\nEND\n")
    assert runner.invoke(assembler.app, ["asm", str(source)]).exit_code == 0
    binary = tmp_path / "program.bin"
    assert list(struct.unpack("<5Q", binary.read_bytes())) == assemble(source.read_text())
    shown = runner.invoke(assembler.app, ["disasm", str(binary)])
    assert shown.exit_code == 0 and shown.output == source.read_text()
    binary.write_bytes(b"123")
    failed = runner.invoke(assembler.app, ["disasm", str(binary)])
    assert failed.exit_code == 2 and "whole 64-bit words" in failed.output


def test_documentation_is_up_to_date(monkeypatch, tmp_path):
    document.main(check=True)
    stale = tmp_path / "isa.md"
    stale.write_text(document.document() + "more\n")
    monkeypatch.setattr(document, "PATH", stale)
    with pytest.raises(document.typer.Exit):
        document.main(check=True)


def test_documentation_names_everything():
    text = document.document()
    for command in COMMANDS.values():
        assert all(f"`{f.name}`" in text for f in command.fields)
    assert all(f"| 0x{c.offset:03x} | `{c.name}` |" in text for c in CSRS.values())
    # Worked out by hand: CONV's header is 24 bits, then weights (20), then acc (16).
    assert "| 59:44 | `acc` | 16 |" in text


C_MAIN = """
#include <stdio.h>
#include "systole.h"
static void show(const uint64_t *words, int n)
{
    for (int i = 0; i < n; i++)
        printf("%%llu\\n", (unsigned long long)words[i]);
}
int main(void)
{
%s
    return 0;
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_c_header_encodes_as_python(tmp_path):
    """Every field of every command at a value of its own, put and read back in C."""
    body, expected = [], []
    for command in COMMANDS.values():
        fields = {}
        for i, f in enumerate(command.own_fields):
            fields[f.name] = f.enum(1) if f.enum else (f.low if f.signed else f.high - i % 2)
        engine = command.engines[-1] if command.engines else Engine(0)
        fields |= {"wait": 0x15, "signal": 0x2A, "present": command.complete}
        expected += encode(command.opcode, engine if command.engines else None, **fields)
        name = command.name
        body.append(f"{{ uint64_t w[SYSTOLE_{name}_WORDS] = {{0}};")
        for f in command.fields:
            value = {"opcode": command.opcode, "engine": engine, **fields}[f.name]
            body.append(f"SYSTOLE_PUT(w, {name}, {f.name.upper()}, {int(value)});")
        body.append(f"show(w, SYSTOLE_{name}_WORDS);")
        body.append(f"if (SYSTOLE_{name}_COMPLETE != {command.complete}u) return 8;")
        for f in command.fields:
            value = {"opcode": command.opcode, "engine": engine, **fields}[f.name]
            masked = int(value) & ((1 << f.bits) - 1)
            body.append(f"if (SYSTOLE_GET(w, {name}, {f.name.upper()}) != {masked}u) return 2;")
        body.append("}")
    for name, fields in (("REQUANT", REQUANT_PARAMS), ("TRACE", TRACE_EVENT)):
        lsb = sum(f.bits for f in fields[:-1])
        body.append(f"if (SYSTOLE_{name}_{fields[-1].name.upper()}_LSB != {lsb}) return 3;")
    config = Config.sized(12, 20)
    body.append(f"if (SYSTOLE_CONFIG_HASH != {config.hash}u) return 4;")
    body.append("if (SYSTOLE_CONFIG_LANES != 4 || SYSTOLE_CONFIG_VECTOR_BYTES != 16) return 5;")
    body.append(f"if (SYSTOLE_CSR_COMMANDS != {CSRS['COMMANDS'].offset}) return 6;")
    (tmp_path / "systole.h").write_text(header.header(config))
    (tmp_path / "main.c").write_text(C_MAIN % "\n".join(body))
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-Wno-type-limits"]
    subprocess.run(["gcc", *flags, "-o", "main", "main.c"], cwd=tmp_path, check=True)
    run = subprocess.run(["./main"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0
    assert [int(line) for line in run.stdout.split()] == expected


def test_header_command_line(tmp_path):
    toml, out = tmp_path / "c.toml", tmp_path / "c.h"
    toml.write_text("rows = 8\ncols = 8\n")
    header.main(config=toml, output=out)
    assert "#define SYSTOLE_CONFIG_ROWS 8\n" in out.read_text()
    toml.write_text("rows = 2\n")
    with pytest.raises(header.typer.Exit):
        header.main(config=toml, output=out)
