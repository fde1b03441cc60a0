"""Samples to calibrate and measure with: arrays, or a folder of pictures.

A sample is the model's inputs by name, each in the input's own shape. Raised is
:class:`sw.frontend.inputs.InputError`, one sentence.
"""

from __future__ import annotations

import zipfile
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from PIL import Image

from systole.sw.frontend.inputs import InputError

Feeds = Mapping[str, np.ndarray]
"""The model's inputs by name, for one run."""
Ranges = dict[str, tuple[float, float]]
"""The least and the largest value of tensors, by name."""
Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of the model's inputs, by name."""
Types = Mapping[str, np.dtype]
"""Element types of the model's inputs, by name; float32 where one is not named."""

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp")
LAYOUTS = ("nchw", "nhwc")
CHANNELS = ("rgb", "bgr", "gray")
LABELS = "y"
"""Name of the labels in an ``.npz``."""


@dataclass(frozen=True)
class Preprocessing:
    """What becomes of a stored value: ``(value * scale - mean) / std``, per channel.

    ``scale`` None: 1/255 for pictures, 1 for arrays. ``layout``, ``size`` and ``channels`` None: as
    the model's input has them."""

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float | None = None
    layout: str | None = None
    size: tuple[int, int] | None = None
    channels: str | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("layout", self.layout, LAYOUTS),
            ("channels", self.channels, CHANNELS),
        ):
            if value is not None and value not in known:
                raise InputError(f"--{name} {value}: must be one of {', '.join(known)}")
        numbers = (*self.mean, *self.std, 1.0 if self.scale is None else self.scale)
        if not np.isfinite(numbers).all() or 0 in self.std or self.scale == 0:
            raise InputError("--mean, --std and --scale must be finite, --std and --scale not 0")

    def channel_axis(self, shape: tuple[int, ...]) -> int:
        """The axis of the channels in an input's shape, batch included. Raises :class:`InputError`
        if the shape does not tell and no layout is given."""
        if self.layout is not None:
            return 1 if self.layout == "nchw" else len(shape) - 1
        if len(shape) != 4:
            return len(shape) - 1
        first, last = shape[1] in (1, 3), shape[3] in (1, 3)
        if first == last:
            raise InputError(f"input of shape {shape}: say --layout nchw or nhwc")
        return 1 if first else 3

    def apply(self, array: np.ndarray, scale: float) -> np.ndarray:
        """``array``: one input in the model's shape. ``scale``: where none was given."""
        scale = scale if self.scale is None else self.scale
        if scale == 1 and self.mean == (0.0,) and self.std == (1.0,):
            return array.astype(np.float32)
        shape = [1] * array.ndim
        if max(len(self.mean), len(self.std)) > 1:
            axis = self.channel_axis(array.shape)
            for name, values in (("mean", self.mean), ("std", self.std)):
                if len(values) not in (1, array.shape[axis]):
                    raise InputError(
                        f"--{name} has {len(values)} numbers, the input {array.shape[axis]} "
                        "channels"
                    )
            shape[axis] = -1
        mean, std = (np.reshape(v, shape if len(v) > 1 else ()) for v in (self.mean, self.std))
        return ((array * scale - mean) / std).astype(np.float32)


def preprocessed(arrays: Feeds, preprocessing: Preprocessing) -> dict[str, np.ndarray]:
    """A model's inputs, pictures within 0..1, after ``preprocessing``; it must be of real numbers
    if that changes anything. Raises :class:`InputError`."""
    if preprocessing == Preprocessing(layout=preprocessing.layout):
        return dict(arrays)
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise InputError(f"--mean and --std: input {name} is {array.dtype}, not float32")
    return {name: preprocessing.apply(array, 1.0) for name, array in arrays.items()}


class Samples(Sequence[Feeds]):
    """Samples that are made when they are asked for. Subclasses define ``sample``, which raises
    ``IndexError`` behind the last one, and ``__len__``."""

    @abstractmethod
    def sample(self, index: int) -> Feeds:
        """The model's inputs by name."""

    @overload
    def __getitem__(self, index: int) -> Feeds: ...
    @overload
    def __getitem__(self, index: slice) -> list[Feeds]: ...
    def __getitem__(self, index: int | slice) -> Feeds | list[Feeds]:
        if isinstance(index, slice):
            return [self.sample(i) for i in range(*index.indices(len(self)))]
        return self.sample(index)


class ArraySamples(Samples):
    """Rows of arrays: ``arrays`` by input name, samples along the first axis."""

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        shapes: Shapes,
        preprocessing: Preprocessing | None = None,
        types: Types | None = None,
    ):
        self._shapes, self._types = dict(shapes), dict(types or {})
        self._preprocessing = preprocessing or Preprocessing()
        self._arrays = {}
        for name, shape in shapes.items():
            if name not in arrays:
                have = ", ".join(arrays) or "none"
                raise InputError(f"no array for input {name} (there are: {have})")
            array = np.asarray(arrays[name])
            if not fits(array, shape):
                raise InputError(
                    f"array {name} has shape {array.shape}, samples of {shape} are needed, along a "
                    "leading axis"
                )
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise InputError(f"array {name} holds values that are not finite")
            wanted = self._types.get(name, np.dtype(np.float32))
            if wanted.kind != "f" and array.dtype.kind not in "iub":
                raise InputError(f"array {name} is {array.dtype}; the model takes {wanted}")
            self._arrays[name] = array
        lengths = {len(a) for a in self._arrays.values()}
        if len(lengths) != 1:
            raise InputError(f"the arrays hold different numbers of samples: {sorted(lengths)}")
        if not len(self):
            raise InputError("no calibration data: the arrays are empty")

    def __len__(self) -> int:
        return len(next(iter(self._arrays.values())))

    def sample(self, index: int) -> Feeds:
        """The row ``index`` of every array, preprocessed; rows of integers as they are."""
        return {name: self._row(name, array[index]) for name, array in self._arrays.items()}

    def _row(self, name: str, stored: np.ndarray) -> np.ndarray:
        array, wanted = stored.reshape(self._shapes[name]), self._types.get(name)
        if wanted is not None and wanted.kind != "f":
            return array.astype(wanted)
        return self._preprocessing.apply(array, 1.0)


class PictureSamples(Samples):
    """The pictures of a folder and those below it, by their paths in order; read when asked for."""

    def __init__(self, folder: Path, shapes: Shapes, preprocessing: Preprocessing):
        self._preprocessing = preprocessing
        if len(shapes) != 1:
            raise InputError(f"{folder}: the model has {len(shapes)} inputs: use an .npz file")
        self._name, self._shape = next(iter(shapes.items()))
        if len(self._shape) != 4 or self._shape[0] != 1:
            raise InputError(f"{folder}: input {self._name} of shape {self._shape} is no picture")
        axis = preprocessing.channel_axis(self._shape)
        if axis == 1:
            _, channels, *size = self._shape
        else:
            _, *size, channels = self._shape
        self._axis, self._size = axis, tuple(size)
        kind = preprocessing.channels or ("gray" if channels == 1 else "rgb")
        if channels != (1 if kind == "gray" else 3):
            raise InputError(f"{folder}: {kind} pictures, but the model takes {channels} channels")
        if preprocessing.size not in (None, self._size):
            raise InputError(
                "--size {}x{}: the model takes {}x{}".format(*preprocessing.size, *self._size)
            )
        self._kind = kind
        self._paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES)
        if not self._paths:
            raise InputError(f"no calibration data: {folder} holds no pictures")

    def __len__(self) -> int:
        return len(self._paths)

    def sample(self, index: int) -> Feeds:
        """The picture ``index``, read, resized and preprocessed."""
        path, (height, width) = self._paths[index], self._size
        try:
            with Image.open(path) as image:
                mode = "L" if self._kind == "gray" else "RGB"
                picture = image.convert(mode).resize((width, height), Image.Resampling.BILINEAR)
        except (OSError, ValueError):
            raise InputError(f"{path} cannot be read as a picture") from None
        pixels = np.asarray(picture, np.float32).reshape(1, height, width, -1)
        if self._kind == "bgr":
            pixels = pixels[..., ::-1]
        if self._axis == 1:
            pixels = pixels.transpose(0, 3, 1, 2)
        return {self._name: self._preprocessing.apply(pixels, 1 / 255)}


class Chosen(Samples):
    """``count`` of ``samples``, evenly spread (all of them if there are fewer)."""

    def __init__(self, samples: Sequence[Feeds], count: int):
        self._samples = samples
        chosen = np.linspace(0, len(samples) - 1, min(count, len(samples)))
        self._indices = [int(i) for i in chosen]

    def __len__(self) -> int:
        return len(self._indices)

    def sample(self, index: int) -> Feeds:
        """The chosen sample ``index``."""
        return self._samples[self._indices[index]]


def fits(array: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether each row of ``array`` is of ``shape``, up to axes of size 1."""
    return array.ndim > 0 and [d for d in array.shape[1:] if d != 1] == [d for d in shape if d != 1]


def read_samples(
    path: Path, shapes: Shapes, preprocessing: Preprocessing, types: Types | None = None
) -> tuple[Samples, np.ndarray | None]:
    """The samples in ``path`` (folder of pictures, ``.npz``, ``.npy``) and their labels, if any.

    In an ``.npz`` the arrays are named like the inputs; for the one input of a model also any
    other name, if a single array fits or one of several is named ``x``. Labels are ``y``."""
    if path.is_dir():
        return PictureSamples(path, shapes, preprocessing), None
    arrays = _read_arrays(path)
    labels = arrays.pop(LABELS) if LABELS in arrays and LABELS not in shapes else None
    if len(shapes) == 1 and (name := next(iter(shapes))) not in arrays:
        fitting = [k for k, a in arrays.items() if a.dtype.kind in "fiub" and fits(a, shapes[name])]
        if len(fitting) > 1:
            fitting = [k for k in fitting if k == "x"] or fitting
        if len(fitting) == 1:
            arrays = {name: arrays[fitting[0]]}
        elif len(arrays) == 1:
            arrays = {name: next(iter(arrays.values()))}
    try:
        return ArraySamples(arrays, shapes, preprocessing, types), labels
    except InputError as e:
        raise InputError(f"{path}: {e}") from None


def read_labels(path: Path) -> np.ndarray:
    """The class numbers in a file: the first array of an ``.npy`` or ``.npz``, or the last column
    of a ``.csv`` or ``.txt``, which may have a heading. Raises :class:`InputError`."""
    if path.suffix.lower() not in (".csv", ".txt"):
        return next(iter(_read_arrays(path).values()))
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not text in UTF-8") from None
    numbers = []
    for i, line in enumerate(lines):
        last = line.rpartition(",")[2].strip()
        if last.isdecimal():
            numbers.append(int(last))
        elif i and line.strip():
            raise InputError(f"{path}, line {i + 1}: {last[:40]!r} is no class number")
    return np.array(numbers, np.int64)


def check_labels(labels: np.ndarray, count: int) -> np.ndarray:
    """``labels`` as one class number per sample."""
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.size != len(labels) or len(labels) != count:
        raise InputError(
            f"labels of type {labels.dtype} and shape {labels.shape}: {count} class numbers are "
            "needed"
        )
    if labels.min() < 0:
        raise InputError(f"label {labels.min()}: classes count from 0")
    return labels.reshape(-1).astype(np.int64)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    suffix = path.suffix.lower()
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if suffix not in (".npz", ".npy"):
        raise InputError(f"{path}: must be a folder of pictures, an .npz or an .npy file")
    try:
        data = np.load(path)
        if isinstance(data, np.ndarray):
            return {"x": data}
        with data:
            arrays = {name: data[name] for name in data.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        raise InputError(f"{path}: not a readable {suffix} file") from None
    if not arrays:
        raise InputError(f"no calibration data: {path} holds no arrays")
    return arrays
