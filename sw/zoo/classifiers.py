"""Image classifiers of 1000 classes as torchvision has them (MobileNetV1: as TensorFlow has it),
batch normalisation folded. ``size`` is the picture's height and width, a multiple of 32."""

from __future__ import annotations

from collections.abc import Callable

import onnx

from systole.sw.zoo.builder import Builder, Function, ZooActivation
from systole.sw.zoo.tiny import mobilenetv1_features

CLASSES = 1000


def resnet18(seed: int = 0, size: int = 224) -> onnx.ModelProto:
    """ResNet-18 (arXiv 1512.03385)."""

    def basic(net: Builder, x: ZooActivation, width: int, stride: int) -> ZooActivation:
        return net.conv(net.conv(x, width, stride=stride), width, activation=None)

    net = Builder("resnet18", seed, "symmetric")
    return _resnet(net, size, basic, depths=(2, 2, 2, 2), expansion=1)


def resnet50(seed: int = 0, size: int = 224) -> onnx.ModelProto:
    """ResNet-50 v1.5: the stride is in the 3x3 convolution."""

    def bottleneck(net: Builder, x: ZooActivation, width: int, stride: int) -> ZooActivation:
        x = net.conv(net.conv(x, width, kernel=1), width, stride=stride)
        return net.conv(x, 4 * width, kernel=1, activation=None)

    net = Builder("resnet50", seed, "symmetric")
    return _resnet(net, size, bottleneck, depths=(3, 4, 6, 3), expansion=4)


def _resnet(
    net: Builder,
    size: int,
    block: Callable[[Builder, ZooActivation, int, int], ZooActivation],
    *,
    depths: tuple[int, ...],
    expansion: int,
) -> onnx.ModelProto:
    """Stages of ``depths`` residual blocks; ``block`` builds one, given its width and stride, with
    ``expansion`` times as many output channels."""
    x = net.conv(net.picture(size), 64, kernel=7, stride=2)
    x = net.max_pool(x, kernel=3)
    for stage, depth in enumerate(depths):
        width = 64 << stage
        for i in range(depth):
            stride = 2 if stage and not i else 1
            y = block(net, x, width, stride)
            if x.sample.shape != y.sample.shape:
                x = net.conv(x, expansion * width, kernel=1, stride=stride, activation=None)
            x = net.add(x, y)
    return net.classify(x, CLASSES)


def mobilenetv1(seed: int = 0, size: int = 224) -> onnx.ModelProto:
    """MobileNetV1 (arXiv 1704.04861)."""
    net = Builder("mobilenetv1", seed)
    return net.classify(mobilenetv1_features(net, net.picture(size), 1, "relu6"), CLASSES)


MOBILENETV2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Inverted residuals: expansion, channels, depth, stride."""


def mobilenetv2(seed: int = 0, size: int = 224) -> onnx.ModelProto:
    """MobileNetV2 (arXiv 1801.04381): inverted residuals with linear bottlenecks."""
    net = Builder("mobilenetv2", seed, "symmetric")
    x = net.conv(net.picture(size), 32, stride=2, activation="relu6")
    for expansion, outputs, depth, stride in MOBILENETV2:
        for i in range(depth):
            y = x
            if expansion > 1:
                y = net.conv(y, expansion * x.channels, kernel=1, activation="relu6")
            first = stride if not i else 1
            y = net.conv(y, y.channels, stride=first, activation="relu6", depthwise=True)
            y = net.conv(y, outputs, kernel=1, activation=None)
            x = net.add(x, y, relu=False) if i else y
    return net.classify(net.conv(x, 1280, kernel=1, activation="relu6"), CLASSES)


def mobilenetv3_small(seed: int = 0, size: int = 224) -> onnx.ModelProto:
    """MobileNetV3-Small (arXiv 1905.02244): squeeze-and-excitation, hard-swish."""
    net = Builder("mobilenetv3-small", seed, "symmetric")
    x = net.conv(net.picture(size), 16, stride=2, activation="HardSwish")
    blocks: tuple[tuple[int, int, int, bool, Function, int], ...] = (
        (3, 16, 16, True, "relu", 2),
        (3, 72, 24, False, "relu", 2),
        (3, 88, 24, False, "relu", 1),
        (5, 96, 40, True, "HardSwish", 2),
        (5, 240, 40, True, "HardSwish", 1),
        (5, 240, 40, True, "HardSwish", 1),
        (5, 120, 48, True, "HardSwish", 1),
        (5, 144, 48, True, "HardSwish", 1),
        (5, 288, 96, True, "HardSwish", 2),
        (5, 576, 96, True, "HardSwish", 1),
        (5, 576, 96, True, "HardSwish", 1),
    )
    for kernel, expanded, outputs, excite, activation, stride in blocks:
        y = x
        if expanded != x.channels:
            y = net.conv(y, expanded, kernel=1, activation=activation)
        y = net.conv(y, expanded, kernel, stride, activation, depthwise=True)
        if excite:
            y = _squeeze_and_excite(net, y)
        y = net.conv(y, outputs, kernel=1, activation=None)
        x = net.add(x, y, relu=False) if x.sample.shape == y.sample.shape else y
    x = net.conv(x, 576, kernel=1, activation="HardSwish")
    x = net.gemm(net.flatten(net.global_average(x)), 1024, activation="HardSwish")
    return net.model(net.gemm(x, CLASSES))


def _squeeze_and_excite(net: Builder, x: ZooActivation) -> ZooActivation:
    """Every channel times a factor that its and all other channels' averages decide."""
    # A quarter of the channels, rounded to a multiple of 8 but never down by more than a tenth.
    quarter = x.channels / 4
    squeezed = max(8, int(quarter + 4) // 8 * 8)
    squeezed += 8 if squeezed < 0.9 * quarter else 0
    gate = net.conv(net.global_average(x), squeezed, kernel=1)
    return net.mul(x, net.conv(gate, x.channels, kernel=1, activation="HardSigmoid"))


def squeezenet(seed: int = 0, size: int = 224) -> onnx.ModelProto:
    """SqueezeNet 1.1 (arXiv 1602.07360): its logits are the averages of a last convolution."""
    net = Builder("squeezenet", seed, "symmetric")
    x = net.conv(net.picture(size), 64, stride=2, padded=False)
    for squeezed, outputs, pooled in (
        (16, 64, True),
        (16, 64, False),
        (32, 128, True),
        (32, 128, False),
        (48, 192, True),
        (48, 192, False),
        (64, 256, False),
        (64, 256, False),
    ):
        if pooled:
            x = net.max_pool(x, kernel=3, padded=False)
        x = net.conv(x, squeezed, kernel=1)
        x = net.concat(net.conv(x, outputs, kernel=1), net.conv(x, outputs))
    return net.model(net.flatten(net.global_average(net.conv(x, CLASSES, kernel=1))))
