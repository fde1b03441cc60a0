"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import stat
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

MOST_LINKS = 40
"""Links in a row that are followed, as by Linux."""


class OutputError(ValueError):
    """A file that cannot be written; one sentence."""


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write ``content`` to a temporary neighbour of ``path``, then rename it. Links are followed;
    what is no ordinary file, such as a device or a pipe, is written through, never replaced, and
    so is what standard output or another open descriptor leads to. Raises :class:`OutputError`."""
    with _sentences(path, "cannot be written: "):
        number = own_descriptor(path)
        if number is not None:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            _write_all(number, content)
        elif _is_file(path):
            _replace(Path(os.path.realpath(path)), content)
        else:
            # By the name given: that of a pipe without a name cannot be resolved.
            through = os.open(path, os.O_WRONLY)
            try:
                _write_all(through, content)
            finally:
                os.close(through)


def check_writable(path: str | Path) -> None:
    """Raises :class:`OutputError` unless :func:`write_atomically` can write to ``path``, as far as
    that can be known before."""
    with _sentences(path):
        number = own_descriptor(path)
        if number is not None:
            if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                raise OutputError(f"output {path}: is open for reading only")
            return
        if not _is_file(path):
            if not os.access(path, os.W_OK):
                raise OutputError(f"output {path}: {os.strerror(errno.EACCES)}")
            return
        folder = Path(os.path.realpath(path)).parent
        if not folder.is_dir():
            raise OutputError(f"output {path}: its folder does not exist")
    with _sentences(path, "its folder cannot be written: "), tempfile.TemporaryFile(dir=folder):
        pass


def own_descriptor(path: str | Path) -> int | None:
    """The descriptor of this process that ``path`` is a name of, such as 1 of ``/dev/stdout``; None
    if it is none. What such a path leads to may have no name, so the last link is not followed."""
    descriptors = os.path.realpath("/dev/fd")
    path = os.path.abspath(path)
    for _ in range(MOST_LINKS):
        folder, name = os.path.realpath(os.path.dirname(path)), os.path.basename(path)
        if folder == descriptors:
            return int(name) if name.isdecimal() else None
        path = os.path.join(folder, name)
        if not os.path.islink(path):
            return None
        path = os.path.join(folder, os.readlink(path))
    return None


def check_several(path: str | Path, number: int) -> None:
    """Raises :class:`OutputError` if ``number`` files are to be written, under names made from
    ``path``, and ``path`` is no name of a file but a device or a pipe."""
    if number > 1 and (own_descriptor(path) is not None or not _is_file(path)):
        raise OutputError(f"output {path}: takes one file only, and there are {number}")


def name_elsewhere(path: str | Path) -> str:
    """A name by which another process, in another folder, opens what ``path`` is in this one."""
    number = own_descriptor(path)
    return os.path.abspath(path) if number is None else f"/proc/{os.getpid()}/fd/{number}"


def _is_file(path: str | Path) -> bool:
    """Whether ``path`` is a file, a link to one, or nothing yet; else it is a device or a pipe.
    Raises :class:`OutputError` for what cannot be written to at all."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return True
    if stat.S_ISDIR(mode):
        raise OutputError(f"output {path}: is a folder")
    if stat.S_ISSOCK(mode):
        raise OutputError(f"output {path}: is a socket, which has to be connected to")
    return stat.S_ISREG(mode)


def _write_all(descriptor: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _replace(path: Path, content: bytes) -> None:
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name[:50])
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextmanager
def _sentences(path: str | Path, what: str = "") -> Iterator[None]:
    """Turn what the system says about ``path`` into an :class:`OutputError`."""
    try:
        yield
    except OSError as e:
        raise OutputError(f"output {path}: {what}{e.strerror}") from None


def arrays_file(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The content of an ``.npz`` with these arrays by name."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
    return out.getvalue()
