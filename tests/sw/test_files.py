"""Files are written whole; links are followed, and devices and pipes written to, never replaced."""

from __future__ import annotations

import os
import stat
import threading

import numpy as np
import pytest

from systole.sw.files import OutputError, arrays_file, is_written_through, write_atomically


def test_new_and_old_files(tmp_path):
    path = tmp_path / "file"
    for content in (b"one", b"another"):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_links_are_followed(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_atomically(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"


def test_pipes_are_written_to(tmp_path):
    pipe, seen = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: seen.append(pipe.read_bytes()))
    reader.start()
    write_atomically(pipe, b"through")
    reader.join(10)
    assert seen == [b"through"] and stat.S_ISFIFO(pipe.stat().st_mode)


def test_what_a_process_has_open_is_not_replaced(tmp_path):
    """``--json /dev/stdout > FILE``: the shell's file, behind what was printed before."""
    path = tmp_path / "out"
    with open(path, "wb", buffering=0) as f:
        f.write(b"before\n")
        link = tmp_path / "link"
        link.symlink_to(f"/proc/self/fd/{f.fileno()}")
        assert is_written_through(link)
        write_atomically(link, b"after\n")
        f.seek(0, os.SEEK_END)
        f.write(b"end\n")
    assert path.read_bytes() == b"before\nafter\nend\n"
    assert not is_written_through(path) and not is_written_through(link)


def test_a_full_device_is_named():
    with pytest.raises(OutputError, match="output /dev/full: cannot be written: No space left"):
        write_atomically("/dev/full", b"anything")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_names_that_are_too_long(tmp_path):
    with pytest.raises(OutputError, match="cannot be written: File name too long"):
        write_atomically(tmp_path / ("a" * 300), b"")


def test_arrays_by_name(tmp_path):
    arrays = {"a/b": np.arange(6, dtype=np.int8).reshape(2, 3), "[y]": np.float32(0.5)}
    path = tmp_path / "arrays.npz"
    path.write_bytes(arrays_file(arrays))
    with np.load(path) as stored:
        assert {name: stored[name].tolist() for name in stored.files} == {
            "a/b": [[0, 1, 2], [3, 4, 5]],
            "[y]": 0.5,
        }
