"""Files are written whole; links are followed, and devices and pipes written to, never replaced."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading

import numpy as np
import pytest

from systole.sw.files import (
    OutputError,
    arrays_file,
    check_several,
    check_writable,
    name_elsewhere,
    own_descriptor,
    write_atomically,
)

WRITER = """
import sys
from systole.sw.files import check_writable, write_atomically
sys.stdout.write("before ")
check_writable(sys.argv[1])
write_atomically(sys.argv[1], b"content ")
sys.stdout.write("after")
"""


def write_elsewhere(path, **streams):
    """The program above, in a process of its own with these streams."""
    return subprocess.run([sys.executable, "-c", WRITER, str(path)], check=True, **streams)


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


def test_standard_output_that_is_a_pipe():
    for path in ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"):
        done = write_elsewhere(path, stdout=subprocess.PIPE)
        assert done.stdout == b"before content after", path


def test_standard_output_that_is_a_socket():
    here, there = socket.socketpair()
    with here:
        with there:
            write_elsewhere("/dev/stdout", stdout=there)
        seen = b"".join(iter(lambda: here.recv(100), b""))
    assert seen == b"before content after"


def test_standard_output_that_is_a_file(tmp_path):
    """The file stays the one that is open: what comes before and after is there, too."""
    path, link = tmp_path / "out", tmp_path / "link"
    link.symlink_to("/dev/stdout")
    for name in ("/dev/stdout", link):
        with open(path, "wb") as out:
            write_elsewhere(name, stdout=out)
        assert path.read_bytes() == b"before content after"
    assert link.is_symlink()


def test_a_file_without_a_name_is_written_through(tmp_path):
    with open(tmp_path / "file", "w+b") as f:
        os.unlink(tmp_path / "file")
        check_writable(f"/dev/fd/{f.fileno()}")
        write_atomically(f"/dev/fd/{f.fileno()}", b"through")
        f.seek(0)
        assert f.read() == b"through"
    assert not list(tmp_path.iterdir())


def test_whole_content_goes_through_a_pipe(tmp_path):
    """More than a pipe takes at a time."""
    content = bytes(range(256)) * 4096
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            WRITER.replace('b"content "', "bytes(range(256)) * 4096"),
            "/dev/fd/2",
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    assert done.stderr == content


def test_descriptors_of_this_process(tmp_path):
    with open(tmp_path / "file", "wb") as f:
        path = f"/dev/fd/{f.fileno()}"
        assert own_descriptor(path) == f.fileno()
        assert own_descriptor(tmp_path / "file") is None
        assert name_elsewhere(path) == f"/proc/{os.getpid()}/fd/{f.fileno()}"
        assert os.path.samefile(name_elsewhere(path), tmp_path / "file")
    with pytest.raises(OutputError, match=f"output {path}: Bad file descriptor"):
        check_writable(path)


def test_refused_before_anything_is_done(tmp_path):
    """What cannot be written to is known before the work begins."""
    folder, loop, name = tmp_path / "folder", tmp_path / "loop", tmp_path / "socket"
    folder.mkdir()
    loop.symlink_to(loop)
    with socket.socket(socket.AF_UNIX) as listening, open(tmp_path / "read", "w+b") as f:
        listening.bind(str(name))
        reading = os.open(f.name, os.O_RDONLY)
        for path, reason in {
            folder: "is a folder",
            loop: "Too many levels of symbolic links",
            name: "is a socket, which has to be connected to",
            folder / "none" / "file": "its folder does not exist",
            tmp_path / "read" / "file": "its folder does not exist",
            f"/dev/fd/{reading}": "is open for reading only",
            "/proc/file": "its folder cannot be written: No such file or directory",
        }.items():
            with pytest.raises(OutputError, match=f"^output {path}: {reason}$"):
                check_writable(path)
        os.close(reading)
    assert loop.is_symlink() and stat.S_ISSOCK(name.stat().st_mode)


def test_a_pipe_takes_one_file():
    check_several("/dev/null", 1)
    check_several("file", 2)
    for path in ("/dev/null", "/dev/stdout"):
        with pytest.raises(
            OutputError, match=f"output {path}: takes one file only, and there are 2"
        ):
            check_several(path, 2)


def test_a_full_device_is_named():
    with pytest.raises(OutputError, match="output /dev/full: cannot be written: No space left"):
        write_atomically("/dev/full", b"anything")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_names_that_are_too_long(tmp_path):
    with pytest.raises(OutputError, match="cannot be written: File name too long"):
        write_atomically(tmp_path / ("a" * 300), b"")


def test_an_interrupt_leaves_the_old_file(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_arrays_by_name(tmp_path):
    arrays = {"a/b": np.arange(6, dtype=np.int8).reshape(2, 3), "[y]": np.float32(0.5)}
    path = tmp_path / "arrays.npz"
    path.write_bytes(arrays_file(arrays))
    with np.load(path) as stored:
        assert {name: stored[name].tolist() for name in stored.files} == {
            "a/b": [[0, 1, 2], [3, 4, 5]],
            "[y]": 0.5,
        }
