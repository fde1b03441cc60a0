"""The state of one lowering: what operator handlers work with."""

from __future__ import annotations

from collections.abc import Mapping

from systole.sw.frontend.passes.emitter import Emitter
from systole.sw.frontend.passes.mover import Mover
from systole.sw.frontend.passes.operands import Operands
from systole.sw.frontend.passes.origins import Origins
from systole.sw.frontend.passes.quantiser import Quantiser
from systole.sw.frontend.passes.results import ResultTable
from systole.sw.frontend.passes.tensors import TensorTable


class LoweringState:
    """The parts of a lowering that handlers use; each says in its own docstring what it holds.

    * ``opsets``    version of the model's operator set, by domain;
    * ``results``   symbolic values of ONNX values, and constant inputs of nodes;
    * ``tensors``   stored tensors: quantisation and layout;
    * ``emitter``   operators emitted so far;
    * ``mover``     activations in another order;
    * ``quantiser`` results given a scale;
    * ``operands``  inputs of nodes as activations;
    * ``origins``   activations as functions of others."""

    def __init__(self, opsets: Mapping[str, int]):
        self.opsets = dict(opsets)
        self.results = ResultTable()
        self.tensors = TensorTable()
        self.emitter = Emitter(self.tensors)
        self.mover = Mover(self.tensors, self.emitter)
        self.quantiser = Quantiser(self.tensors, self.emitter, self.mover)
        self.operands = Operands(self.results, self.tensors, self.emitter, self.quantiser)
        self.origins = Origins(self.tensors, self.emitter, self.quantiser)
