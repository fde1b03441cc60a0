"""The cache of generated RTL and built simulators."""

import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from systole.isa import Config
from systole.sim import build

FILE = "simulator"


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("SYSTOLE_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "KEEP", 2)
    return tmp_path


def fill(directory):
    (directory / FILE).write_text("x")


def age(entry, seconds):
    past = time.time() - seconds
    os.utime(entry, (past, past))


def entries(base):
    return sorted(p.name for p in base.glob("sim-*") if p.is_dir())


def test_an_entry_is_made_once(base):
    made = []
    for _ in range(2):
        entry = build._cached("sim-a", lambda d: (made.append(d), fill(d)), FILE)
    assert len(made) == 1
    assert (entry / FILE).read_text() == "x"


@pytest.mark.parametrize("damage", ["file", "empty", "folder"])
def test_a_damaged_entry_is_made_again(base, damage):
    entry = build._cached("sim-a", fill, FILE)
    if damage == "folder":
        shutil.rmtree(entry)
        entry.write_text("")
    else:
        (entry / FILE).unlink()
        if damage == "empty":
            (entry / FILE).touch()
    assert (build._cached("sim-a", fill, FILE) / FILE).read_text() == "x"
    assert not list(base.glob("old-*"))


def test_what_failed_leaves_no_entry(base):
    def fail(directory):
        fill(directory)
        raise build.BuildError("no")

    with pytest.raises(build.BuildError):
        build._cached("sim-a", fail, FILE)
    assert not (base / "sim-a").exists()
    assert not list(base.glob("new-*"))


def test_the_least_recently_used_go_but_none_of_the_last_hour(base):
    for name in "abcd":
        build._cached(f"sim-{name}", fill, FILE)
    assert entries(base) == ["sim-a", "sim-b", "sim-c", "sim-d"]
    for name, hours in ("a", 2), ("b", 4), ("c", 3):
        age(base / f"sim-{name}", 3600 * hours)
    build._cached("sim-b", fill, FILE)  # Used again.
    build._cached("sim-e", fill, FILE)
    assert entries(base) == ["sim-b", "sim-d", "sim-e"]


def test_what_killed_processes_left_is_removed_in_time(base):
    for name, hours in ("new-a", 25), ("old-b", 25), ("new-c", 2):
        (base / name / "entry").mkdir(parents=True)
        age(base / name, 3600 * hours)
    build._cached("sim-a", fill, FILE)
    assert sorted(p.name for p in base.glob("*-?")) == ["new-c", "sim-a"]


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    """Named by the user: a sentence. The usual one: another takes its place."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SYSTOLE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(build.BuildError, match=r"file/cache.*: .*SYSTOLE_CACHE names another"):
        build._cached("sim-a", fill, FILE)
    monkeypatch.delenv("SYSTOLE_CACHE")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for usual in ("file/cache", "~/.cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / usual))
        if usual.startswith("~"):
            monkeypatch.setattr(build.platformdirs, "user_cache_dir", lambda name: f"~/{name}")
        entry = build._cached("sim-a", fill, FILE)
        assert entry.parent == tmp_path / f"systole-cache-{os.getuid()}"
        assert entry.parent.stat().st_mode & 0o777 == 0o700


def test_a_relative_cache_is_found_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SYSTOLE_CACHE", "cache")
    assert build._cached("sim-a", fill, FILE) == tmp_path / "cache" / "sim-a"


def test_many_at_once_while_entries_are_removed(base, monkeypatch):
    monkeypatch.setattr(build, "RECENT", 0)
    building = dict.fromkeys(map(str, range(6)), 0)
    lock = threading.Lock()

    def use(number):
        name = str(number * 7 % 6)

        def make(directory):
            with lock:
                building[name] += 1
                assert building[name] == 1
            fill(directory)
            with lock:
                building[name] -= 1

        build._cached(f"sim-{name}", make, FILE)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(1200)))
    assert len(entries(base)) <= 6
    assert not list(base.glob("old-*"))


GUARDED = """
module guarded (input clk, input valid, input [31:0] x, output reg [31:0] p, output reg [31:0] q);
  reg enable;
  reg [31:0] a, b;
  wire [31:0] product = enable ? a * b : 32'd0;
  always_ff @(posedge clk) begin
    enable <= valid;
    a <= x;
    b <= x ^ a;
    if (enable) p <= product ^ (product << 7);
    if (enable) q <= ~product + (product >> 3);
  end
endmodule
"""


def test_what_an_enable_guards_is_not_computed(tmp_path):
    """Verilator is told to keep branches; it does not tell whether it knows the names."""
    source = tmp_path / "guarded.sv"
    source.write_text(GUARDED)
    with build._verilated(["--cc", *build.OPTIMISED], [source], tmp_path / "log") as work:
        code = "".join(p.read_text() for p in work.glob("*.cpp"))
    assert " * " in code and "enable) {" in code
    assert "(- (IData)(" not in code


def test_the_array_alone_runs():
    command = build.build_array(Config.sized(4, 4))
    run = subprocess.run([*command, "+cycles=1000"], capture_output=True, text=True, check=True)
    assert re.search(r"^(?!0+$)[0-9a-f]{8}$", run.stdout, re.MULTILINE)  # sums have come out
