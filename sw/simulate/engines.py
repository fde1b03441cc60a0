"""The engines of the command-level simulator: every command's effect in numpy, with every access
checked."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np

from systole.isa import (
    Config,
    Fault,
    LoadTarget,
    Opcode,
    PostOp,
    PostSource,
    WindowOp,
    numerics,
)
from systole.isa.commands import ROW_OPS, TABLE_BYTES, Field
from systole.isa.limits import broken_limit
from systole.isa.params import (
    CHANNEL_FLAGS,
    EXP_ENTRY_BYTES,
    NORMALISE_PARAMS,
    PARAM_BYTES,
    REQUANT_PARAMS,
    ROW_PARAM_BYTES,
    SOFTMAX_PARAMS,
    unpack_signed,
)
from systole.isa.rows import EXP_BITS, NormaliseParameters, SoftmaxParameters, normalise, softmax
from systole.sw.runtime.driver import DEFAULT_WATCHDOG
from systole.sw.simulate.races import Box, CommandError, TrackedMemory, Tracker, progressions, span

EXACT_DEPTH = 1024
"""Number of products of int8 whose sum float32 holds exactly in any order: each is at most 2^14,
their sum 2^24."""

OUTPUT_CHUNK = 2048
"""Outputs multiplied at a time: bounds the gathered activations to 8 MiB."""

OUTSIDE = 1 << 48
"""Offset that marks a row or column outside the input; beyond every word."""


class IllegalField(Exception):  # noqa: N818
    """A command with a field that breaks a limit. ``field``: its name; ``refusal``: how it does."""

    def __init__(self, field: str, refusal: str):
        self.field = field
        self.refusal = refusal
        super().__init__(f"{field} {refusal}")


class OutsideMemory(CommandError):  # noqa: N818
    """A command that leads to a word that a memory does not have."""

    name = "OUTSIDE_MEMORY"


class ProgramWrite(CommandError):  # noqa: N818
    """A command that writes into the program that is being run."""

    name = "PROGRAM_WRITE"


class OwnResult(CommandError):  # noqa: N818
    """A command that reads words it writes itself."""

    name = "OWN_RESULT"


class TooLong(CommandError):  # noqa: N818
    """A command that takes longer than any watchdog should allow."""

    name = Fault.WATCHDOG.name


class OutsideWindow(Exception):  # noqa: N818
    """A transfer that leaves the DRAM window. ``address``: that of the first run that does."""

    def __init__(self, address: int):
        self.address = address
        super().__init__(f"transfer outside the DRAM window at byte {address:#x}")


class Memories:
    """The accelerator's internal memories."""

    def __init__(self, config: Config):
        self.lanes = np.zeros((config.scratchpad_words + 1, config.rows), np.int8)
        """The scratchpad and one word more, which inputs outside the tensor read."""
        self.scratchpad = self.lanes[:-1]
        self.weights = np.zeros((config.weight_words, config.cols), np.int8)
        self.accumulators = np.zeros((config.acc_words, config.cols), np.int32)


class Engines:
    """Executes commands on ``memories`` and ``dram`` (the DRAM window, uint8), and tells
    ``tracker`` every access. ``program``: the bytes of the window (from, to) that hold the
    program."""

    def __init__(
        self,
        config: Config,
        memories: Memories,
        dram: np.ndarray,
        tracker: Tracker,
        program: tuple[int, int],
    ):
        self.config = config
        self.memories = memories
        self.dram = dram
        self.tracker = tracker
        self.program = program
        self._sizes = {
            TrackedMemory.SCRATCHPAD: config.scratchpad_words,
            TrackedMemory.WEIGHTS: config.weight_words,
            TrackedMemory.ACCUMULATORS: config.acc_words,
        }

    def execute(self, c: SimpleNamespace) -> None:
        """Execute the command with fields ``c``, except for its tokens. The tracker has begun it.

        Raises :class:`IllegalField`, :class:`OutsideWindow` and
        :class:`~sw.simulate.races.CommandError`."""
        if broken := broken_limit(vars(c), self.config):
            raise IllegalField(*broken)
        self._check_time(c)
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
        elif c.op in ROW_OPS:
            self._row(c)
        else:
            self._window(c)

    def _check_time(self, c: SimpleNamespace) -> None:
        """Refuse what takes longer than a command may, by a bound on its cycles from below.

        A transfer that leaves the DRAM window ends there, however long it is."""
        if c.opcode in (Opcode.LOAD, Opcode.STORE):
            vector, _, _ = self._vector(c)
            self._check_window(c, vector)
            cycles = c.count0 * c.count1 * c.count2
        else:
            cycles = c.out_w * c.out_h
            taps = 1 if c.opcode == Opcode.POST else c.kernel_w * c.kernel_h
        if c.opcode == Opcode.POST:
            cycles *= c.groups
        elif c.opcode == Opcode.CONV:
            cycles *= c.blocks * taps
        elif c.opcode == Opcode.WINDOW and c.op == WindowOp.IM2COL:
            cycles *= taps * -(-c.run // self.config.rows)
        elif c.opcode == Opcode.WINDOW and c.op in ROW_OPS:
            cycles *= c.blocks
        elif c.opcode == Opcode.WINDOW:
            fast = max(c.kernel_w, c.kernel_h) <= self.config.window_kernel
            cycles *= c.blocks * (1 if fast else taps)
        if cycles > DEFAULT_WATCHDOG:
            raise self.tracker.error(
                TooLong,
                "",
                f"takes at least {cycles:,} cycles; a command may take {DEFAULT_WATCHDOG:,} at "
                "most (WATCHDOG)",
            )

    # Accesses -------------------------------------------------------------------------------------

    def _within(self, memory: TrackedMemory, box: Box, field: str) -> None:
        size = self._sizes[memory]
        if box.last >= size:
            raise self.tracker.error(
                OutsideMemory, field, f"leads to {memory.value} {box.last}; there are {size}"
            )

    def _read(self, memory: TrackedMemory, box: Box, field: str) -> None:
        self._within(memory, box, field)
        self.tracker.read(memory, box, field)

    def _write(self, memory: TrackedMemory, box: Box, field: str) -> None:
        self._within(memory, box, field)
        self.tracker.write(memory, box, field)

    def _use_accumulators(self, first: int, count: int) -> None:
        half = self.config.acc_half
        low, high = first // half, (first + count - 1) // half
        self.tracker.write(TrackedMemory.HALVES, span(low, high - low + 1), "acc")

    def _refuse_own_results(
        self, reads: np.ndarray, writes: np.ndarray, field: str, *, in_place: bool = False
    ) -> None:
        """Refuse a command that reads (by ``field``) words that it writes: whether before or after
        writing them is unknown.

        With ``in_place``, step i (the last axes, flattened) reads ``reads[..., i]`` and then writes
        ``writes[i]``; only reads of words that an earlier step wrote are refused."""
        if reads.max() < writes.min() or reads.min() > writes.max():
            return
        written, first = np.unique(writes.ravel(), return_index=True)
        reads = reads.reshape(-1, writes.size) if in_place else reads
        place = np.minimum(np.searchsorted(written, reads), len(written) - 1)
        bad = written[place] == reads
        if in_place:
            bad &= first[place] < np.arange(writes.size)
        if bad.any():
            raise self.tracker.error(OwnResult, field, "reads words that the command itself writes")

    def _parameters(self, first: int, words: int, sets: int, channels: int) -> list[np.ndarray]:
        """``isa.REQUANT_PARAMS`` as arrays (sets, channels), each set ``words`` words."""
        self._read(TrackedMemory.SCRATCHPAD, span(first, sets * words), "params")
        data = self.memories.scratchpad[first : first + sets * words].reshape(sets, -1)
        raw = np.ascontiguousarray(data[:, : PARAM_BYTES * channels]).view("<i8")
        return _unpacked(raw, REQUANT_PARAMS)

    # Transfers ------------------------------------------------------------------------------------

    def _vector(self, c: SimpleNamespace) -> tuple[int, TrackedMemory, np.ndarray]:
        """The bytes in DRAM of a word that a transfer moves, and the memory that it is of."""
        config, memories = self.config, self.memories
        if c.opcode == Opcode.LOAD and c.target == LoadTarget.WEIGHTS:
            return config.weight_vector_bytes, TrackedMemory.WEIGHTS, memories.weights
        return config.vector_bytes, TrackedMemory.SCRATCHPAD, memories.scratchpad

    def _check_window(self, c: SimpleNamespace, vector: int) -> None:
        """Refuse runs outside the DRAM window: the first in the order of the transfer."""
        room = len(self.dram) - c.count0 * vector - c.dram
        runs = (c.count1 - 1) * c.dram1
        if (c.count2 - 1) * c.dram2 + runs <= room:
            return
        group = 0 if runs > room else (room - runs) // c.dram2 + 1
        room -= group * c.dram2
        run = 0 if room < 0 else room // c.dram1 + 1
        raise OutsideWindow(min(c.dram + group * c.dram2 + run * c.dram1, 0xFFFF_FFFF))

    def _transfer(self, c: SimpleNamespace, vector: int) -> tuple[np.ndarray, np.ndarray, Box, Box]:
        """The vectors in DRAM (units of ``vector`` bytes) and the local words, both in the order of
        the transfer, and the boxes of both."""
        counts = (c.count2, c.count1, c.count0)
        group, run, i = (np.arange(n, dtype=np.int64) for n in counts)
        starts = (c.dram + group[:, None] * c.dram2 + run * c.dram1).ravel()
        bytes_per_run = c.count0 * vector
        if c.opcode == Opcode.STORE:
            low, high = self.program
            if ((starts < high) & (starts + bytes_per_run > low)).any():
                raise self.tracker.error(
                    ProgramWrite, "dram", "writes into the program that is being run"
                )
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
        whole = len(self.dram) // vector * vector
        return self.dram[:whole].reshape(-1, vector)

    def _load(self, c: SimpleNamespace) -> None:
        vector, memory, words = self._vector(c)
        vectors, local, dram_box, local_box = self._transfer(c, vector)
        self.tracker.read(TrackedMemory.DRAM, dram_box, "dram")
        self._write(memory, local_box, "local")
        words[local] = self._vectors(vector)[vectors][:, : words.shape[1]].view(np.int8)

    def _store(self, c: SimpleNamespace) -> None:
        vector, rows = self.config.vector_bytes, self.config.rows
        vectors, local, dram_box, local_box = self._transfer(c, vector)
        self._read(TrackedMemory.SCRATCHPAD, local_box, "local")
        self.tracker.write(TrackedMemory.DRAM, dram_box, "dram")
        data = np.zeros((len(local), vector), np.uint8)
        data[:, :rows] = self.memories.scratchpad[local].view(np.uint8)
        self._vectors(vector)[vectors] = data

    # Windows --------------------------------------------------------------------------------------

    def _axes(self, c: SimpleNamespace, run: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Input rows (kernel_h, out_h) and columns (kernel_w, out_w, run) of every tap and output;
        -1 outside the input."""
        oy, ky = np.arange(c.out_h), np.arange(c.kernel_h)
        ox, kx = np.arange(c.out_w), np.arange(c.kernel_w)
        y = c.y0 + oy * c.stride_y + ky[:, None] * c.dilation_y
        x = c.x0 + ox[:, None] * c.stride_x + kx[:, None, None] * c.dilation_x + np.arange(run)
        return np.where((y >= 0) & (y < c.in_h), y, -1), np.where((x >= 0) & (x < c.in_w), x, -1)

    def _read_input(self, c: SimpleNamespace, y: np.ndarray, x: np.ndarray) -> None:
        """Check the reads of the words in columns ``x`` of rows ``y`` (-1: none) of all blocks."""
        rows = progressions(np.unique(y[y >= 0]))
        columns = progressions(np.unique(x[x >= 0]))
        for y_first, y_count, y_step in rows:
            for x_first, x_count, x_step in columns:
                box = Box(
                    c.src + y_first * c.src_pitch + x_first,
                    (c.blocks, y_count, x_count),
                    (c.src_block, y_step * c.src_pitch, x_step),
                )
                self._read(TrackedMemory.SCRATCHPAD, box, "src")

    def _offsets(self, c: SimpleNamespace) -> tuple[np.ndarray, np.ndarray]:
        """Check the reads of the input. Return word offsets by row (kernel_h, out_h) and by column
        (kernel_w, out_w); OUTSIDE where a tap is outside the input."""
        y, x = self._axes(c)
        self._read_input(c, y, x)
        x = x[:, :, 0]
        return np.where(y >= 0, y * c.src_pitch, OUTSIDE), np.where(x >= 0, x, OUTSIDE)

    def _outputs(self, c: SimpleNamespace, blocks: int, column: int = 1) -> np.ndarray:
        """Check the writes of ``out``, with ``column`` words from one column to the next. Return
        its words (blocks, out_h, out_w)."""
        steps = (c.out_block, c.out_pitch, column)
        self._write(TrackedMemory.SCRATCHPAD, Box(c.out, (blocks, c.out_h, c.out_w), steps), "out")
        return _grid(c.out, steps, np.arange(blocks), c)

    def _conv(self, c: SimpleNamespace) -> None:
        rows, pad_word = self.config.rows, self.config.scratchpad_words
        outputs = c.out_h * c.out_w
        taps = c.kernel_h * c.kernel_w
        tiles = c.blocks * taps
        self._within(TrackedMemory.ACCUMULATORS, span(c.acc, outputs), "acc")
        self._read(TrackedMemory.WEIGHTS, span(c.weights, tiles * rows), "weights")
        row, column = self._offsets(c)
        if c.accumulate:
            self._read(TrackedMemory.ACCUMULATORS, span(c.acc, outputs), "acc")
        self._write(TrackedMemory.ACCUMULATORS, span(c.acc, outputs), "acc")
        self._use_accumulators(c.acc, outputs)

        self.memories.lanes[pad_word] = c.pad
        acc = self.memories.accumulators[c.acc : c.acc + outputs]
        if not c.accumulate:
            acc[:] = 0
        row, column = row.T, column.T
        # Each zero point makes products up to twice as large.
        depth = EXACT_DEPTH >> (bool(c.input_zero) + bool(c.weight_zero))
        for tile in range(0, tiles, depth // rows):
            t = np.arange(tile, min(tile + depth // rows, tiles))
            block, ky, kx = t // taps, t // c.kernel_w % c.kernel_h, t % c.kernel_w
            first = c.weights + tile * rows
            w = self.memories.weights[first : first + len(t) * rows].astype(np.float32)
            w -= c.weight_zero
            for o in range(0, outputs, OUTPUT_CHUNK):
                oy, ox = np.divmod(np.arange(o, min(o + OUTPUT_CHUNK, outputs)), c.out_w)
                word = row[oy][:, ky] + column[ox][:, kx]
                word += c.src + block * c.src_block
                x = self.memories.lanes[np.minimum(word, pad_word)]
                x = x.reshape(len(oy), -1).astype(np.float32)
                x -= c.input_zero
                sums = x @ w
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
            self._read(TrackedMemory.SCRATCHPAD, box, "weights")
            w = self.memories.scratchpad[c.weights : c.weights + c.blocks * taps]
            w = w.reshape(c.blocks, taps, 1, 1, rows).astype(np.int32) - c.weight_zero
        out = self._outputs(c, c.blocks)
        if c.op != WindowOp.MAX:
            constants = np.arange(c.params, c.params + words * c.blocks)
            self._refuse_own_results(constants, out, "params")
        if c.op == WindowOp.DEPTHWISE:
            constants = np.arange(c.weights, c.weights + taps * c.blocks)
            self._refuse_own_results(constants, out, "weights")

        self.memories.lanes[pad_word] = c.pad
        result = np.full((*out.shape, rows), -128 if c.op == WindowOp.MAX else 0, np.int32)
        for tap in range(taps):
            ky, kx = divmod(tap, c.kernel_w)
            word = row[ky][:, None] + column[kx] + (c.src + block * c.src_block)[:, None, None]
            word = np.minimum(word, pad_word)
            self._refuse_own_results(word, out, "src", in_place=True)
            x = self.memories.lanes[word].astype(np.int32)
            if c.op == WindowOp.MAX:
                np.maximum(result, x, out=result)
            else:
                result += x * w[:, tap] if c.op == WindowOp.DEPTHWISE else x
        if c.op == WindowOp.MAX:
            values = np.clip(result, c.low, c.high)
        else:
            bias, multiplier, shift = (p[:, None, None, :] for p in parameters)
            values = numerics.requantise(
                result, bias, multiplier, shift, zero=c.zero, low=c.low, high=c.high
            )
        self.memories.scratchpad[out] = values

    def _im2col(self, c: SimpleNamespace) -> None:
        rows = self.config.rows
        y, x = self._axes(c, c.run)
        # -1 // rows is -1: outside stays outside.
        self._read_input(c, y, x // rows)
        depth = c.kernel_h * c.kernel_w * c.run
        words = -(-depth // rows)
        out = self._outputs(c, words)

        pad_byte = self.config.scratchpad_words * rows
        self.memories.lanes[-1] = c.pad
        row = np.where(y >= 0, (c.src + y * c.src_pitch) * rows, OUTSIDE)
        column = np.where(x >= 0, x, OUTSIDE)
        # (out_h, out_w, kernel_h, kernel_w, run)
        byte = row.T[:, None, :, None, None] + column.transpose(1, 0, 2)[None, :, None, :, :]
        byte = np.minimum(byte, pad_byte).reshape(c.out_h * c.out_w, depth)
        self._refuse_own_results(byte // rows, out, "src")
        data = np.full((len(byte), words * rows), c.pad, np.int8)
        data[:, :depth] = self.memories.lanes.reshape(-1)[byte]
        # In the order of writing, should a word be written twice: output by output.
        places = np.ascontiguousarray(out.transpose(1, 2, 0))
        self.memories.scratchpad[places] = data.reshape(*places.shape, rows)

    # Rows -----------------------------------------------------------------------------------------

    def _row(self, c: SimpleNamespace) -> None:
        """SOFTMAX and NORMALISE: channels last."""
        shape = (c.out_w, c.blocks, self.config.rows)
        words = self._blocked(c, "src", c.src, c.src_block, 1)
        mask = None
        if c.op == WindowOp.SOFTMAX and c.masked:
            mask = self._blocked(c, "weights", c.weights, c.mask_block, c.mask_step)
        header, rest = self._row_parameters(c)
        out = self._outputs(c, c.blocks)[:, 0].T
        self._refuse_own_results(words, out, "src", in_place=True)
        constants = np.arange(c.params, c.params + self.config.row_param_words + len(rest))
        self._refuse_own_results(constants, out, "params")
        x = self.memories.scratchpad[words].reshape(c.out_w, -1)
        if c.op == WindowOp.SOFTMAX:
            last = c.features + c.causal * np.arange(c.out_w)[:, None]
            valid = np.arange(x.shape[1]) < last
            if mask is not None:
                self._refuse_own_results(mask, out, "weights")
                valid &= self.memories.scratchpad[mask].reshape(c.out_w, -1) >= 0
            values = _softmax(c, header, rest, x, valid)
        else:
            values = _normalise(c, header, rest, x)
        self.memories.scratchpad[out] = values.reshape(shape)

    def _blocked(
        self, c: SimpleNamespace, field: str, start: int, block: int, step: int
    ) -> np.ndarray:
        """Check the reads of a row operation's operand. Return its words (out_w, blocks)."""
        box = Box(start, (1, c.blocks, c.out_w), (0, block, step))
        self._read(TrackedMemory.SCRATCHPAD, box, field)
        return start + np.arange(c.out_w)[:, None] * step + np.arange(c.blocks) * block

    def _row_parameters(self, c: SimpleNamespace) -> tuple[int, np.ndarray]:
        """The parameters of all channels of a row operation, as a number, and the words behind
        them: a table, or the channels' own."""
        own = self.config.row_param_words
        count = c.blocks * PARAM_BYTES
        if c.op == WindowOp.SOFTMAX:
            count = -(-TABLE_BYTES * EXP_ENTRY_BYTES // self.config.rows)
        self._read(TrackedMemory.SCRATCHPAD, span(c.params, own + count), "params")
        words = self.memories.scratchpad[c.params : c.params + own + count]
        header = words[:own].tobytes()[:ROW_PARAM_BYTES]
        return int.from_bytes(header, "little"), words[own:]

    # Post-processing ------------------------------------------------------------------------------

    def _post(self, c: SimpleNamespace) -> None:
        config = self.config
        per_word = config.word_groups
        block, position = np.divmod(c.lane + np.arange(c.groups), per_word)
        blocks = int(block[-1]) + 1
        position = position[:, None, None]

        def operand(name: str, column: int) -> np.ndarray:
            """Check an operand's reads. Return its groups' positions (groups, out_h, out_w),
            counted in groups from the start of the scratchpad."""
            start, pitch, step = (getattr(c, name + end) for end in ("", "_pitch", "_block"))
            steps = (step, pitch, column)
            box = Box(start, (blocks, c.out_h, c.out_w), steps)
            self._read(TrackedMemory.SCRATCHPAD, box, name)
            return _grid(start, steps, block, c) * per_word + position

        sources, constants = {}, {}
        if c.source == PostSource.SCRATCHPAD:
            sources["a"] = operand("a", 1)
        else:
            parameters, acc = self._accumulators(c)
            constants["params"] = span(c.params, c.groups * config.param_words)
        if c.op != PostOp.NONE:
            sources["b"] = operand("b", c.b_step)
        if c.lut:
            constants["table"] = span(c.table, -(-TABLE_BYTES // config.rows))
            self._read(TrackedMemory.SCRATCHPAD, constants["table"], "table")
        out = self._outputs(c, blocks, c.out_step)[block] * per_word + position
        for name, words in sources.items():
            self._refuse_own_results(words, out, name, in_place=True)
        for name, box in constants.items():
            words = np.arange(box.start, box.last + 1)
            self._refuse_own_results(words, out // per_word, name)

        groups = self.memories.scratchpad.reshape(-1, config.lanes)
        if c.source == PostSource.SCRATCHPAD:
            a = groups[sources["a"]]
        else:
            bias, multiplier, shift = (p[:, None, :] for p in parameters)
            a = numerics.requantise(
                acc, bias, multiplier, shift, zero=c.zero, low=c.low, high=c.high
            )
            a = a.reshape(*out.shape, config.lanes)
        if c.op != PostOp.NONE:
            a = numerics.combine(
                c.op.name.lower(),
                a,
                groups[sources["b"]],
                za=c.za,
                zb=c.zb,
                zo=c.zo,
                ma=c.ma,
                mb=c.mb,
                shift=c.shift,
                low=c.low2,
                high=c.high2,
            )
        if c.lut:
            first = c.table * config.rows
            table = self.memories.scratchpad.reshape(-1)[first : first + TABLE_BYTES]
            a = numerics.lookup(a, table)
        groups[out] = a

    def _accumulators(self, c: SimpleNamespace) -> tuple[list[np.ndarray], np.ndarray]:
        """POST's parameters (groups, lanes) each, and its accumulators (groups, outputs, lanes)."""
        config = self.config
        outputs = c.out_h * c.out_w
        self._read(TrackedMemory.ACCUMULATORS, span(c.acc, outputs), "acc")
        self._use_accumulators(c.acc, outputs)
        parameters = self._parameters(c.params, config.param_words, c.groups, config.lanes)
        acc = self.memories.accumulators[c.acc : c.acc + outputs]
        acc = acc.reshape(outputs, config.groups, config.lanes)[:, : c.groups]
        return parameters, acc.transpose(1, 0, 2)


def _unpacked(raw: np.ndarray, fields: Sequence[Field]) -> list[np.ndarray]:
    """The ``fields`` packed from bit 0 of each int64 number, as arrays of them."""
    out, low = [], 0
    for f in fields:
        # Shifted to the top and back: sign-extended, or not.
        top = raw << (64 - low - f.bits)
        out.append(
            top >> (64 - f.bits)
            if f.signed
            else (top.view(np.uint64) >> np.uint64(64 - f.bits)).astype(np.int64)
        )
        low += f.bits
    return out


def _softmax(
    c: SimpleNamespace, header: int, rest: np.ndarray, x: np.ndarray, valid: np.ndarray
) -> np.ndarray:
    own = unpack_signed(SOFTMAX_PARAMS, header)
    table = np.frombuffer(rest.tobytes(), f"<u{EXP_ENTRY_BYTES}")[:TABLE_BYTES].astype(np.int64)
    p = SoftmaxParameters(table & ((1 << EXP_BITS) - 1), own["numerator"], own["shift"])
    return softmax(x, p, valid, zero=c.zero, low=c.low, high=c.high)


def _normalise(c: SimpleNamespace, header: int, rest: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Channels that do not count are as if they were the zero point."""
    own = unpack_signed(NORMALISE_PARAMS, header)
    raw = np.frombuffer(rest.tobytes(), "<i8")
    bias, multiplier, shift, negate, coarse = _unpacked(raw, (*REQUANT_PARAMS, *CHANNEL_FLAGS))
    p = NormaliseParameters(
        features=c.features,
        epsilon=own["epsilon"],
        centred=bool(own["centred"]),
        bias=bias,
        multiplier=multiplier,
        shift=shift,
        negate=negate.astype(bool),
        coarse=coarse.astype(bool),
    )
    counted = np.where(np.arange(x.shape[1]) < c.features, x, c.pad)
    return normalise(counted, p, x_zero=c.pad, zero=c.zero, low=c.low, high=c.high)


def _grid(
    start: int, steps: tuple[int, int, int], block: np.ndarray, c: SimpleNamespace
) -> np.ndarray:
    """Words (block, out_h, out_w) of a tensor; ``steps`` in words: block, row, column."""
    step, pitch, column = steps
    row = np.arange(c.out_h)[:, None] * pitch
    return start + block[:, None, None] * step + row + np.arange(c.out_w) * column
