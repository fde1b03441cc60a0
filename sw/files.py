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
    """Write ``content`` to a temporary neighbour of ``path``, then rename it. Links are followed;
    what is no ordinary file, such as a device or a pipe, is written to, never replaced. Raises
    :class:`OutputError`."""
    try:
        _write(Path(path).resolve(), content)
    except OSError as e:
        raise OutputError(f"output {path}: cannot be written: {e.strerror}") from None


def _write(path: Path, content: bytes) -> None:
    if path.exists() and not path.is_file():
        with open(path, "wb", buffering=0) as f:
            f.write(content)
        return
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
