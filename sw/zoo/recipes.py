"""The published models that ``sw.cli.modeltable`` measures: their files, data and preparation.

All files are named relative to one folder, which is no part of this project.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from zipfile import BadZipFile

import numpy as np

from systole.sw.frontend.inputs import InputError
from systole.sw.ir.graph import Port, Tensor

SILENCE = ("silence", "unknown")
KWS = ("down", "go", "left", "no", "off", "on", "right", "stop", "up", "yes", *SILENCE)
"""Labels of the keyword data, in order."""
ML_KWS = (*SILENCE, "yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
"""The same in the order of the ML-KWS-for-MCU models."""
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406])
IMAGENET_DEVIATION = np.array([0.229, 0.224, 0.225])


@dataclass(frozen=True)
class Recipe:
    """A model, its data, and what makes inputs of them: ``stored * scale + shift``, per channel
    where these are sequences."""

    file: str
    data: str
    key: str = ""
    """Array of the samples; empty: the arrays x0, x1 and so on, a sample each."""
    scale: float | Sequence[float] = 1.0
    shift: float | Sequence[float] = 0.0
    quantise: bool = False
    """The model takes int8, the data are real: the model's own input scale applies last."""
    channels_first: bool = False
    """The model has channels before rows and columns, the data behind them."""
    labels: Sequence[int] | None = None
    """Class of the model for each label of the data, if they differ."""
    metric: Literal["accuracy", "reconstruction error"] | None = "accuracy"
    twin: str = ""
    """File of the float model that a quantised one was made from."""

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return Path(self.file).stem

    @property
    def is_float(self) -> bool:
        """Whether the model is float, and quantised before it is measured."""
        return self.name.endswith("_float")

    def samples(self, folder: Path) -> tuple[np.ndarray, np.ndarray | None]:
        """All samples as stored, and their classes in the model. Raises :class:`InputError`."""
        path = folder / self.data
        try:
            with np.load(path) as data:
                stored = {k: data[k] for k in data.files}
        except (OSError, ValueError, BadZipFile) as e:
            raise InputError(f"data {path}: cannot be read: {e}") from None
        names = [self.key] if self.key else [f"x{i}" for i in range(len(stored))]
        wanted = {self.key or "x0", *(("y",) if self.metric == "accuracy" else ())}
        if not wanted <= stored.keys():
            raise InputError(f"data {path}: holds no array {min(wanted - stored.keys())}")
        samples = np.concatenate([stored[n] for n in names if n in stored])
        truth = stored["y"].astype(int) if self.metric == "accuracy" else None
        if truth is not None and self.labels is not None:
            truth = np.asarray(self.labels)[truth]
        return samples, truth

    def prepare(self, sample: np.ndarray, port: Port, tensor: Tensor) -> np.ndarray:
        """One stored sample as the model's input. Raises :class:`InputError`."""
        if self.scale == 1.0 and self.shift == 0.0:
            x = sample
        else:
            x = sample.astype(np.float64) * np.asarray(self.scale) + np.asarray(self.shift)
        if self.channels_first and x.ndim == 3:
            x = np.moveaxis(x, -1, 0)
        if self.quantise:
            x = np.clip(np.rint(x / np.float64(tensor.scale)) + tensor.zero, -128, 127)
        if x.size != np.prod(tensor.onnx_shape):
            raise InputError(
                f"data {self.data}: {self.file} takes {tensor.onnx_shape}, samples are {x.shape}"
            )
        return x.reshape(tensor.onnx_shape).astype(port.dtype)


def _pair(name: str, data: str, int8: dict, real: dict, **common) -> list[Recipe]:
    """A model of MLPerf Tiny, quantised and float."""
    folder = "mlperf_tiny"
    twin = f"{folder}/{name}_float.onnx"
    return [
        Recipe(f"{folder}/{name}_int8.onnx", data, twin=twin, **common, **int8),
        Recipe(twin, data, **common, **real),
    ]


RECIPES: list[Recipe] = [
    *_pair(
        "kws",
        "data/kws01_1000.npz",
        {},
        {"scale": 0.5847029, "shift": -83 * 0.5847029},
        key="x_int8",
    ),
    *_pair("vww", "data/vww01_1000.npz", {"shift": -128.0}, {"scale": 1 / 255}, key="x_uint8"),
    *_pair("ic", "data/cifar10_test500_lossless.npz", {"shift": -128.0}, {}, key="x_uint8"),
    *_pair(
        "ad",
        "data/ad01_one_clip.npz",
        {"quantise": True},
        {},
        key="windows",
        metric="reconstruction error",
    ),
    *_pair("sww", "data/sww_calib45.npz", {"key": "x_int8"}, {"key": "x"}),
    Recipe("other/mnist_cntk_float.onnx", "data/mnist_t10k.npz", "x_uint8"),
    Recipe(
        "other/winml_cifar_float.onnx",
        "data/cifar10_test500_lossless.npz",
        "x_uint8",
        scale=1 / 127.5,
        shift=-1.0,
        channels_first=True,
    ),
    Recipe(
        "other/resnet20_cifar_float.onnx",
        "data/cifar10_test500_lossless.npz",
        "x_uint8",
        scale=tuple(1 / (255 * IMAGENET_DEVIATION)),
        shift=tuple(-IMAGENET_MEAN / IMAGENET_DEVIATION),
        channels_first=True,
    ),
    *(
        Recipe(
            f"other/{name}_float.onnx",
            "data/kws01_1000.npz",
            "x_int8",
            scale=0.5847029,
            shift=-83 * 0.5847029,
            labels=[ML_KWS.index(label) for label in KWS],
        )
        for name in ("ml_kws_ds_cnn_s", "ml_kws_cnn_s")
    ),
    Recipe("other/ultraface_slim_float.onnx", "samples/ultraface_slim_float.npz", metric=None),
    Recipe(
        "other/coral_mobilenet_v1_025_128_uint8.onnx",
        "samples/coral_mobilenet_v1_025_128_uint8.npz",
        metric=None,
    ),
]
