"""The command ``systole``: its commands, its version, its completion, and how they end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import systole
from systole.sw.cli.common import BAD_INPUT, one_line_errors
from systole.sw.cli.main import COMMANDS, app
from systole.sw.zoo import digits

ROOT = Path(__file__).resolve().parents[3]


def command(*arguments, **environment):
    """``python -m systole`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "systole", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name):
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert f"{name} [OPTIONS]" in result.output


def test_version():
    assert CliRunner().invoke(app, ["--version"]).output == f"systole {systole.__version__}\n"


def test_unknown_commands_are_refused():
    result = CliRunner().invoke(app, ["nonsense"])
    assert result.exit_code == 2 and "nonsense" in result.stderr


def test_bad_input_ends_in_one_line():
    done = command("check", "none.onnx")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_json_into_a_pipe():
    done = command("check", str(digits.MODEL), "--json", "/dev/stdout")
    assert (done.returncode, done.stderr) == (0, "")
    report, end = json.JSONDecoder().raw_decode(done.stdout)
    assert report["nodes"]
    assert "accelerator" in done.stdout[end:]


def test_json_onto_a_full_device():
    done = command("check", str(digits.MODEL), "--json", "/dev/full")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: output /dev/full: cannot be written: No space left on device\n"


@pytest.mark.parametrize("kind", BAD_INPUT)
def test_errors_are_printed_as_they_are(kind, capsys):
    """Whatever rich would take for markup, and however long."""
    message = f"tensor x[/b][0]: {'long ' * 50}end"
    with pytest.raises(typer.Exit) as end, one_line_errors():
        raise kind(message)
    assert end.value.exit_code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_shells_complete_the_names_of_commands():
    words = {"COMP_WORDS": "systole q", "COMP_CWORD": "1"}
    done = command(_SYSTOLE_COMPLETE="complete_bash", **words)
    assert done.stdout.split() == ["quantize"]
