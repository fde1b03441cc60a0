"""LSTM, GRU and RNN written out as operators that have a meaning in integers.

Each step of the sequence becomes products, additions, multiplications and activation functions. The
product of the inputs by their weights is one Gemm a gate for all steps, that of the state one Gemm
a gate and step. Numbers that are known, such as an initial state of zeros, are computed here.

What an operator asks for that cannot be written so is a reason, one sentence, and leaves it float.

The state that adds up over the steps (the cell of an LSTM, the hidden state of a GRU) has no room
in 8 bits: a change of less than half a step of its scale is lost, however often it comes. So a
state c is written as c + u, u what a step changes, and what rounding took off c is kept as a rest
at the finer scale of the changes, and added to the next u:

    t = u + rest;  c' = c + t;  moved = c' - c;  rest' = t - moved

In float the rest is 0. In integers t, moved and rest' are exact, as their scale divides that of c
(:func:`settle`). A state that is input and output of the model is split on the way in, and its
rest added on the way out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from systole.sw.quantisation.fold import Weights, attribute
from systole.sw.quantisation.samples import Ranges

Value = str | np.ndarray
"""An operand: the name of a tensor, or numbers that are known."""

GATES = {"LSTM": "iofc", "GRU": "zrh", "RNN": "h"}
"""The gates in the order in which ONNX keeps their weights."""
DEFAULT_FUNCTIONS = {"LSTM": "Sigmoid Tanh Tanh", "GRU": "Sigmoid Tanh", "RNN": "Tanh"}
FUNCTIONS = ("Sigmoid", "Tanh", "Relu", "Softsign", "Softplus")
"""Activation functions that are operators of the same name, without parameters."""
MAX_STEPS = 512
"""Steps of a sequence that are written out; each is some fifteen operators."""

PASSING = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Concat")
"""Operators that a state may pass between the model's input and its first step, or its last step
and the model's output."""

_STEP = re.compile(r"/step\d+/")
_STATE, _TOTAL, _MOVED, _REST = (
    "/step/" + r for r in ("state_add", "total_add", "moved_sub", "rest_sub")
)
_INITIAL = "/step/initial_sub"
_EXACT = "/exact_add"


def settle(model: onnx.ModelProto, ranges: Ranges) -> Ranges:
    """``ranges`` with one range for all steps of a value inside a recurrent operator: the least and
    the largest over the sequence. So steps need no requantisation between them, and a step that
    stands for many, with its state as input and output, has the scales of them all.

    Rests, and what they are added to, get grids that the state's scale is a multiple of. Where the
    changes are about as large as the state, no rest is finer than the state itself: there it is
    taken out of ``model``."""
    shared: Ranges = {}
    for name, (low, high) in ranges.items():
        role = _role(name)
        least, most = shared.get(role, (low, high))
        shared[role] = (min(least, low), max(most, high))
    useless = set()
    for stem in [role.removesuffix(_MOVED) for role in shared if role.endswith(_MOVED)]:
        grids = _grids(shared, stem)
        if grids is None:
            useless.add(stem)
        else:
            shared.update(grids)
    _drop_rests(model, useless)
    return {name: shared[_role(name)] for name in ranges}


def _grids(ranges: Ranges, stem: str) -> Ranges | None:
    """Ranges of the rests of one direction of an operator and of what they are added to; None if no
    rest is of use. ``ranges``: by role."""
    state, moved = ranges[stem + _STATE], ranges[stem + _MOVED]
    coarse = (max(state[1], 0.0) - min(state[0], 0.0)) / 255
    total = ranges.get(stem + _TOTAL, moved)
    low = min(total[0], moved[0], 0.0) - coarse / 2
    high = max(total[1], moved[1], 0.0) + coarse / 2
    # An odd share of the state's scale: no sum lies halfway between two steps of it.
    share = math.floor(coarse * 255 / (high - low) + 1) // 2 * 2 - 1
    if share < 3:
        return None
    fine = coarse / share
    below = min(255, math.ceil(-low / fine))
    around, rest = (-below * fine, (255 - below) * fine), (-128 * fine, 127 * fine)
    return {stem + _MOVED: around, stem + _TOTAL: around, stem + _REST: rest, stem + _INITIAL: rest}


def _drop_rests(model: onnx.ModelProto, stems: Collection[str]) -> None:
    """Takes the rests of these directions of operators out of ``model``."""
    gone = {stem + role for stem in stems for role in (_MOVED, _REST, _INITIAL)}
    passed = {stem + role for stem in stems for role in (_TOTAL, _EXACT)}
    instead: dict[str, str] = {}
    kept = []
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = instead.get(name, name)
        if _role(node.name) in passed:
            instead[node.output[0]] = node.input[0]
        elif _role(node.name) not in gone:
            kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _role(name: str) -> str:
    """A name without the number of its step: what it is at every step."""
    return _STEP.sub("/step/", name)


def is_rest(name: str) -> bool:
    """Whether a value is a rest of rounding, which is 0 in float."""
    return _role(name).endswith((_REST, _INITIAL))


def is_inner(name: str) -> bool:
    """Whether a value is inside a step of a recurrent operator."""
    return _STEP.search(name) is not None


def state_of(name: str) -> str | None:
    """The operator and direction whose state at some step is the value ``name``; None if it is
    something else."""
    role = _role(name)
    return role.removesuffix(_STATE) if role.endswith(_STATE) else None


def exact_states(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes on the way of a state and its rest out of the model: they stay float, as
    8 bits would round the rest away."""
    exact, names = set[str](), set[str]()
    for node in model.graph.node:
        if node.name.endswith(_EXACT) or (
            exact.intersection(node.input) and node.op_type in PASSING
        ):
            names.add(node.name)
            exact.update(node.output)
    return names


def split_states(quantised: onnx.ModelProto) -> None:
    """Makes the rest of a state that comes in, in place: what was quantised less what became of it,
    where quantising has put twice the latter."""
    producer = {name: node for node in quantised.graph.node for name in node.output}
    for node in quantised.graph.node:
        if _role(node.name).endswith(_INITIAL):
            code = producer.get(producer[node.input[0]].input[0])
            if code is not None and code.op_type == "QuantizeLinear":
                node.input[0] = code.input[0]


def unroll(model: onnx.ModelProto, exclude: Collection[str] = ()) -> None:
    """Writes out the recurrent operators of ``model`` in place, but for those that
    :func:`left_float` names, and those with a name, type or result in ``exclude``. The shapes of
    their operands must be in it."""
    shapes, constants = _shapes(model), _constants(model)
    taken = {*shapes, *constants}
    taken.update(name for node in model.graph.node for name in (node.name, *node.output))
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        named = not {node.name, node.op_type, *node.output}.isdisjoint(exclude)
        if _is_recurrent(node) and not named and _obstacle(node, shapes, constants) is None:
            written = _Written(node, shapes, constants, taken, _is_carried(model, node))
            nodes += written.nodes
            model.graph.initializer.extend(written.initialisers)
        else:
            nodes.append(node)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    Weights(model).drop_unused()


def left_float(model: onnx.ModelProto) -> dict[str, str]:
    """Why recurrent operators of ``model`` cannot be written out, one sentence each, by name."""
    shapes, constants = _shapes(model), _constants(model)
    reasons = {
        node.name or node.output[0]: _obstacle(node, shapes, constants)
        for node in model.graph.node
        if _is_recurrent(node)
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _is_carried(model: onnx.ModelProto, node: onnx.NodeProto) -> bool:
    """Whether the state that adds up comes from the model's inputs and goes to its outputs, and
    nothing on the way computes with it."""
    index = {"LSTM": 2, "GRU": 1}.get(node.op_type, 0)
    name = _operand(node, 4 + index)
    if not name or len(node.output) <= index or not node.output[index]:
        return False
    producer = {output: n for n in model.graph.node for output in n.output}
    while name in producer and producer[name].op_type in PASSING:
        name = producer[name].input[0]
    inside, ends = {node.output[index]}, {value.name for value in model.graph.output}
    for other in model.graph.node:
        if inside.intersection(other.input):
            if other.op_type not in PASSING:
                return False
            inside.update(other.output)
    return name in {value.name for value in model.graph.input} and bool(inside & ends)


def _is_recurrent(node: onnx.NodeProto) -> bool:
    return node.domain in ("", "ai.onnx") and node.op_type in GATES


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    return {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}


def _constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    constants = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and (value := attribute(node, "value", None)) is not None:
            constants[node.output[0]] = numpy_helper.to_array(value)
    return constants


def _obstacle(
    node: onnx.NodeProto,
    shapes: Mapping[str, tuple[int, ...]],
    constants: Mapping[str, np.ndarray],
) -> str | None:
    """Why a recurrent operator cannot be written out; None if it can."""
    shape = shapes.get(node.input[0], ())
    if len(shape) != 3 or 0 in shape:
        return "the shape of its input is not known"
    if attribute(node, "layout", 0):
        return "layout is 1, and must be 0"
    if attribute(node, "input_forget", 0):
        return "input_forget is 1, and must be 0"
    if shape[0] > MAX_STEPS:
        return f"its sequence has {shape[0]} steps; at most {MAX_STEPS} are written out"
    for index, what in ((1, "weights"), (2, "recurrent weights"), (3, "bias"), (7, "peepholes")):
        name = _operand(node, index)
        if name and (name not in constants or constants[name].dtype != np.float32):
            return f"its {what} are not a float32 constant"
    lengths = _operand(node, 4)
    if lengths and not (lengths in constants and (constants[lengths] == shape[0]).all()):
        return f"sequence_lens must be constant, and the whole length of {shape[0]}"
    for name in _functions(node):
        if name not in FUNCTIONS:
            return f"activation {name} is not one of {', '.join(FUNCTIONS)}"
    return None


def _operand(node: onnx.NodeProto, index: int) -> str:
    """The name of an input; empty if it is left out."""
    return node.input[index] if index < len(node.input) else ""


def _functions(node: onnx.NodeProto) -> list[str]:
    """The activation functions, those of the second direction behind those of the first."""
    names = [name.decode() for name in attribute(node, "activations", [])]
    if names:
        return names
    directions = 2 if attribute(node, "direction", b"forward") == b"bidirectional" else 1
    return DEFAULT_FUNCTIONS[node.op_type].split() * directions


@dataclass(frozen=True)
class _Direction:
    """What one direction of a recurrent operator is made of; weights by gate, as ONNX has them."""

    w: Mapping[str, np.ndarray]
    r: Mapping[str, np.ndarray]
    wb: Mapping[str, np.ndarray]
    rb: Mapping[str, np.ndarray]
    peepholes: Mapping[str, np.ndarray]
    functions: Sequence[str]
    backward: bool
    negated: bool
    """Whether the gate that keeps the old state is that which lets it go: 1 - s(x) = s(-x)."""


def _by_gate(rows: np.ndarray, gates: str, negated: str) -> dict[str, np.ndarray]:
    """The part of ``rows`` of each gate, that of the gate ``negated`` with its sign turned."""
    parts = np.split(rows, len(gates))
    return {g: -part if g == negated else part for g, part in zip(gates, parts, strict=True)}


class _Written:
    """The nodes and constants that stand for one recurrent operator.

    Values are matrices, a row for each sequence of the batch."""

    def __init__(
        self,
        node: onnx.NodeProto,
        shapes: Mapping[str, tuple[int, ...]],
        constants: Mapping[str, np.ndarray],
        taken: set[str],
        carried: bool,
    ):
        self.nodes: list[onnx.NodeProto] = []
        self.initialisers: list[onnx.TensorProto] = []
        self._node, self._constants = node, constants
        self._stem = node.name or node.output[0]
        self._carried = carried
        self._last = False  # whether the step at work is the last one
        self._rest: Value = np.zeros(0, np.float32)
        self._stored: dict[bytes, str] = {}
        self._taken = taken
        self._scope = self._stem
        self._clip = attribute(node, "clip", 0.0)
        self._steps, self._batch, self._width = shapes[node.input[0]]
        self._hidden = constants[node.input[2]].shape[2]
        step = {"LSTM": self._lstm_step, "GRU": self._gru_step, "RNN": self._rnn_step}
        self._step = step[node.op_type]
        self._summed = 1 if node.op_type == "LSTM" else 0  # of the states, the one that adds up
        directions = list(self._directions())
        first = [self._initial_state(5, len(directions)), self._initial_state(6, len(directions))]
        hidden, last = [], []
        for i, direction in enumerate(directions):
            results, state = self._run(direction, i, [values[i] for values in first])
            hidden.append(results)
            last.append(state)
        self._give(hidden, last)

    def _directions(self) -> Iterator[_Direction]:
        node, gates = self._node, GATES[self._node.op_type]
        w, r = (self._constants[node.input[i]] for i in (1, 2))
        functions = _functions(node)
        b = self._constants.get(_operand(node, 3), np.zeros((len(w), 2 * r.shape[1]), np.float32))
        p = self._constants.get(_operand(node, 7))
        kind = attribute(node, "direction", b"forward")
        each = len(functions) // len(w)

        for i in range(len(w)):
            both = functions[i * each : (i + 1) * each]
            gate = {"LSTM": "f", "GRU": "z"}.get(node.op_type, "") if both[0] == "Sigmoid" else ""
            b_x, b_h = np.split(b[i], 2)
            yield _Direction(
                w=_by_gate(w[i], gates, gate),
                r=_by_gate(r[i], gates, gate),
                wb=_by_gate(b_x, gates, gate),
                rb=_by_gate(b_h, gates, gate),
                peepholes={} if p is None else _by_gate(p[i], "iof", gate),
                functions=both,
                backward=kind == b"reverse" or i == 1,
                negated=bool(gate),
            )

    def _initial_state(self, index: int, directions: int) -> list[Value]:
        """The initial state of each direction."""
        name, shape = _operand(self._node, index), (self._batch, self._hidden)
        if not name:
            return [np.zeros(shape, np.float32)] * directions
        if name in self._constants:
            return [*self._constants[name]]
        parts = [name]
        if directions > 1:
            sizes = self._put(np.ones(directions, np.int64))
            parts = self._split(name, sizes, directions, f"initial{index}")
        return [self._reshape(part, shape, f"initial{index}") for part in parts]

    def _run(
        self, direction: _Direction, number: int, state: list[Value]
    ) -> tuple[list[Value], list[Value]]:
        """The hidden state at each step, in order of time, and the last state."""
        self._scope = f"{self._stem}/direction{number}"
        rows = (self._steps * self._batch, self._width)
        x = self._reshape(self._node.input[0], rows, "inputs")
        parts: dict[str, list[str]] = {}
        for gate in GATES[self._node.op_type]:
            operands: list[Value] = [x, direction.w[gate], self._input_bias(direction, gate)]
            whole = self._emit("Gemm", operands, f"{gate}_x_product", transB=1)
            parts[gate] = [whole]
            if self._steps > 1:
                sizes = self._put(np.full(self._steps, self._batch, np.int64))
                parts[gate] = self._split(whole, sizes, self._steps, f"{gate}_x")
        order = range(self._steps)
        hidden: dict[int, Value] = {}
        outer = self._scope
        self._rest = np.zeros((self._batch, self._hidden), np.float32)
        for n, t in enumerate(reversed(order) if direction.backward else order):
            self._scope = f"{outer}/step{t}/"
            if n == 0 and self._carried:
                summed = state[self._summed]
                self._rest = self._emit("Sub", [summed, summed], "initial_sub")
            self._last = n == self._steps - 1
            state = self._step(direction, {gate: part[t] for gate, part in parts.items()}, state)
            hidden[t] = state[0]
        self._scope = outer
        if self._carried:
            state[self._summed] = self._emit("Add", [state[self._summed], self._rest], "exact_add")
        return [hidden[t] for t in order], state

    def _input_bias(self, direction: _Direction, gate: str) -> np.ndarray:
        """The bias that is added to the inputs' product: both, but where the reset gate multiplies
        one of them."""
        resets = attribute(self._node, "linear_before_reset", 0) and gate == "h"
        both = np.zeros_like(direction.rb[gate]) if resets else direction.rb[gate]
        return direction.wb[gate] + both

    # Steps: the parts of the gates that come from the inputs, and the state, to the new state.

    def _lstm_step(
        self, direction: _Direction, x: Mapping[str, str], state: list[Value]
    ) -> list[Value]:
        h, c = state
        output_function = direction.functions[2]
        new = self._mul(
            self._gate(direction, "i", x, h, c), self._gate(direction, "c", x, h, c), "new"
        )
        if direction.negated:
            lost = self._mul(self._gate(direction, "f", x, h, c), c, "lost")
            cell = self._moved(c, self._sub(new, lost, "change"))
        else:
            kept = self._mul(self._gate(direction, "f", x, h, c), c, "kept")
            cell = self._add(kept, new, "state")
        output = self._gate(direction, "o", x, h, cell)
        return [self._mul(output, self._function(output_function, cell, "cell"), "hidden"), cell]

    def _gru_step(
        self, direction: _Direction, x: Mapping[str, str], state: list[Value]
    ) -> list[Value]:
        h = state[0]
        reset, update = (self._gate(direction, name, x, h) for name in "rz")
        if attribute(self._node, "linear_before_reset", 0):
            product = self._gemm(h, direction.r["h"], direction.rb["h"], "h_h")
            part = self._mul(reset, product, "h_r")
        else:
            part = self._gemm(self._mul(reset, h, "h_r"), direction.r["h"], None, "h_h")
        new = self._function(direction.functions[1], self._add(x["h"], part, "h"), "h")
        # (1 - z) new + z h, where a negated gate is 1 - z
        change = self._mul(update, self._sub(new, h, "difference"), "change")
        if direction.negated:
            return [self._moved(h, change), state[1]]
        return [self._sub(new, change, "state"), state[1]]

    def _gate(
        self,
        direction: _Direction,
        name: str,
        x: Mapping[str, str],
        h: Value,
        cell: Value | None = None,
    ) -> Value:
        """A gate's value; ``cell``: what its peephole sees."""
        total = self._add(x[name], self._gemm(h, direction.r[name], None, f"{name}_h"), name)
        if name in direction.peepholes and cell is not None:
            peephole = direction.peepholes[name].reshape(1, -1)
            total = self._add(total, self._mul(cell, peephole, f"{name}_c"), f"{name}_sum")
        return self._function(direction.functions[1 if name == "c" else 0], total, name)

    def _moved(self, state: Value, change: Value) -> Value:
        """The state after a change, and the rest that it leaves to the next step."""
        total = self._add(change, self._rest, "total")
        result = self._add(state, total, "state")
        if result is not total and (self._carried or not self._last):
            self._rest = self._sub(total, self._sub(result, state, "moved"), "rest")
        return result

    def _rnn_step(
        self, direction: _Direction, x: Mapping[str, str], state: list[Value]
    ) -> list[Value]:
        total = self._add(x["h"], self._gemm(state[0], direction.r["h"], None, "h_h"), "h")
        return [self._function(direction.functions[0], total, "h"), state[1]]

    # Results

    def _give(self, hidden: list[list[Value]], last: list[list[Value]]) -> None:
        """The operator's outputs: all hidden states, the last one, the last cell state."""
        self._scope = self._stem
        steps, batch, width, directions = self._steps, self._batch, self._hidden, len(hidden)
        outputs = [*self._node.output, "", "", ""]
        if outputs[0]:
            rows = [self._concat(list(parts), 1, "both") for parts in zip(*hidden, strict=True)]
            value = self._concat(rows, 0, "sequence")
            if directions == 1:
                self._reshape(value, (steps, 1, batch, width), output=outputs[0])
            else:
                value = self._reshape(value, (steps, batch, directions, width), "sequence")
                self._emit("Transpose", [value], output=outputs[0], perm=[0, 2, 1, 3])
        for i, output in enumerate(outputs[1:3]):
            if output:
                value = self._concat([state[i] for state in last], 0, "last")
                self._reshape(value, (directions, batch, width), output=output)

    # Operators; what is known is computed.

    def _add(self, a: Value, b: Value, role: str) -> Value:
        return self._pointwise("Add", np.add, a, b, role)

    def _sub(self, a: Value, b: Value, role: str) -> Value:
        return self._pointwise("Sub", np.subtract, a, b, role)

    def _mul(self, a: Value, b: Value, role: str) -> Value:
        for value in (a, b):
            if isinstance(value, np.ndarray) and not value.any():
                return np.zeros((self._batch, self._hidden), np.float32)
        return self._pointwise("Mul", np.multiply, a, b, role)

    def _pointwise(
        self,
        op_type: str,
        compute: Callable[[np.ndarray, np.ndarray], np.ndarray],
        a: Value,
        b: Value,
        role: str,
    ) -> Value:
        if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
            return compute(a, b)
        if isinstance(b, np.ndarray) and not b.any():  # of a product both are named, or known
            return a
        if isinstance(a, np.ndarray) and not a.any() and op_type == "Add":
            return b
        return self._emit(op_type, [a, b], f"{role}_{op_type.lower()}")

    def _gemm(self, x: Value, weights: np.ndarray, bias: np.ndarray | None, role: str) -> Value:
        """Rows of ``x`` by the transpose of ``weights``, plus ``bias``."""
        if isinstance(x, np.ndarray):
            product = (x.astype(np.float64) @ weights.T.astype(np.float64)).astype(np.float32)
            return product if bias is None else product + bias
        operands: list[Value] = [x, weights, *([] if bias is None else [bias])]
        return self._emit("Gemm", operands, f"{role}_product", transB=1)

    def _function(self, name: str, x: Value, role: str) -> Value:
        if self._clip > 0 and role != "cell":
            limit = np.array(self._clip, np.float32)
            x = self._emit("Clip", [x, -limit, limit], f"{role}_clip")
        return self._emit(name, [x], f"{role}_{name.lower()}")

    def _split(self, x: str, sizes: str, count: int, role: str) -> list[str]:
        names = [self._unused(f"{role}_{i}") for i in range(count)]
        self.nodes.append(helper.make_node("Split", [x, sizes], names, f"{names[0]}/split", axis=0))
        return names

    def _concat(self, values: list[Value], axis: int, role: str) -> Value:
        if len(values) == 1:
            return values[0]
        return self._emit("Concat", values, role, axis=axis)

    def _reshape(self, x: Value, shape: tuple[int, ...], role: str = "", output: str = "") -> str:
        return self._emit("Reshape", [x, np.array(shape, np.int64)], role, output)

    def _emit(
        self, op_type: str, operands: list[Value], role: str = "", output: str = "", **attributes
    ) -> str:
        """Adds a node; returns the name of its result."""
        result = output or self._unused(role)
        names = [v if isinstance(v, str) else self._put(v) for v in operands]
        node_name = f"{self._scope}/{result}" if output else result
        self.nodes.append(helper.make_node(op_type, names, [result], node_name, **attributes))
        return result

    def _put(self, array: np.ndarray) -> str:
        """The name of a constant; equal ones are one."""
        key = array.tobytes() + repr((array.dtype, array.shape)).encode()
        if key not in self._stored:
            self._stored[key] = self._unused(f"constant{len(self._stored)}", self._stem)
            self.initialisers.append(numpy_helper.from_array(array, self._stored[key]))
        return self._stored[key]

    def _unused(self, role: str, scope: str = "") -> str:
        """A name for a new value, made unique from what it is."""
        name = f"{(scope or self._scope).rstrip('/')}/{role}"
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name
