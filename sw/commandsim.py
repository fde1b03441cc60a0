"""The command-level simulator: executes the very DRAM image that the RTL executes, command by command
in program order, with numpy, and refuses programs whose result depends on timing.

:func:`run_program` runs one program; :class:`CommandDevice` is the same behind the CSRs. What the
hardware would report as a fault is a :class:`HardwareFault`; what it could not notice (races, missing
tokens, uninitialised or out-of-range words, a command that reads its own results) is a
:class:`~sw.races.CommandError` naming command and field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace

import numpy as np

from isa import (
    COMMANDS,
    CSRS,
    DEVICE_ID,
    VERSION,
    Config,
    Control,
    Csr,
    Engine,
    Fault,
    Irq,
    LoadTarget,
    Opcode,
    PostOp,
    PostSource,
    Status,
    WindowOp,
    decode,
)
from isa.assembler import format_command
from isa.params import PARAM_BYTES, REQUANT_PARAMS
from sw import numerics
from sw.device import Device, DeviceError
from sw.races import Box, CommandError, Memory, Tracker, progressions, span

NO_ENGINE = 15
"""FAULT_ENGINE of the fetch unit."""

EXACT_DEPTH = 1024
"""Products of int8 whose sum float32 holds exactly, in any order: 2^14 each, 2^24 in all."""

OUTPUT_CHUNK = 2048
"""Outputs multiplied at a time: bounds the gathered activations to 8 MiB."""

OUTSIDE = 1 << 48
"""Offset that marks a row or column outside the input; beyond every word."""

_WINDOW_COUNTS = ("out_w", "out_h", "kernel_w", "kernel_h")
_WINDOW_COUNTS += ("stride_x", "stride_y", "dilation_x", "dilation_y")
_AT_LEAST_1 = {
    Opcode.END: (),
    Opcode.LOAD: ("count0", "count1", "count2"),
    Opcode.STORE: ("count0", "count1", "count2"),
    Opcode.CONV: ("blocks", *_WINDOW_COUNTS),
    Opcode.POST: ("groups", "out_w", "out_h"),
    Opcode.WINDOW: ("blocks", *_WINDOW_COUNTS),
}

OnCommand = Callable[[int, Mapping[str, int], "Machine"], None]
"""Called after every command with its index, its fields and the machine."""


class HardwareFault(Exception):
    """The hardware would stop with this fault; the attributes are the FAULT_* registers."""

    def __init__(self, code: Fault, index: int, engine: int, address: int = 0):
        self.code = code
        self.index = index
        self.engine = engine
        self.address = address
        super().__init__(f"{code.name} at command {index}, DRAM window byte {address:#x}")


class Illegal(CommandError):
    """A field whose value the command set does not allow, or that leads outside a memory."""


class IllegalRead(CommandError):
    """A command reads, after writing it, a word of its own results: engines do not wait for that."""


class Machine:
    """The internal memories, which keep their content from one program to the next."""

    def __init__(self, config: Config):
        self.config = config
        # One word more than there are: what inputs outside the tensor read.
        self._lanes = np.zeros((config.scratchpad_words + 1, config.rows), np.int8)
        self.scratchpad = self._lanes[:-1]
        self.weights = np.zeros((config.weight_words, config.cols), np.int8)
        self.accumulators = np.zeros((config.acc_words, config.cols), np.int32)
        self.ended = 0
        """Commands ended in the last run, END not counted."""

    def run(
        self,
        memory: np.ndarray,
        program_offset: int,
        words: int,
        *,
        check_races: bool = True,
        on_command: OnCommand | None = None,
    ) -> int:
        """Run the ``words`` 64-bit words at byte ``program_offset`` of the DRAM window ``memory``
        (uint8, changed in place); returns the number of commands ended.

        Raises :class:`HardwareFault` and :class:`~sw.races.CommandError`."""
        self.ended = 0
        program = _Run(self, memory, program_offset, words, check_races)
        while (c := program.next()) is not None:
            program.execute(c)
            self.ended += 1
            if on_command is not None:
                on_command(program.index, vars(c), self)
        return self.ended


class _Run:
    """One run: the program, its position, and the commands' semantics."""

    def __init__(
        self,
        machine: Machine,
        memory: np.ndarray,
        program_offset: int,
        words: int,
        check_races: bool,
    ):
        self.machine = machine
        self.config = machine.config
        self.memory = memory
        inside = max(0, min(words, (len(memory) - program_offset) // 8))
        self.words: list[int] = (
            memory[program_offset : program_offset + 8 * inside].view("<u8").tolist()
        )
        self.truncated = inside < words
        self.program = program_offset, program_offset + 8 * words
        self.at = 0
        self.index = -1
        self.starts: list[int] = []  # First word of each command.
        self.tracker = Tracker(self.config, len(memory), self.describe, check_races)
        self.engine = Engine(0)

    # Program -----------------------------------------------------------------------------------------

    def describe(self, index: int) -> str:
        return format_command(decode(self.words, self.starts[index])[0])

    def fault(self, code: Fault, engine: int = NO_ENGINE, address: int = 0) -> HardwareFault:
        return HardwareFault(code, self.index, engine, address)

    def illegal(self, field: str, message: str) -> Illegal:
        return Illegal(self.index, self.describe(self.index), message, field)

    def next(self) -> SimpleNamespace | None:
        """The next command's fields, ``None`` at END."""
        self.index += 1
        self.starts.append(self.at)
        opcode = self.words[self.at] & 0xF if self.at < len(self.words) else None
        if opcode is not None and opcode not in COMMANDS:
            raise self.fault(Fault.ILLEGAL_COMMAND)
        length = 1 if opcode is None else COMMANDS[Opcode(opcode)].words
        if self.at + length > len(self.words):
            if self.truncated:
                address = self.program[0] + 8 * len(self.words)
                raise self.fault(Fault.DRAM_WINDOW, address=address)
            raise self.fault(Fault.ILLEGAL_COMMAND)
        if opcode == Opcode.END:
            return None
        command = COMMANDS[Opcode(opcode)]
        self._check_header(command.engines)
        try:
            fields, self.at = decode(self.words, self.at)
        except ValueError as e:
            raise Illegal(self.index, command.name, str(e)) from None
        c = SimpleNamespace(**fields)
        for name in _AT_LEAST_1[c.opcode]:
            if fields[name] < 1:
                raise self.illegal(name, "must be at least 1")
        return c

    def _check_header(self, engines: tuple[Engine, ...]) -> None:
        """What the fetch unit checks."""
        head = self.words[self.at]
        existing = [e for e in Engine if e is not Engine.WINDOW or self.config.window]
        mask = sum(1 << e for e in existing)
        takers = [e for e in engines if e in existing]
        if (head >> 4 & 0xF) not in takers or (head >> 8 | head >> 16) & 0xFF & ~mask:
            raise self.fault(Fault.ILLEGAL_COMMAND)

    def execute(self, c: SimpleNamespace) -> None:
        """Take the tokens, do it, give the tokens."""
        self.engine = c.engine
        self.tracker.begin(self.index, c.engine, c.wait)
        if c.opcode == Opcode.LOAD:
            self._load(c)
        elif c.opcode == Opcode.STORE:
            self._store(c)
        elif c.opcode == Opcode.CONV:
            self._conv(c)
        elif c.opcode == Opcode.POST:
            self._post(c)
        elif c.op == WindowOp.IM2COL:
            self._im2col(c)
        else:
            self._window(c)
        self.tracker.end(c.signal)

    # Accesses ----------------------------------------------------------------------------------------

    def _within(self, memory: Memory, box: Box, field: str) -> None:
        size = {
            Memory.SCRATCHPAD: self.config.scratchpad_words,
            Memory.WEIGHTS: self.config.weight_words,
            Memory.ACCUMULATORS: self.config.acc_words,
        }[memory]
        if box.last >= size:
            raise self.illegal(
                field, f"leads to {memory.value} {box.last}; the configuration has {size}"
            )

    def _read(self, memory: Memory, box: Box, field: str) -> None:
        self._within(memory, box, field)
        self.tracker.read(memory, box, field)

    def _write(self, memory: Memory, box: Box, field: str) -> None:
        self._within(memory, box, field)
        self.tracker.write(memory, box, field)

    def _use_accumulators(self, first: int, count: int) -> None:
        half = self.config.acc_half
        low, high = first // half, (first + count - 1) // half
        self.tracker.write(Memory.HALVES, span(low, high - low + 1), "acc")

    def _check_own_results(self, reads: np.ndarray, writes: np.ndarray, field: str) -> None:
        """Iteration i (the last axes, flattened) reads ``reads[..., i]`` and then writes ``writes[i]``:
        refuses reads of what an earlier iteration wrote."""
        if reads.max() < writes.min() or reads.min() > writes.max():
            return
        written, first = np.unique(writes.ravel(), return_index=True)
        reads = reads.reshape(-1, writes.size)
        place = np.minimum(np.searchsorted(written, reads), len(written) - 1)
        bad = (written[place] == reads) & (first[place] < np.arange(writes.size))
        if bad.any():
            raise IllegalRead(
                self.index, self.describe(self.index), "reads words the command wrote before", field
            )

    def _check_constants(self, first: int, count: int, writes: np.ndarray, field: str) -> None:
        """Refuses parameters and weights that the command overwrites."""
        if ((writes >= first) & (writes < first + count)).any():
            raise IllegalRead(
                self.index, self.describe(self.index), "the command overwrites them", field
            )

    def _parameters(self, first: int, words: int, sets: int, channels: int) -> list[np.ndarray]:
        """``isa.REQUANT_PARAMS`` as arrays (sets, channels), each set ``words`` words."""
        self._read(Memory.SCRATCHPAD, span(first, sets * words), "params")
        data = self.machine.scratchpad[first : first + sets * words].reshape(sets, -1)
        raw = np.ascontiguousarray(data[:, : PARAM_BYTES * channels]).view("<i8")
        out, low = [], 0
        for f in REQUANT_PARAMS:
            # Shifted to the top and back: sign-extended, or not.
            top = raw << (64 - low - f.bits)
            out.append(
                top >> (64 - f.bits)
                if f.signed
                else (top.view(np.uint64) >> np.uint64(64 - f.bits)).astype(np.int64)
            )
            low += f.bits
        return out

    # Transfers ---------------------------------------------------------------------------------------

    def _transfer(self, c: SimpleNamespace, vector: int) -> tuple[np.ndarray, np.ndarray, Box, Box]:
        """Vectors in DRAM (units of ``vector`` bytes) and local words in the order of the transfer;
        the boxes of both."""
        for name, used in (("dram", True), ("dram1", c.count1 > 1), ("dram2", c.count2 > 1)):
            if used and getattr(c, name) % vector:
                raise self.illegal(name, f"{getattr(c, name)} is not a multiple of {vector}")
        counts = (c.count2, c.count1, c.count0)
        group, run, i = (np.arange(n, dtype=np.int64) for n in counts)
        starts = (c.dram + group[:, None] * c.dram2 + run * c.dram1).ravel()
        bytes_per_run = c.count0 * vector
        outside = starts + bytes_per_run > len(self.memory)
        if outside.any():
            address = min(int(starts[outside.argmax()]), 0xFFFF_FFFF)
            raise self.fault(Fault.DRAM_WINDOW, self.engine, address)
        if c.opcode == Opcode.STORE:
            low, high = self.program
            if ((starts < high) & (starts + bytes_per_run > low)).any():
                raise self.illegal("dram", "writes into the program that is being run")
        unit = self.tracker.dram_unit
        dram_box = Box(
            c.dram // unit,
            (c.count2, c.count1, bytes_per_run // unit),
            (c.dram2 // unit, c.dram1 // unit, 1),
        )
        local_box = Box(c.local, counts, (c.local2, c.local1, 1))
        vectors = (starts[:, None] // vector + i).ravel()
        local = (c.local + group[:, None, None] * c.local2 + run[:, None] * c.local1 + i).ravel()
        return vectors, local, dram_box, local_box

    def _vectors(self, vector: int) -> np.ndarray:
        """The DRAM window as vectors."""
        whole = len(self.memory) // vector * vector
        return self.memory[:whole].reshape(-1, vector)

    def _load(self, c: SimpleNamespace) -> None:
        if c.target == LoadTarget.WEIGHTS:
            vector, memory, words = (
                self.config.weight_vector_bytes,
                Memory.WEIGHTS,
                self.machine.weights,
            )
        else:
            vector, memory, words = (
                self.config.vector_bytes,
                Memory.SCRATCHPAD,
                self.machine.scratchpad,
            )
        vectors, local, dram_box, local_box = self._transfer(c, vector)
        self.tracker.read(Memory.DRAM, dram_box, "dram")
        self._write(memory, local_box, "local")
        words[local] = self._vectors(vector)[vectors][:, : words.shape[1]].view(np.int8)

    def _store(self, c: SimpleNamespace) -> None:
        vector, rows = self.config.vector_bytes, self.config.rows
        vectors, local, dram_box, local_box = self._transfer(c, vector)
        self._read(Memory.SCRATCHPAD, local_box, "local")
        self.tracker.write(Memory.DRAM, dram_box, "dram")
        data = np.zeros((len(local), vector), np.uint8)
        data[:, :rows] = self.machine.scratchpad[local].view(np.uint8)
        self._vectors(vector)[vectors] = data

    # Windows -----------------------------------------------------------------------------------------

    def _axes(self, c: SimpleNamespace, run: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Input rows (kernel_h, out_h) and columns (kernel_w, out_w, run) of every tap and output;
        -1 outside the input."""
        oy, ky = np.arange(c.out_h), np.arange(c.kernel_h)
        ox, kx = np.arange(c.out_w), np.arange(c.kernel_w)
        y = c.y0 + oy * c.stride_y + ky[:, None] * c.dilation_y
        x = c.x0 + ox[:, None] * c.stride_x + kx[:, None, None] * c.dilation_x + np.arange(run)
        return np.where((y >= 0) & (y < c.in_h), y, -1), np.where((x >= 0) & (x < c.in_w), x, -1)

    def _read_input(self, c: SimpleNamespace, y: np.ndarray, x: np.ndarray) -> None:
        """Checks the reads of the words in columns ``x`` of rows ``y`` (-1: none) of all blocks."""
        rows = progressions(np.unique(y[y >= 0]))
        columns = progressions(np.unique(x[x >= 0]))
        for y_first, y_count, y_step in rows:
            for x_first, x_count, x_step in columns:
                box = Box(
                    c.src + y_first * c.src_pitch + x_first,
                    (c.blocks, y_count, x_count),
                    (c.src_block, y_step * c.src_pitch, x_step),
                )
                self._read(Memory.SCRATCHPAD, box, "src")

    def _offsets(self, c: SimpleNamespace) -> tuple[np.ndarray, np.ndarray]:
        """Checks the input's reads; word offsets by row (kernel_h, out_h) and column (kernel_w, out_w),
        OUTSIDE where the tap is."""
        y, x = self._axes(c)
        self._read_input(c, y, x)
        x = x[:, :, 0]
        return np.where(y >= 0, y * c.src_pitch, OUTSIDE), np.where(x >= 0, x, OUTSIDE)

    def _outputs(self, c: SimpleNamespace, blocks: int) -> np.ndarray:
        """Checks the writes of ``out``; its words (blocks, out_h, out_w)."""
        box = Box(c.out, (blocks, c.out_h, c.out_w), (c.out_block, c.out_pitch, 1))
        self._write(Memory.SCRATCHPAD, box, "out")
        return _grid(c.out, c.out_block, c.out_pitch, np.arange(blocks), c)

    def _conv(self, c: SimpleNamespace) -> None:
        rows, pad_word = self.config.rows, self.config.scratchpad_words
        outputs = c.out_h * c.out_w
        taps = c.kernel_h * c.kernel_w
        tiles = c.blocks * taps
        self._within(Memory.ACCUMULATORS, span(c.acc, outputs), "acc")
        self._read(Memory.WEIGHTS, span(c.weights, tiles * rows), "weights")
        row, column = self._offsets(c)
        if c.accumulate:
            self._read(Memory.ACCUMULATORS, span(c.acc, outputs), "acc")
        self._write(Memory.ACCUMULATORS, span(c.acc, outputs), "acc")
        self._use_accumulators(c.acc, outputs)

        self.machine._lanes[pad_word] = c.pad
        acc = self.machine.accumulators[c.acc : c.acc + outputs]
        if not c.accumulate:
            acc[:] = 0
        row, column = row.T, column.T
        for tile in range(0, tiles, EXACT_DEPTH // rows):
            t = np.arange(tile, min(tile + EXACT_DEPTH // rows, tiles))
            block, ky, kx = t // taps, t // c.kernel_w % c.kernel_h, t % c.kernel_w
            first = c.weights + tile * rows
            w = self.machine.weights[first : first + len(t) * rows].astype(np.float32)
            for o in range(0, outputs, OUTPUT_CHUNK):
                oy, ox = np.divmod(np.arange(o, min(o + OUTPUT_CHUNK, outputs)), c.out_w)
                word = row[oy][:, ky] + column[ox][:, kx]
                word += c.src + block * c.src_block
                x = self.machine._lanes[np.minimum(word, pad_word)]
                sums = x.reshape(len(oy), -1).astype(np.float32) @ w
                acc[o : o + len(oy)] += sums.astype(np.int32)

    def _window(self, c: SimpleNamespace) -> None:
        rows, pad_word = self.config.rows, self.config.scratchpad_words
        row, column = self._offsets(c)
        block = np.arange(c.blocks)
        taps = c.kernel_h * c.kernel_w
        if c.op != WindowOp.MAX:
            words = self.config.window_param_words
            parameters = self._parameters(c.params, words, c.blocks, rows)
        if c.op == WindowOp.DEPTHWISE:
            box = span(c.weights, c.blocks * taps)
            self._read(Memory.SCRATCHPAD, box, "weights")
            w = self.machine.scratchpad[c.weights : c.weights + c.blocks * taps]
            w = w.reshape(c.blocks, taps, 1, 1, rows).astype(np.int32)
        out = self._outputs(c, c.blocks)
        if c.op != WindowOp.MAX:
            self._check_constants(c.params, words * c.blocks, out, "params")
        if c.op == WindowOp.DEPTHWISE:
            self._check_constants(c.weights, taps * c.blocks, out, "weights")

        self.machine._lanes[pad_word] = c.pad
        result = np.full((*out.shape, rows), -128 if c.op == WindowOp.MAX else 0, np.int32)
        for tap in range(taps):
            ky, kx = divmod(tap, c.kernel_w)
            word = row[ky][:, None] + column[kx] + (c.src + block * c.src_block)[:, None, None]
            word = np.minimum(word, pad_word)
            self._check_own_results(word, out, "src")
            x = self.machine._lanes[word].astype(np.int32)
            if c.op == WindowOp.MAX:
                np.maximum(result, x, out=result)
            else:
                result += x * w[:, tap] if c.op == WindowOp.DEPTHWISE else x
        if c.op == WindowOp.MAX:
            values = np.clip(result, c.low, c.high)
        else:
            each = (p[:, None, None, :] for p in parameters)
            values = numerics.requantise(result, *each, c.zero, c.low, c.high)
        self.machine.scratchpad[out] = values

    def _im2col(self, c: SimpleNamespace) -> None:
        rows = self.config.rows
        if c.blocks != 1:
            raise self.illegal("blocks", "must be 1 for IM2COL")
        if c.run < 1:
            raise self.illegal("run", "must be at least 1 for IM2COL")
        y, x = self._axes(c, c.run)
        # -1 // rows is -1: outside stays outside.
        self._read_input(c, y, x // rows)
        depth = c.kernel_h * c.kernel_w * c.run
        words = -(-depth // rows)
        out = self._outputs(c, words)

        pad_byte = self.config.scratchpad_words * rows
        self.machine._lanes[-1] = c.pad
        row = np.where(y >= 0, (c.src + y * c.src_pitch) * rows, OUTSIDE)
        column = np.where(x >= 0, x, OUTSIDE)
        # (out_h, out_w, kernel_h, kernel_w, run)
        byte = row.T[:, None, :, None, None] + column.transpose(1, 0, 2)[None, :, None, :, :]
        byte = np.minimum(byte, pad_byte).reshape(c.out_h * c.out_w, depth)
        # Every output's reads precede all its words' writes.
        for t in range(words):
            self._check_own_results(byte.T // rows, out[t], "src")
        data = np.full((len(byte), words * rows), c.pad, np.int8)
        data[:, :depth] = self.machine._lanes.reshape(-1)[byte]
        data = data.reshape(c.out_h, c.out_w, words, rows)
        self.machine.scratchpad[out] = data.transpose(2, 0, 1, 3)

    # Post-processing ---------------------------------------------------------------------------------

    def _post(self, c: SimpleNamespace) -> None:
        config, machine = self.config, self.machine
        per_word = config.rows // config.lanes
        if c.lane >= per_word:
            raise self.illegal("lane", f"{c.lane}: a word has {per_word} groups")
        block, position = np.divmod(c.lane + np.arange(c.groups), per_word)
        blocks = int(block[-1]) + 1
        position = position[:, None, None]

        def place(start: int, step: int, pitch: int) -> np.ndarray:
            """Groups of a tensor (groups, out_h, out_w), counted through the scratchpad."""
            return _grid(start, step, pitch, block, c) * per_word + position

        def operand(name: str) -> np.ndarray:
            """Where an operand's groups are; checks that they may be read."""
            start, pitch, step = (getattr(c, name + end) for end in ("", "_pitch", "_block"))
            box = Box(start, (blocks, c.out_h, c.out_w), (step, pitch, 1))
            self._read(Memory.SCRATCHPAD, box, name)
            return place(start, step, pitch)

        sources = {}
        if c.source == PostSource.SCRATCHPAD:
            sources["a"] = operand("a")
        else:
            parameters, acc = self._accumulators(c)
        if c.op == PostOp.ADD:
            if c.shift < 1:
                raise self.illegal("shift", "must be at least 1 for ADD")
            sources["b"] = operand("b")
        out = place(c.out, c.out_block, c.out_pitch)
        self._outputs(c, blocks)
        for name, words in sources.items():
            self._check_own_results(words, out, name)

        groups = machine.scratchpad.reshape(-1, config.lanes)
        if c.source == PostSource.SCRATCHPAD:
            a = groups[sources["a"]]
        else:
            words = c.groups * config.param_words
            self._check_constants(c.params, words, out // per_word, "params")
            each = (p[:, None, :] for p in parameters)
            a = numerics.requantise(acc, *each, c.zero, c.low, c.high)
            a = a.reshape(*out.shape, config.lanes)
        if c.op == PostOp.ADD:
            b = groups[sources["b"]]
            a = numerics.add(a, b, c.za, c.zb, c.zo, c.ma, c.mb, c.shift, c.low2, c.high2)
        groups[out] = a

    def _accumulators(self, c: SimpleNamespace) -> tuple[list[np.ndarray], np.ndarray]:
        """POST's parameters (groups, lanes) each, and its accumulators (groups, outputs, lanes)."""
        config = self.config
        if c.groups > config.groups:
            raise self.illegal(
                "groups", f"{c.groups}: an accumulator word has {config.groups} groups"
            )
        outputs = c.out_h * c.out_w
        self._read(Memory.ACCUMULATORS, span(c.acc, outputs), "acc")
        self._use_accumulators(c.acc, outputs)
        parameters = self._parameters(c.params, config.param_words, c.groups, config.lanes)
        acc = self.machine.accumulators[c.acc : c.acc + outputs]
        acc = acc.reshape(outputs, config.groups, config.lanes)[:, : c.groups]
        return parameters, acc.transpose(1, 0, 2)


def _grid(start: int, step: int, pitch: int, block: np.ndarray, c: SimpleNamespace) -> np.ndarray:
    """Words (block, out_h, out_w) of a tensor."""
    row = np.arange(c.out_h)[:, None] * pitch
    return start + block[:, None, None] * step + row + np.arange(c.out_w)


def run_program(
    config: Config,
    memory: np.ndarray,
    program_offset: int,
    words: int,
    *,
    check_races: bool = True,
    on_command: OnCommand | None = None,
) -> int:
    """Run a program on a fresh machine, see :meth:`Machine.run`."""
    return Machine(config).run(
        memory, program_offset, words, check_races=check_races, on_command=on_command
    )


class CommandDevice(Device):
    """The command-level simulator as a device. Programs take no time: the counters of cycles, beats
    and trace events read 0.

    A program runs in ``wait_interrupt``, which raises :class:`~sw.races.CommandError` for what the
    hardware could not report; the device is then BUSY until a soft reset.
    """

    def __init__(self, config: Config, memory_bytes: int = 64 << 20, *, check_races: bool = True):
        self.config = config
        self.memory_bytes = memory_bytes
        self.check_races = check_races
        self.memory = np.zeros(memory_bytes, np.uint8)
        self.machine = Machine(config)
        self._registers = dict.fromkeys(CSRS, 0)
        self._registers.update(ID=DEVICE_ID, VERSION=VERSION, CONFIG_HASH=config.hash)
        self._registers["FAULT_ENGINE"] = NO_ENGINE
        self._names = {csr.offset: csr for csr in CSRS.values()}
        self._started = False

    def write_memory(self, addr: int, data: bytes) -> None:
        self.check_range(addr, len(data))
        self.memory[addr : addr + len(data)] = np.frombuffer(data, np.uint8)

    def read_memory(self, addr: int, n: int) -> bytes:
        self.check_range(addr, n)
        return self.memory[addr : addr + n].tobytes()

    def _csr(self, offset: int) -> Csr:
        if offset not in self._names:
            raise DeviceError(f"no register at byte {offset:#x}")
        return self._names[offset]

    def read_csr(self, offset: int) -> int:
        return self._registers[self._csr(offset).name]

    def write_csr(self, offset: int, value: int) -> None:
        csr, registers = self._csr(offset), self._registers
        if csr.access == "w1c":
            registers[csr.name] &= ~value
        elif csr.name == "CONTROL":
            registers["CONTROL"] = value & (Control.TRACE | Control.IRQ_ENABLE)
            if value & Control.SOFT_RESET:
                registers.update(STATUS=0, FAULT_CODE=0, FAULT_INDEX=0, FAULT_ADDRESS=0)
                registers["FAULT_ENGINE"] = NO_ENGINE
                self._started = False
            elif value & Control.START and not registers["STATUS"] & (Status.BUSY | Status.FAULT):
                registers.update(STATUS=int(Status.BUSY), COMMANDS=0)
                self._started = True
        elif csr.access == "rw":
            aligned = {"DRAM_BASE_LO": 4096, "PROGRAM": 64, "TRACE_ADDR": 64}.get(csr.name, 1)
            registers[csr.name] = value & -aligned

    def wait_interrupt(self, timeout_cycles: int) -> bool:
        if self._started:
            self._started = False
            self._run()
        return bool(self._registers["IRQ"] and self._registers["CONTROL"] & Control.IRQ_ENABLE)

    def _run(self) -> None:
        registers = self._registers
        base = registers["DRAM_BASE_HI"] << 32 | registers["DRAM_BASE_LO"]
        limit = registers["DRAM_LIMIT"]
        if base + limit > self.memory_bytes:
            raise DeviceError(
                f"a DRAM window of {limit} bytes at {base:#x} exceeds the device's "
                f"{self.memory_bytes} bytes of memory"
            )
        try:
            self.machine.run(
                self.memory[base : base + limit],
                registers["PROGRAM"],
                registers["PROGRAM_WORDS"],
                check_races=self.check_races,
            )
        except HardwareFault as fault:
            registers.update(
                STATUS=int(Status.FAULT),
                FAULT_CODE=int(fault.code),
                FAULT_INDEX=fault.index,
                FAULT_ENGINE=int(fault.engine),
                FAULT_ADDRESS=fault.address,
            )
            registers["IRQ"] |= Irq.FAULT
        else:
            registers["STATUS"] = int(Status.DONE)
            registers["IRQ"] |= Irq.DONE
        registers["COMMANDS"] = self.machine.ended
