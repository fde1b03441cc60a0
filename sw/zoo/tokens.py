"""Builds transformers: what the builder of convolutional networks does not have.

Tokens are (N, T, D). Norms, softmaxes and functions are float operators between DequantizeLinear
and QuantizeLinear, as quantisers leave them; their samples come from sums that are exact, or from
the hardware's own arithmetic, so that no processor gives other scales.
"""

from __future__ import annotations

import math

import numpy as np
from onnx import TensorProto, helper

from systole.isa import rows
from systole.sw.frontend.passes.operators import elementary
from systole.sw.zoo.builder import Builder, Function, ZooActivation

EPSILON = 1e-5
MASKED = -1e4
"""What is added to the scores of a token that is not there."""
SHARE = np.float32(1 / 256)
"""Scale of a Softmax' results."""


class TokenBuilder(Builder):
    """A transformer in the making, calibrated with a single input."""

    def __init__(self, name: str, seed: int):
        super().__init__(name, seed, "symmetric")
        self.inputs = 1

    def constant(self, shape: tuple[int, ...]) -> ZooActivation:
        """A trained constant, such as the embeddings of positions."""
        name = self._name("constant")
        codes = np.clip(np.rint(self.rng.standard_normal(shape) * 32), -127, 127).astype(np.int8)
        self._const(name, codes)
        scale, zero = np.float32(1 / 64), 0
        self._scalar(f"{name}_scale", scale)
        self._scalar(f"{name}_zero", np.int8(zero))
        return ZooActivation(name, codes, scale, zero)

    def key_mask(self, tokens: int) -> str:
        """What masks the keys that an input, ``attention_mask`` (1, tokens), says are none: 0 or
        MASKED, (1, 1, 1, tokens)."""
        info = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, (1, tokens))
        self.input_infos.append(info)
        axes = self._const("mask_axes", np.array([1, 2]))
        kept = self._node("Unsqueeze", ["attention_mask", axes], "mask_keys")
        real = self._node("Cast", [kept], "mask_real", to=TensorProto.FLOAT)
        left = self._node("Sub", [self._scalar("mask_one", np.float32(1)), real], "mask_out")
        return self._node("Mul", [left, self._scalar("mask_low", np.float32(MASKED))], "mask")

    # Moves ---------------------------------------------------------------------------------------

    def _moved(self, op_type: str, x: ZooActivation, sample: np.ndarray, **given) -> ZooActivation:
        """``x`` moved: quantised as before."""
        extra = [
            self._const(f"{x.name}_{self.count}_{k}", v) for k, v in given.items() if k != "perm"
        ]
        attributes = {k: v for k, v in given.items() if k == "perm"}
        node = self._node(op_type, [self._real(x), *extra], self._name("moved"), **attributes)
        return self._quantised(node, sample, x.scale, x.zero)

    def reshape(self, x: ZooActivation, *shape: int) -> ZooActivation:
        return self._moved("Reshape", x, x.sample.reshape(shape), shape=np.array(shape))

    def transpose(self, x: ZooActivation, *perm: int) -> ZooActivation:
        return self._moved("Transpose", x, x.sample.transpose(perm), perm=list(perm))

    def first(self, x: ZooActivation) -> ZooActivation:
        """The first token of every sequence, as a matrix."""
        ends = {"starts": np.array([0]), "ends": np.array([1]), "axes": np.array([1])}
        token = self._moved("Slice", x, x.sample[:, :1], **ends)
        return self.reshape(token, len(x.sample), x.sample.shape[2])

    def flat(self, x: ZooActivation) -> ZooActivation:
        """The positions of an image (1, C, H, W) as tokens."""
        c = x.channels
        return self.transpose(self.reshape(x, 1, c, x.sample[0, 0].size), 0, 2, 1)

    # Arithmetic ----------------------------------------------------------------------------------

    def linear(
        self, x: ZooActivation, outputs: int, activation: Function | None = None
    ) -> ZooActivation:
        """Tokens times a constant matrix, plus a bias."""
        w = self._weights((x.sample.shape[-1], outputs))
        acc = _exact(x.sample.astype(np.int64) - x.zero, w)
        return self._product("MatMul", x, w, acc, channel=1, activation=activation)

    def matmul(self, a: ZooActivation, b: ZooActivation, factor: float = 1.0) -> ZooActivation:
        """A product of two activations, times ``factor``."""
        node = self._node("MatMul", [self._real(a), self._real(b)], self._name("matmul"))
        if factor != 1:
            constant = self._scalar(f"{node}_factor", np.float32(factor))
            node = self._node("Mul", [node, constant], f"{node}_scaled")
        acc = _exact(a.sample.astype(np.int64) - a.zero, b.sample.astype(np.int64) - b.zero)
        return self._calibrated(node, acc * (np.float64(a.scale) * b.scale * factor), False)

    def norm(self, x: ZooActivation) -> ZooActivation:
        """LayerNormalization over the features."""
        stem, features = self._name("norm"), x.sample.shape[-1]
        gain, shift = self.rng.uniform(0.5, 1.5, (features,)), self.rng.normal(0, 0.2, (features,))
        parameters = [
            self._const(f"{stem}_{k}", v.astype(np.float32)) for k, v in (("g", gain), ("b", shift))
        ]
        node = self._node(
            "LayerNormalization", [self._real(x), *parameters], stem, axis=-1, epsilon=EPSILON
        )
        codes: np.ndarray = x.sample.astype(np.int64) - x.zero
        total = codes.sum(axis=-1, keepdims=True)
        squares = (codes * codes).sum(axis=-1, keepdims=True)
        scale = np.float64(x.scale)
        variance = (features * squares - total * total) * (scale / features) ** 2
        normal = (codes - total / features) * scale / np.sqrt(variance + EPSILON)
        return self._calibrated(node, normal * gain + shift, False)

    def softmax(self, x: ZooActivation, mask: str | None = None) -> ZooActivation:
        """Softmax over the last axis, of scores with a ``mask`` from :meth:`key_mask`."""
        node = self._real(x)
        if mask is not None:
            node = self._node("Add", [node, mask], self._name("masked"))
        node = self._node("Softmax", [node], self._name("softmax"), axis=-1)
        p = rows.SoftmaxParameters.of_scales(float(x.scale), float(SHARE))
        valid = np.ones(x.sample.shape[-1], bool)
        sample = rows.softmax(x.sample, p, valid, zero=-128, low=-128, high=127)
        return self._quantised(node, sample.astype(np.int8), SHARE, -128)

    def silu(self, x: ZooActivation) -> ZooActivation:
        """x * sigmoid(x), as exporters write it."""
        real = self._real(x)
        sigmoid = self._node("Sigmoid", [real], self._name("sigmoid"))
        node = self._node("Mul", [real, sigmoid], self._name("silu"))
        return self._calibrated(node, x.real * elementary.sigmoid(x.real), False)

    # Blocks --------------------------------------------------------------------------------------

    def heads(self, x: ZooActivation, heads: int) -> ZooActivation:
        """(N, T, D) cut into ``heads``: (N, heads, T, D / heads)."""
        n, tokens, width = x.sample.shape
        return self.transpose(self.reshape(x, n, tokens, heads, width // heads), 0, 2, 1, 3)

    def attention(
        self,
        x: ZooActivation,
        heads: int,
        *,
        mask: str | None = None,
        past: tuple[ZooActivation, ZooActivation] | None = None,
    ) -> tuple[ZooActivation, tuple[ZooActivation, ZooActivation]]:
        """Attention of ``x`` to itself, and its keys and values (N, heads, T, D / heads); behind
        those of tokens before, ``past``, if there are any."""
        n, tokens, width = x.sample.shape
        k, v = (self.heads(self.linear(x, width), heads) for _ in range(2))
        if past is not None:
            k, v = (self.concat(old, new, axis=2) for old, new in zip(past, (k, v), strict=True))
        q = self.heads(self.linear(x, width), heads)
        factor = 1 / math.sqrt(width // heads)
        scores = self.matmul(q, self.transpose(k, 0, 1, 3, 2), factor)
        y = self.transpose(self.matmul(self.softmax(scores, mask), v), 0, 2, 1, 3)
        return self.linear(self.reshape(y, n, tokens, width), width), (k, v)

    def mlp(self, x: ZooActivation, hidden: int, *, silu: bool = False) -> ZooActivation:
        """Two layers with a function between them."""
        inside = self.linear(x, hidden, None if silu else "Gelu")
        return self.linear(self.silu(inside) if silu else inside, x.sample.shape[-1])

    def before(
        self, x: ZooActivation, heads: int, hidden: int, *, silu: bool = False
    ) -> ZooActivation:
        """A layer with its norms before attention and MLP."""
        x = self.add(x, self.attention(self.norm(x), heads)[0], relu=False)
        return self.add(x, self.mlp(self.norm(x), hidden, silu=silu), relu=False)

    def behind(self, x: ZooActivation, heads: int, hidden: int, mask: str | None) -> ZooActivation:
        """A layer with its norms behind the sums."""
        x = self.norm(self.add(x, self.attention(x, heads, mask=mask)[0], relu=False))
        return self.norm(self.add(x, self.mlp(x, hidden), relu=False))


def _exact(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """A product of integer matrices, int64: exact in float64, whatever the order of its sums."""
    return (a.astype(np.float64) @ b.astype(np.float64)).astype(np.int64)
