"""The cache of generated RTL and built simulators."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sim import build


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("SYSTOLE_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "KEEP", 2)
    return tmp_path


def fill(directory):
    (directory / "simulator").write_text("x")


def age(entry, seconds):
    past = time.time() - seconds
    os.utime(entry, (past, past))


def entries(base):
    return sorted(p.name for p in base.glob("sim-*") if p.is_dir())


def test_an_entry_is_made_once(base):
    made = []
    for _ in range(2):
        entry = build._cached("sim-a", lambda d: (made.append(d), fill(d)))
    assert len(made) == 1
    assert (entry / "simulator").read_text() == "x"


def test_what_failed_leaves_no_entry(base):
    def fail(directory):
        fill(directory)
        raise build.BuildError("no")

    with pytest.raises(build.BuildError):
        build._cached("sim-a", fail)
    assert not (base / "sim-a").exists()
    assert not list(base.glob("new-*"))


def test_the_least_recently_used_go_but_none_of_the_last_hour(base):
    for name in "abcd":
        build._cached(f"sim-{name}", fill)
    assert entries(base) == ["sim-a", "sim-b", "sim-c", "sim-d"]
    for name, hours in ("a", 2), ("b", 4), ("c", 3):
        age(base / f"sim-{name}", 3600 * hours)
    build._cached("sim-b", fill)  # Used again.
    build._cached("sim-e", fill)
    assert entries(base) == ["sim-b", "sim-d", "sim-e"]


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

        build._cached(f"sim-{name}", make)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(1200)))
    assert len(entries(base)) <= 6
    assert not list(base.glob("old-*"))
