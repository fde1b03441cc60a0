"""Cycles of networks on a configuration, for the comparison of its options."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx

from systole.isa import Config
from systole.sw.compiler import READ_LATENCY, compile_graph
from systole.sw.frontend.load import load
from systole.sw.ir.graph import ModelError
from systole.sw.simulate.cycles import predict_layers
from systole.sw.zoo import build

NETWORKS = ("resnet8", "dscnn-kws", "mobilenetv1-0.25-vww", "autoencoder-ad")
"""Those of MLPerf Tiny: they fit every configuration that is compared."""


def predicted_cycles(config: Config) -> dict[str, int]:
    """What the cycle model predicts for each of ``NETWORKS``; without those that need what the
    configuration does not have."""
    cycles = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in NETWORKS:
            path = Path(directory) / f"{name}.onnx"
            onnx.save(build(name), path)
            try:
                program = compile_graph(load(path), config)
            except ModelError:
                continue
            cycles[name] = predict_layers(program, READ_LATENCY).cycles
    return cycles
