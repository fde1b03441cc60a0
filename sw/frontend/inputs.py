"""Reading a model's inputs from files, or making them up from a seed."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from systole.sw.ir.graph import Graph, Port, Tensor


class InputError(ValueError):
    """An input file that does not fit the model; one sentence."""


def read_inputs(
    path: str | Path, graph: Graph, note: Callable[[str], None] = lambda _: None
) -> dict[str, np.ndarray]:
    """The model's inputs by name, in the model's own shapes and types.

    ``.npz``: arrays named like the inputs (or one array for a model of one input); ``.npy``: the
    one input; images: resized to the input's height and width, RGB or grey by its channels, as
    0..255 (uint8), -128..127 (int8) or 0..1 (float32); ``note`` is told of a picture that is
    changed so. Raises :class:`InputError`."""
    path = Path(path)
    suffix = path.suffix.lower()
    try:
        if suffix == ".npz":
            with zipfile.ZipFile(path), np.load(path) as data:
                arrays = {k: data[k] for k in data.files}
            if len(arrays) == 1 and len(graph.inputs) == 1:
                arrays = {graph.inputs[0].name: next(iter(arrays.values()))}
        elif suffix in (".npy", ".png", ".jpg", ".jpeg"):
            port = _only_input(path, graph)
            if suffix == ".npy":
                arrays = {port.name: _read_npy(path)}
            else:
                arrays = {port.name: _read_image(path, port, graph.tensors[port.tensor], note)}
        else:
            raise InputError(f"input {path}: must end in .npz, .npy, .png, .jpg or .jpeg")
    except OSError as e:
        raise InputError(f"input {path}: {e.strerror or 'cannot be read as an image'}") from None
    except InputError:
        raise
    except Exception:  # Damaged files make the parsers raise anything, SyntaxError included.
        raise InputError(f"input {path}: not a readable {suffix} file") from None
    return check_inputs(arrays, graph, path)


def check_inputs(
    arrays: Mapping[str, np.ndarray], graph: Graph, source: str | Path
) -> dict[str, np.ndarray]:
    """The model's inputs by name, in the model's own shapes and types, from arrays by name; a first
    axis of size 1 may be missing. ``source`` names the arrays in errors. Raises
    :class:`InputError`."""
    return {
        port.name: _check(source, port, graph.tensors[port.tensor], arrays) for port in graph.inputs
    }


def random_inputs(graph: Graph, seed: int) -> dict[str, np.ndarray]:
    """Seeded inputs that span each input's whole quantised range."""
    rng = np.random.default_rng(seed)
    out = {}
    for port in graph.inputs:
        tensor = graph.tensors[port.tensor]
        values = rng.integers(-128, 128, tensor.onnx_shape)
        if port.dtype == "float32":
            out[port.name] = ((values - tensor.zero) * tensor.scale).astype(np.float32)
        else:
            whole = (values + 128 * tensor.unsigned) % port.limit
            out[port.name] = (whole if tensor.unsigned else values).astype(port.dtype)
    return out


def _read_npy(path: Path) -> np.ndarray:
    """The array; ``np.load`` would take archives, too."""
    with open(path, "rb") as f:
        return np.lib.format.read_array(f, allow_pickle=False)


def _only_input(path: Path, graph: Graph) -> Port:
    if len(graph.inputs) != 1:
        names = ", ".join(p.name for p in graph.inputs)
        raise InputError(f"input {path}: the model has several inputs ({names}): use an .npz file")
    return graph.inputs[0]


def _check(
    path: str | Path, port: Port, tensor: Tensor, arrays: Mapping[str, np.ndarray]
) -> np.ndarray:
    if port.name not in arrays:
        have = ", ".join(arrays) or "none"
        raise InputError(f"input {path}: no array named {port.name} (it holds {have})")
    array = arrays[port.name]
    if array.shape != tensor.onnx_shape and array.shape == tensor.onnx_shape[1:]:
        array = array[None]
    if array.shape != tensor.onnx_shape:
        raise InputError(
            f"input {path}: {port.name} has shape {array.shape}, the model takes "
            f"{tensor.onnx_shape}"
        )
    if port.dtype == "float32" and array.dtype.kind == "f":
        array = array.astype(np.float32)
    if array.dtype != port.dtype:
        raise InputError(
            f"input {path}: {port.name} has type {array.dtype}, the model takes {port.dtype}"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(f"input {path}: {port.name} holds values that are not finite")
    return array


def _read_image(path: Path, port: Port, tensor: Tensor, note: Callable[[str], None]) -> np.ndarray:
    n, channels, h, w = tensor.shape
    if n != 1 or channels not in (1, 3) or len(tensor.onnx_shape) != 4:
        raise InputError(
            f"input {path}: {port.name} of shape {tensor.onnx_shape} is no single picture"
        )
    with Image.open(path) as image:
        if image.size != (w, h):
            note(f"input {path}: resized from {image.height}x{image.width} to {h}x{w}")
        if channels == 1 and image.mode not in ("1", "L", "I;16"):
            note(f"input {path}: colours turned into grey, the model has one channel")
        picture = image.convert("RGB" if channels == 3 else "L").resize((w, h))
    pixels = np.asarray(picture).reshape(1, h, w, channels).transpose(0, 3, 1, 2)
    # From (N, C, H, W) to the model's own order.
    array = pixels.reshape([tensor.onnx_shape[p] for p in tensor.perm])
    array = np.ascontiguousarray(array.transpose(np.argsort(tensor.perm)))
    if port.dtype == "uint8":
        return array
    if port.dtype == "int8":
        return (array.astype(np.int16) - 128).astype(np.int8)
    return array.astype(np.float32) / np.float32(255)
