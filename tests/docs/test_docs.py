"""The documentation: its links are whole, it shows what commands print, and leaves nothing out."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from systole.isa import Config
from systole.isa.tools import configuration

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def script(path: Path) -> ModuleType:
    """A module of the documentation's own, which belongs to no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dataclasses look their own module up.
    spec.loader.exec_module(module)
    return module


PAGES = script(DOCS / "pages.py")
DRAW = script(DOCS / "pictures" / "draw.py")


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-f", config, "--site-dir", site],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )


def test_site_builds_and_needs_no_network(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material is not installed: the extra docs")
    result = build(ROOT / "mkdocs.yml", tmp_path / "site")
    assert result.returncode == 0, result.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|link)[^>]*(?:src|href)=\"?(https?:[^\" >]*)", page.read_text()
        )
        assert not loaded, page


def test_broken_links_are_refused(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material is not installed: the extra docs")
    settings = (ROOT / "mkdocs.yml").read_text().split("nav:")[0]
    (tmp_path / "docs").mkdir()
    (tmp_path / "mkdocs.yml").write_text(settings.replace("extra_css: [style.css]\n", ""))
    for link, whole in (("index.md#start", True), ("none.md", False), ("index.md#none", False)):
        (tmp_path / "docs" / "index.md").write_text(f"# Start\n\n[here]({link})\n")
        result = build(tmp_path / "mkdocs.yml", tmp_path / "site")
        assert (result.returncode == 0) == whole, (link, result.stderr)


@pytest.mark.xdist_group("16x16")
@pytest.mark.parametrize("path", PAGES.PAGES, ids=lambda path: path.stem)
def test_commands_print_what_the_page_shows(path, tmp_path):
    page = path.read_text(encoding="utf-8")
    now = PAGES.executed(page, tmp_path)
    assert PAGES.comparable(now) == PAGES.comparable(page)


def test_a_page_is_executed(tmp_path):
    page = (
        '```python title="made.py"\nprint(6 * 7)\n```\n\n'
        "```sh\npython made.py\n```\n\n```text\nsomething else\n```\n\n"
        "```text\nnot printed by a command\n```\n"
    )
    now = PAGES.executed(page, tmp_path)
    assert now == page.replace("something else", "42")
    assert PAGES.comparable("compile 0.11 s, 1,234 cycles") == PAGES.comparable(
        "compile 2.5 s,  1,234 cycles"
    )
    assert PAGES.comparable("1,234 cycles") != PAGES.comparable("1,235 cycles")
    with pytest.raises(subprocess.CalledProcessError):
        PAGES.executed("```sh\nfalse | true\n```\n", tmp_path)


def test_pictures_are_up_to_date(tmp_path, monkeypatch):
    assert DRAW.main(check=True) == 0
    monkeypatch.setattr(DRAW, "FOLDER", tmp_path)
    assert DRAW.main(check=True) == 1
    assert DRAW.main(check=False) == 0 and DRAW.main(check=True) == 0


@pytest.mark.parametrize("path", sorted(DRAW.pictures()), ids=lambda path: path.stem)
def test_pictures_are_shown(path):
    """And no box runs out of its picture."""
    assert any(f"pictures/{path.name}" in page.read_text() for page in DOCS.glob("*.md"))
    for x, y, width, height in re.findall(
        r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', path.read_text()
    ):
        svg = re.search(r'viewBox="0 0 (\d+) (\d+)"', path.read_text())
        assert svg
        assert float(x) + float(width) <= int(svg[1]) and float(y) + float(height) <= int(svg[2])


def test_architecture_names_every_hardware_file():
    page = (DOCS / "architecture.md").read_text()
    files = {p.relative_to(ROOT).as_posix() for p in (ROOT / "hw").rglob("*.py")}
    files = {f for f in files if not f.endswith("__init__.py")}
    named = set(re.findall(r"`(hw/[\w/]+\.py)`", page))
    assert len(files) >= 22
    assert named == files, f"missing: {files - named}; no longer there: {named - files}"


def test_files_that_pages_name_exist():
    pages = [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    pattern = r"`((?:isa|hw|sw|sim|tests|docs)/[\w/.-]+?)(?:`|::)"
    missing = {
        (page.name, name)
        for page in pages
        for name in re.findall(pattern, page.read_text())
        if not (ROOT / name).exists()
    }
    assert not missing


def test_make_targets_that_pages_name_exist():
    pages = [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        t for page in pages for t in re.findall(r"(?:`|^ +)make ([a-z-]+)", page.read_text(), re.M)
    }
    assert named and named <= targets


def test_results_on_the_start_page_are_the_measured_ones():
    measured = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (DOCS / "performance.md").read_text().partition("## Where")[0].splitlines()
        if line.startswith("|")
    ]
    head = measured[0]
    rows = {row[0]: dict(zip(head, row, strict=True)) for row in measured[2:]}
    shown = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (DOCS / "index.md").read_text().splitlines()
        if line.startswith("|")
    ]
    assert len(shown) > 5
    for row in shown[2:]:
        for column, value in zip(shown[0], row, strict=True):
            assert rows[row[0]][column] == value, (row[0], column)


def test_example_configuration():
    config = Config.from_toml(DOCS / "example.toml")
    assert config != Config.sized(config.rows, config.cols)


def test_configuration_page(monkeypatch, tmp_path):
    configuration.main(check=True)
    text = configuration.document()
    for field in Config().to_dict():
        assert f"| `{field}` |" in text
    assert "| `rows` | 16 | must be 4..64 |" in text
    stale = tmp_path / "configuration.md"
    monkeypatch.setattr(configuration, "PATH", stale)
    with pytest.raises(configuration.typer.Exit):
        configuration.main(check=True)
    configuration.main(check=False)
    assert stale.read_text() == text
