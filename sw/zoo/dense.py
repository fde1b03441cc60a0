"""Networks that answer for every place of a picture: detectors and a segmenter."""

from __future__ import annotations

import onnx

from systole.sw.zoo.builder import Builder, ZooActivation

DETECTIONS = 255
"""Channels of a detection map: three boxes of 80 classes, four coordinates and an objectness."""


def _conv(
    net: Builder, x: ZooActivation, outputs: int, kernel: int = 3, stride: int = 1
) -> ZooActivation:
    return net.conv(x, outputs, kernel, stride, "LeakyRelu")


def _detections(net: Builder, x: ZooActivation) -> ZooActivation:
    return net.conv(x, DETECTIONS, kernel=1, activation=None)


def yolov3_tiny(seed: int = 0, size: int = 416) -> onnx.ModelProto:
    """Darknet's yolov3-tiny: raw detection maps of 1/32 and 1/16 of the picture's size."""
    net = Builder("yolov3-tiny", seed)
    x = net.picture(size)
    for outputs in (16, 32, 64, 128):
        x = net.max_pool(_conv(net, x, outputs))
    fine = _conv(net, x, 256)
    x = _conv(net, net.max_pool(fine), 512)
    x = _conv(net, net.max_pool(x, stride=1), 1024)
    neck = _conv(net, x, 256, kernel=1)
    coarse = _detections(net, _conv(net, neck, 512))
    x = net.concat(net.upsample(_conv(net, neck, 128, kernel=1)), fine)
    return net.model(coarse, _detections(net, _conv(net, x, 256)))


def yolov3(seed: int = 0, size: int = 416) -> onnx.ModelProto:
    """YOLOv3 (arXiv 1804.02767) on Darknet-53: raw detection maps of 1/32, 1/16 and 1/8 of the
    picture's size."""
    net = Builder("yolov3", seed, "symmetric")
    x = _conv(net, net.picture(size), 32)
    scales = []
    for width, depth in ((64, 1), (128, 2), (256, 8), (512, 8), (1024, 4)):
        x = _conv(net, x, width, stride=2)
        for _ in range(depth):
            y = _conv(net, _conv(net, x, width // 2, kernel=1), width)
            x = net.add(x, y, relu=False)
        scales.append(x)
    maps = []
    for width, finer in ((512, scales[-2]), (256, scales[-3]), (128, None)):
        for _ in range(2):
            x = _conv(net, _conv(net, x, width, kernel=1), 2 * width)
        x = _conv(net, x, width, kernel=1)
        maps.append(_detections(net, _conv(net, x, 2 * width)))
        if finer:
            x = net.concat(net.upsample(_conv(net, x, width // 2, kernel=1)), finer)
    return net.model(*maps)


def unet_small(seed: int = 0, size: int = 96) -> onnx.ModelProto:
    """A U-Net (arXiv 1505.04597) of 16 to 128 channels and three halvings: two classes for every
    pixel; padded, so that the answer has the picture's size."""
    net = Builder("unet-small", seed)
    x = net.picture(size, 8)
    skips = []
    for width in (16, 32, 64):
        skips.append(net.conv(net.conv(x, width), width))
        x = net.max_pool(skips[-1])
    x = net.conv(net.conv(x, 128), 128)
    for skip in reversed(skips):
        width = skip.channels
        x = net.concat(skip, net.conv_transpose(x, width))
        x = net.conv(net.conv(x, width), width)
    return net.model(net.conv(x, 2, kernel=1, activation=None))
