"""Transformers for pictures, text and speech."""

from __future__ import annotations

import onnx

from systole.sw.zoo.builder import ZooActivation
from systole.sw.zoo.tokens import TokenBuilder


def deit_tiny(seed: int = 0, size: int = 224, layers: int = 12) -> onnx.ModelProto:
    """DeiT-tiny (arXiv 2012.12877) without distillation: patches of 16 pixels, 192 wide."""
    net = TokenBuilder("deit-tiny", seed)
    x = net.conv(net.picture(size, 16), 192, 16, 16, None, padded=False)
    x = net.concat(net.constant((1, 1, 192)), net.flat(x))
    x = net.add(x, net.constant(x.sample.shape), relu=False)
    for _ in range(layers):
        x = net.before(x, 3, 768)
    return net.model(net.gemm(net.first(net.norm(x)), 1000))


def bert_tiny(seed: int = 0, tokens: int = 128, layers: int = 2) -> onnx.ModelProto:
    """BERT-tiny (arXiv 1908.08962), 128 wide, behind its embeddings."""
    return _bert("bert-tiny", seed, tokens=tokens, layers=layers, heads=2, width=128)


def bert_base(seed: int = 0, tokens: int = 128, layers: int = 12) -> onnx.ModelProto:
    """BERT-base (arXiv 1810.04805), 768 wide, behind its embeddings."""
    return _bert("bert-base", seed, tokens=tokens, layers=layers, heads=12, width=768)


def _bert(
    name: str, seed: int, *, tokens: int, layers: int, heads: int, width: int
) -> onnx.ModelProto:
    """An encoder of text, its padding masked."""
    net = TokenBuilder(name, seed)
    x = net.norm(net.input((1, tokens, width)))
    mask = net.key_mask(tokens)
    for _ in range(layers):
        x = net.behind(x, heads, 4 * width, mask)
    return net.model(x)


def whisper_tiny_encoder(seed: int = 0, frames: int = 1500, layers: int = 4) -> onnx.ModelProto:
    """The encoder of Whisper-tiny (arXiv 2212.04356): a log-mel spectrogram of two columns a
    frame, 30 s by default; 384 wide."""
    net = TokenBuilder("whisper-tiny-encoder", seed)
    x = net.conv(net.input((1, 80, 1, 2 * frames)), 384, (1, 3), 1, "Gelu")
    x = net.flat(net.conv(x, 384, (1, 3), 2, "Gelu"))
    x = net.add(x, net.constant(x.sample.shape), relu=False)
    for _ in range(layers):
        x = net.before(x, 6, 1536)
    return net.model(net.norm(x))


def gpt2_step(seed: int = 0, past: int = 127, layers: int = 12) -> onnx.ModelProto:
    """One token of GPT-2 (124 M parameters) behind its embeddings, given the keys and values of
    ``past`` tokens: logits, and the keys and values with this token's."""
    net = TokenBuilder("gpt2-step", seed)
    x = net.input((1, 1, 768))
    caches: list[ZooActivation] = []
    for i in range(layers):
        shape = (1, 12, past, 64)
        cache = tuple(net.input(shape, name=f"past_{part}_{i}") for part in ("key", "value"))
        y, both = net.attention(net.norm(x), 12, past=(cache[0], cache[1]))
        caches += both
        x = net.add(x, y, relu=False)
        x = net.add(x, net.mlp(net.norm(x), 3072), relu=False)
    return net.model(net.linear(net.norm(x), 50257), *caches)


def mobilevit_xxs(seed: int = 0, size: int = 256) -> onnx.ModelProto:
    """MobileViT-xxs (arXiv 2110.02178): inverted bottlenecks, and transformers over the pixels at
    the same place of all patches of 2 x 2."""
    net = TokenBuilder("mobilevit-xxs", seed)
    x = net.silu(net.conv(net.picture(size, 64), 16, 3, 2, None))
    for outputs, stride in ((16, 1), (24, 2), (24, 1), (24, 1)):
        x = _bottleneck(net, x, outputs, stride)
    for outputs, width, layers in ((48, 64, 2), (64, 80, 4), (80, 96, 3)):
        x = _patches(net, _bottleneck(net, x, outputs, 2), width, layers)
    return net.classify(net.silu(net.conv(x, 320, 1, 1, None)), 1000)


def _bottleneck(net: TokenBuilder, x: ZooActivation, outputs: int, stride: int) -> ZooActivation:
    """Twice the channels between two 1x1 convolutions."""
    y = net.silu(net.conv(x, 2 * x.channels, 1, 1, None))
    y = net.silu(net.conv(y, y.channels, 3, stride, None, depthwise=True))
    y = net.conv(y, outputs, 1, 1, None)
    return net.add(x, y, relu=False) if stride == 1 and outputs == x.channels else y


def _patches(net: TokenBuilder, x: ZooActivation, width: int, layers: int) -> ZooActivation:
    """A block of MobileViT."""
    _, channels, h, w = x.sample.shape
    y = net.silu(net.conv(x, channels, 3, 1, None))
    y = net.conv(y, width, 1, 1, None)
    y = net.transpose(net.reshape(y, width * h // 2, 2, w // 2, 2), 0, 2, 1, 3)
    y = net.transpose(net.reshape(y, 1, width, h * w // 4, 4), 0, 3, 2, 1)
    y = net.reshape(y, 4, h * w // 4, width)
    for _ in range(layers):
        y = net.before(y, 4, 2 * width, silu=True)
    y = net.transpose(net.reshape(net.norm(y), 1, 4, h * w // 4, width), 0, 3, 2, 1)
    y = net.transpose(net.reshape(y, width * h // 2, w // 2, 2, 2), 0, 2, 1, 3)
    y = net.silu(net.conv(net.reshape(y, 1, width, h, w), channels, 1, 1, None))
    return net.silu(net.conv(net.concat(x, y), channels, 3, 1, None))
