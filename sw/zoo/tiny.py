"""The four networks of MLPerf Tiny, (N, C, H, W), without the final Softmax."""

from __future__ import annotations

import onnx

from systole.sw.zoo.builder import Builder, Function, ZooActivation


def separable(
    net: Builder, x: ZooActivation, outputs: int, stride: int = 1, activation: Function = "relu"
) -> ZooActivation:
    """A 3x3 depthwise and a 1x1 convolution, both activated."""
    x = net.conv(x, x.channels, stride=stride, activation=activation, depthwise=True)
    return net.conv(x, outputs, kernel=1, activation=activation)


def resnet8(seed: int = 0) -> onnx.ModelProto:
    """Image classification, 3x32x32."""
    net = Builder("resnet8", seed)
    x = net.conv(net.input((1, 3, 32, 32)), 16)
    for outputs, stride in ((16, 1), (32, 2), (64, 2)):
        y = net.conv(x, outputs, stride=stride)
        y = net.conv(y, outputs, activation=None)
        if stride > 1:
            x = net.conv(x, outputs, kernel=1, stride=stride, activation=None)
        x = net.add(x, y)
    return net.classify(x, 10)


def dscnn_kws(seed: int = 0) -> onnx.ModelProto:
    """Keyword spotting, 1x49x10."""
    net = Builder("dscnn-kws", seed)
    x = net.conv(net.input((1, 1, 49, 10)), 64, kernel=(10, 4), stride=2)
    for _ in range(4):
        x = separable(net, x, 64)
    return net.classify(x, 12)


def mobilenetv1_025_vww(seed: int = 0) -> onnx.ModelProto:
    """Visual wake words, 3x96x96: MobileNetV1 with a quarter of the channels."""
    net = Builder("mobilenetv1-0.25-vww", seed)
    return net.classify(mobilenetv1_features(net, net.input((1, 3, 96, 96)), 4, "relu"), 2)


def mobilenetv1_features(
    net: Builder, x: ZooActivation, divisor: int, activation: Function
) -> ZooActivation:
    """MobileNetV1 (arXiv 1704.04861) before its pool, with 1/``divisor`` of the channels."""
    x = net.conv(x, 32 // divisor, stride=2, activation=activation)
    strided = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2))
    for outputs, stride in (*strided, *[(512, 1)] * 5, (1024, 2), (1024, 1)):
        x = separable(net, x, outputs // divisor, stride, activation)
    return x


def autoencoder_ad(seed: int = 0) -> onnx.ModelProto:
    """Anomaly detection, 640 features in and out."""
    net = Builder("autoencoder-ad", seed)
    x = net.input((1, 640))
    for width in (128, 128, 128, 128, 8, 128, 128, 128, 128):
        x = net.gemm(x, width, activation="relu")
    return net.model(net.gemm(x, 640))
