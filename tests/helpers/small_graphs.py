"""Graphs of a few operators, written down by hand, to test passes on graphs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from systole.sw.ir.graph import Binary, Conv, Graph, Op, Pool, Port, Table, Tensor

SHAPE = (1, 4, 3, 3)


def tensor(name: str, *, zero: int = 0) -> Tensor:
    return Tensor(
        name=name,
        shape=SHAPE,
        scale=np.float32(0.1),
        zero=zero,
        unsigned=False,
        onnx_shape=SHAPE,
        perm=(0, 1, 2, 3),
    )


def graph(ops: Sequence[Op], outputs: Sequence[str]) -> Graph:
    """A graph of input ``x`` and ``ops``. Tensors are alike but for their zero points, which a
    clamp keeps."""
    tensors = {"x": tensor("x")}
    for i, op in enumerate(ops, 1):
        zero = tensors[op.x].zero if isinstance(op, Pool) else i
        tensors[op.output] = tensor(op.output, zero=zero)
    return Graph(
        name="small",
        tensors=tensors,
        ops=list(ops),
        inputs=[Port("x", "x", "int8")],
        outputs=[Port(name, name, "int8") for name in outputs],
    )


def conv(x: str, output: str, *, group: int = 1) -> Conv:
    return Conv(
        name=f"{output}_node",
        op_type="Conv",
        output=output,
        low=-100,
        high=100,
        x=x,
        weights=np.full((4, 4 // group, 1, 1), 3, np.int8),
        bias=np.zeros(4, np.int32),
        scale=np.full(4, 0.05, np.float32),
        strides=(1, 1),
        pads=(0, 0, 0, 0),
        dilations=(1, 1),
        group=group,
    )


def add(a: str, b: str, output: str) -> Binary:
    return Binary(
        name=f"{output}_node",
        op_type="Add",
        output=output,
        low=-128,
        high=127,
        kind="add",
        a=a,
        b=b,
        a_ratio=0.5,
        b_ratio=0.75,
    )


def table(x: str, output: str, *, offset: int = 1) -> Table:
    values = np.clip(np.arange(-128, 128) + offset, -128, 127).astype(np.int8)
    return Table(f"{output}_node", "Tanh", output, -128, 127, x=x, values=values)


def clamp(x: str, output: str, low: int, high: int) -> Pool:
    return Pool(
        name=f"{output}_node",
        op_type="Clip",
        output=output,
        low=low,
        high=high,
        x=x,
        kind="max",
        kernel=(1, 1),
        strides=(1, 1),
        pads=(0, 0, 0, 0),
    )
