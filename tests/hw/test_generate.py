"""The package that ``hw.generate`` writes, and its answers to bad options."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from systole.hw import generate as unit
from systole.hw import verilog
from systole.isa import VERSION, Config

SMALL = {
    "rows": 4,
    "cols": 4,
    "scratchpad_bytes": 4096,
    "weight_bytes": 1024,
    "accumulator_bytes": 2048,
    "window_width": 16,
}
ODD = SMALL | {
    "rows": 6,
    "scratchpad_bytes": 6144,
    "weight_bytes": 960,
    "axi_data_bits": 32,
    "axi_addr_bits": 32,
    "axi_burst_beats": 16,
    "window": False,
    "trace": False,
    "counters": False,
}


def run(*arguments: object):
    return CliRunner().invoke(unit.app, [str(a) for a in arguments])


def options(fields: dict[str, int | bool]) -> list[str]:
    out = []
    for name, value in fields.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            out.append(f"--{option}" if value else f"--no-{option}")
        else:
            out += [f"--{option}", str(value)]
    return out


def module_ports(source: str) -> dict[str, tuple[str, int]]:
    """Direction and width of the ports of module ``systole``."""
    body = re.search(r"^module systole \(.*?\);\n(.*?)^endmodule", source, re.M | re.S)
    assert body
    found = re.findall(r"^  (input|output) (?:\[(\d+):0\] )?(\w+);", body[1], re.M)
    return {name: (direction, int(high or 0) + 1) for direction, high, name in found}


@pytest.mark.parametrize("fields", [SMALL, ODD], ids=["small", "odd"])
def test_verilog_and_manifest(fields: dict[str, int | bool], tmp_path: Path) -> None:
    if fields is SMALL:
        file = tmp_path / "small.toml"
        file.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in fields.items()))
        result = run("--config", file, "-o", tmp_path / "out")
    else:
        result = run(*options(fields), "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    manifest = json.loads((out / "systole.json").read_text())
    written = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    assert written == sorted([*manifest["files"], "systole.json"])
    config = Config(**fields)
    assert Config.from_dict(manifest["config"]) == config
    assert int(manifest["config_hash"], 16) == config.hash
    assert (manifest["isa_version"], manifest["top"]) == (VERSION, "systole")

    sources = (out / "systole.f").read_text().split()
    assert sources == [name for name in manifest["files"] if name.startswith("rtl/")]
    source = (out / "rtl" / "systole.sv").read_text()
    assert "endfunction" not in source  # what cases would become: all branches in one argument
    assert "\\" not in source

    ports = {p["name"]: (p["direction"], p["width"]) for p in manifest["ports"]}
    assert ports == module_ports(source)
    assert ports["clk"] == ports["rst"] == ("input", 1)
    assert ports["irq"] == ("output", 1)
    assert ports["m_axi__araddr"] == ("output", config.axi_addr_bits)
    assert ports["m_axi__rdata"] == ("input", config.axi_data_bits)
    assert ports["s_axil__rvalid"] == ("output", 1)

    if shutil.which("iverilog"):
        binary = tmp_path / "systole.vvp"
        check = subprocess.run(
            ["iverilog", "-g2012", "-s", "systole_axi", "-o", binary, "-f", "systole.f"],
            cwd=out,
            capture_output=True,
            text=True,
        )
        assert check.returncode == 0, check.stderr
        assert "not found" not in check.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rows", 3], "rows x cols = 3 x 16"),
        (["--axi-data-bits", 48], "axi_data_bits = 48"),
        (["--scratchpad-bytes", 1000], "scratchpad_bytes = 1000"),
        (["--inner-product", "slow"], "inner_product = 'slow': must be plain or fast"),
        (["--rows", 17, "--inner-product", "fast"], "rows must be even, not 17"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
        (["--config", "nowhere.toml", "--no-trace"], "--trace"),
    ],
)
def test_bad_options(arguments: list[object], says: str, tmp_path: Path) -> None:
    """One sentence, exit status 2, nothing written."""
    result = run(*arguments, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and says in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_unknown_option_and_bad_value(tmp_path: Path) -> None:
    for arguments in (["--colour", 1], ["--rows", "many"]):
        assert run(*arguments, "-o", tmp_path / "out").exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_output_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here first")
    result = run(*options(SMALL), "-o", tmp_path / "file" / "out")
    assert result.exit_code == 2 and result.stderr.startswith("error: ")


def test_failure_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    (out / "rtl").mkdir(parents=True)
    (out / "rtl" / "systole.sv").write_text("old")
    monkeypatch.setattr(verilog, "YOSYS", "import sys; sys.exit('no such luck')")
    result = run(*options(SMALL), "-o", out)
    assert result.exit_code == 2 and "no such luck" in result.stderr
    assert (out / "rtl" / "systole.sv").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in out.iterdir()] == ["rtl"]


def test_files_that_are_no_longer_made_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the manifest alone, and never outside the folder."""
    contents = {"systole.json": "{}", "rtl/new.sv": "new"}
    monkeypatch.setattr(unit, "_package", lambda config, scratch: ({}, contents))
    out = tmp_path / "out"
    (out / "rtl").mkdir(parents=True)
    for name in ("rtl/old.sv", "rtl/mine.sv", "../elsewhere.sv"):
        (out / name).write_text("here first")
    listed = ["rtl/old.sv", "../elsewhere.sv", str(out / "rtl/mine.sv"), 7]
    (out / "systole.json").write_text(json.dumps({"files": listed}))
    unit.generate(Config(), out)
    assert sorted(p.name for p in (out / "rtl").iterdir()) == ["mine.sv", "new.sv"]
    assert (tmp_path / "elsewhere.sv").exists()
