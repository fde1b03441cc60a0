"""Networks built in code: published shapes, seeded weights, calibrated scales, QDQ int8 per
channel.

    python -m systole.sw.zoo resnet8 -o resnet8.onnx
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable

import onnx

from systole.sw.files import write_atomically
from systole.sw.zoo import classifiers, dense, pieces, tiny, transformers

NETWORKS: dict[str, Callable[..., onnx.ModelProto]] = {
    "gemm": pieces.gemm,
    "vgg-block": pieces.vgg_block,
    "resnet8": tiny.resnet8,
    "dscnn-kws": tiny.dscnn_kws,
    "mobilenetv1-0.25-vww": tiny.mobilenetv1_025_vww,
    "autoencoder-ad": tiny.autoencoder_ad,
    "resnet18": classifiers.resnet18,
    "resnet50": classifiers.resnet50,
    "mobilenetv1": classifiers.mobilenetv1,
    "mobilenetv2": classifiers.mobilenetv2,
    "mobilenetv3-small": classifiers.mobilenetv3_small,
    "squeezenet": classifiers.squeezenet,
    "yolov3-tiny": dense.yolov3_tiny,
    "yolov3": dense.yolov3,
    "unet-small": dense.unet_small,
    "deit-tiny": transformers.deit_tiny,
    "mobilevit-xxs": transformers.mobilevit_xxs,
    "bert-tiny": transformers.bert_tiny,
    "bert-base": transformers.bert_base,
    "whisper-tiny-encoder": transformers.whisper_tiny_encoder,
    "gpt2-step": transformers.gpt2_step,
}


def build(name: str, **parameters: int) -> onnx.ModelProto:
    """The network ``name``; ``parameters`` are its function's. Raises ``ValueError``, one sentence,
    on an unknown name, a parameter that the network has not, or a size that does not fit it."""
    if name not in NETWORKS:
        raise ValueError(f"no network {name!r}; there are {', '.join(NETWORKS)}")
    network = NETWORKS[name]
    for parameter in parameters:
        if parameter not in inspect.signature(network).parameters:
            takers = [
                n for n, f in NETWORKS.items() if parameter in inspect.signature(f).parameters
            ]
            whose = f"belongs to {', '.join(takers)}" if takers else "belongs to no network"
            raise ValueError(f"parameter {parameter} {whose}, not to {name}")
    return network(**parameters)


def write(model: onnx.ModelProto, path: str | os.PathLike) -> None:
    """Writes the file whole or not at all."""
    write_atomically(os.fspath(path), model.SerializeToString())
