"""Files that appear whole or not at all."""

from __future__ import annotations

import io
import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np


class OutputError(ValueError):
    """A file that cannot be written; one sentence."""


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write ``content`` to a temporary neighbour of ``path``, then rename it. Links are followed.
    What :func:`is_written_through` is written to, never replaced. Raises :class:`OutputError`."""
    try:
        if is_written_through(path):
            with open(path, "ab", buffering=0) as f:
                f.write(content)
        else:
            _replace(Path(path).resolve(), content)
    except OSError as e:
        raise OutputError(f"output {path}: cannot be written: {e.strerror}") from None


def is_written_through(path: str | Path) -> bool:
    """Whether there is something at ``path`` that no file can take the place of: a device, a pipe,
    or what this process has open, such as ``/dev/stdout``."""
    if not os.path.exists(path):
        return False
    return not os.path.isfile(path) or _is_open_file(Path(path))


def _is_open_file(path: Path) -> bool:
    """Whether links lead to a process's open file, which may be a file of some other name."""
    while path.is_symlink():
        if path.parent.name == "fd" and path.absolute().is_relative_to("/proc"):
            return True
        path = path.parent / os.readlink(path)
    return False


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


def arrays_file(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The content of an ``.npz`` with these arrays by name."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
    return out.getvalue()
