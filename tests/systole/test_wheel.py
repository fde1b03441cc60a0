"""What a wheel holds: the package with all that it needs at run time, and nothing else."""

import importlib.util
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
import setuptools

import systole

ROOT = Path(__file__).resolve().parents[2]
BDIST_WHEEL = (70, 1)
"""From this version on setuptools builds wheels by itself."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    version = tuple(int(part) for part in setuptools.__version__.split(".")[:2])
    if version < BDIST_WHEEL and importlib.util.find_spec("wheel") is None:
        pytest.skip(f"setuptools {setuptools.__version__} builds wheels only with package wheel")
    base = tmp_path_factory.mktemp("wheel")
    # A copy, as setuptools writes beside the sources.
    for name in ("pyproject.toml", "README.md", "systole", "isa", "hw", "sw", "sim", "tests"):
        (base / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(base / "out"), "."], cwd=base, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (path,) = (base / "out").iterdir()
    assert path.name == f"systole-{systole.__version__}-py3-none-any.whl"
    return zipfile.ZipFile(path)


def test_it_adds_one_name(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"systole", f"systole-{systole.__version__}.dist-info"}


def test_it_holds_all_sources(wheel):
    """Every file of the source folders that is under version control."""
    listed = subprocess.run(
        ["git", "ls-files", "isa", "hw", "sw", "sim"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("this is no git checkout")
    sources = {f"systole/{name}" for name in listed.stdout.splitlines()}
    kinds = {".py", ".sv", ".cpp", ".h", ".onnx", ".npz", ".toml", ".json"}
    assert {Path(name).suffix for name in sources} == kinds
    own = {f"systole/{name}" for name in ("__init__.py", "__main__.py", "api.py", "py.typed")}
    held = {name for name in wheel.namelist() if name.startswith("systole/")}
    assert held == sources | own


def test_it_has_the_command(wheel):
    entries = ConfigParser()
    (name,) = (n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    entries.read_string(wheel.read(name).decode())
    assert dict(entries["console_scripts"]) == {"systole": "systole.sw.cli.start:start_all"}
