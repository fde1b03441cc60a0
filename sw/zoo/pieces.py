"""A single product and a block of convolutions, to measure by themselves."""

from __future__ import annotations

import onnx

from systole.sw.zoo.builder import Builder


def gemm(seed: int = 0, m: int = 16, k: int = 256, n: int = 256) -> onnx.ModelProto:
    """One product: activations (m, k) by a constant (k, n)."""
    net = Builder("gemm", seed)
    return net.model(net.gemm(net.input((m, k)), n))


def vgg_block(seed: int = 0) -> onnx.ModelProto:
    """Two 3x3 convolutions of 64 channels on 56x56 with Relu, and a 2x2 maximum pool."""
    net = Builder("vgg-block", seed)
    x = net.conv(net.conv(net.input((1, 64, 56, 56)), 64), 64)
    return net.model(net.max_pool(x))
