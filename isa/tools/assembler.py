"""Text form of programs: one command per line, fields by name, zero fields left out.

    # comments run to the end of the line
    LOAD signal=CONV dram=4096 count0=64 count1=1 count2=1 local=128
    LOAD engine=WLOAD target=WEIGHTS dram=8192 count0=16 count1=1 count2=1
    CONV wait=LOAD,WLOAD signal=POST blocks=1 in_w=8 in_h=8 out_w=8 out_h=8 ...
    END

A line is the opcode and any number of ``field=value``. A value is a number (any Python base), the
name of an enumeration's member, or, for ``wait`` and ``signal``, engine names joined by commas.
``engine`` may be left out if it is the first that takes the command. Words that are as in the
engine's last command are left out of the program unless ``present`` says otherwise.

    # The binary form is little-endian 64-bit words.
    python -m systole.isa.tools.assembler asm program.s -o program.bin
    python -m systole.isa.tools.assembler disasm program.bin
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from systole.isa.commands import COMMANDS, Decoder, Encoder, Engine, Field, Opcode
from systole.isa.tools.interrupt import interruptible

MASKS = ("wait", "signal")
"""Header fields whose value is a set of engines."""


class AssemblyError(ValueError):
    """Text that is not a program; the message names the line and, if there is one, the field."""


def _parse_value(field: Field, text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        pass
    else:
        return value if field.enum is None or field.limits else field.enum(value)
    if field.name in MASKS:
        names = text.split(",")
        unknown = [n for n in names if n not in Engine.__members__]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no engine")
        return sum({1 << Engine[n] for n in names})
    if field.enum is not None:
        if text not in field.enum.__members__:
            raise ValueError(f"{text!r} is none of {', '.join(field.enum.__members__)}")
        return field.enum[text]
    raise ValueError(f"{text!r} is not a number")


def _assemble_line(text: str, encoder: Encoder) -> list[int]:
    name, *assignments = text.split()
    if name not in Opcode.__members__:
        raise ValueError(f"{name!r} is no command")
    command = COMMANDS[Opcode[name]]
    fields = {f.name: f for f in command.fields if f.name != "opcode"}
    values: dict[str, int] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ValueError(f"{name}: {assignment!r} is not field=value")
        if key not in fields:
            raise ValueError(f"{name}: no field {key!r}")
        if key in values:
            raise ValueError(f"{name}: {key} given twice")
        try:
            values[key] = _parse_value(fields[key], value)
        except ValueError as e:
            raise ValueError(f"{name}: {key}: {e}") from None
    engine = values.pop("engine", None)
    return encoder.encode(command.opcode, None if engine is None else Engine(engine), **values)


def assemble(text: str) -> list[int]:
    """The 64-bit words of the program ``text``. Raises :class:`AssemblyError`."""
    words: list[int] = []
    encoder = Encoder()
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if line:
            try:
                words += _assemble_line(line, encoder)
            except ValueError as e:
                raise AssemblyError(f"line {number}: {e}") from None
    return words


def format_command(values: Mapping[str, int]) -> str:
    """One decoded command (as :class:`isa.commands.Decoder` returns it) as a line of text, without
    ``present``."""
    command = COMMANDS[Opcode(values["opcode"])]
    out = [command.name]
    for f in command.fields[1:]:
        value = values[f.name]
        if f.name == "present":
            continue
        if f.name == "engine":
            default = command.engines[0] if command.engines else 0
            if value != default:
                out.append(f"engine={Engine(value).name}")
        elif value == 0:
            continue
        elif f.name in MASKS and value < 1 << len(Engine):
            out.append(f"{f.name}={','.join(e.name for e in Engine if value >> e & 1)}")
        elif f.enum is not None:
            names = {member.value: member.name for member in f.enum}
            out.append(f"{f.name}={names.get(value, value)}")
        else:
            out.append(f"{f.name}={value}")
    return " ".join(out)


def _lines(words: Sequence[int]) -> Iterator[str]:
    at, decoder, encoder = 0, Decoder(), Encoder()
    while at < len(words):
        values, end = decoder.decode(words, at)
        line = format_command(values)
        own = [int(w) for w in words[at:end]]
        if _assemble_line(line, encoder) != own:
            line += f" present={values['present']}"
            if _assemble_line(line, encoder) != own:
                name = Opcode(values["opcode"]).name
                raise ValueError(f"word {at}: {name}: bits set outside its fields")
        yield line
        at = end


def disassemble(words: Sequence[int]) -> str:
    """The text of a program, one line a command; ``assemble`` turns it into the same words.

    Raises ``ValueError`` naming the word that ``decode`` refuses or that text cannot express (bits
    set outside the fields).
    """
    return "".join(f"{line}\n" for line in _lines(words))


app = typer.Typer(no_args_is_help=True, add_completion=False, help="Assemble and disassemble.")


def _fail(file: Path, error: Exception) -> typer.Exit:
    typer.echo(f"error: {file}: {error}", err=True)
    return typer.Exit(2)


@app.command()
def asm(
    file: Path,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="default: FILE.bin")] = None,
) -> None:
    """Assemble FILE into little-endian 64-bit words."""
    try:
        words = assemble(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise _fail(file, e) from None
    (output or file.with_suffix(".bin")).write_bytes(struct.pack(f"<{len(words)}Q", *words))


@app.command()
def disasm(file: Path) -> None:
    """Print the text of the binary program FILE."""
    try:
        data = file.read_bytes()
        if len(data) % 8:
            raise ValueError(f"{len(data)} bytes are not whole 64-bit words")
        typer.echo(disassemble(struct.unpack(f"<{len(data) // 8}Q", data)), nl=False)
    except (OSError, ValueError) as e:
        raise _fail(file, e) from None


if __name__ == "__main__":
    with interruptible():
        app()
