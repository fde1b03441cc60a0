"""A cycle model: predicts when every command of a program starts and ends.

Commands are taken in order of time: one starts when it has been fetched, its engine is free and its
tokens have been given; it lasts as long as its engine needs for it. Reads share the bus burst by
burst, within the outstanding bursts the configuration has. What scratchpad conflicts cost is
estimated from a first pass: which accesses of others fall into a command's time, and how often they
meet in a bank; where they rarely do, they are left out."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import inf

import numpy as np

from systole.isa import Config, Engine, LoadTarget, Opcode, PostOp, PostSource, WindowOp
from systole.isa.commands import TABLE_BYTES
from systole.sw.runtime.program import Program

PASSES = 2
"""How often conflicts are looked for, each time where the pass before put the commands."""
FETCH_START = 1
"""Cycles from the start of a program to the first request for its commands."""
FETCH_WORDS = 32
"""Words of the program asked for at a time."""
FETCH_BUFFER = 128
"""Words of the program that may be asked for and not yet handed out."""
END_WORDS = 1
"""Words of the END command."""
FETCH_RETURN = 5
"""Cycles from a word's beat to when its command may be handed out."""
WRITE_LATENCY = 64
"""Of the memory, from a write's last beat to its response."""
REQUEST = 2
"""Cycles from the start of a transfer to its first burst."""
READ_RETURN = 2
"""Cycles that reads take on their way beside the memory's latency."""
STORE_DEPTH = 5
"""Cycles from the first burst of a STORE to its first beat, and from the response to its end."""
CONV_START = 2
"""Cycles from the start of CONV to the capture of its first weights."""
CONV_SWAP = 2
"""Cycles from the last activation read to its entry into the array."""
POST_DEPTH = {PostOp.NONE: 7, PostOp.ADD: 11, PostOp.SUB: 11, PostOp.MUL: 11}
"""Cycles from the last word that POST issues to the end of the command."""
PARAM_LEAD = 2
"""Cycles beside the reads of parameters or a table before the first word is issued."""
WINDOW_SET_UP = 4
"""Cycles from the start of WINDOW to its first word, beside those for the bits of its factors."""
DIVIDEND_BITS = 17
"""Of IM2COL's factors."""
WINDOW_LEAD = 2
"""Cycles from the start of WINDOW's walk to its first read."""
WINDOW_DEPTH = {WindowOp.DEPTHWISE: 14, WindowOp.SUM: 14, WindowOp.MAX: 8, WindowOp.IM2COL: 5}
"""Cycles from the last word that WINDOW issues to the end of the command."""

_ENGINES_OF = [tuple(int(e) for e in Engine if mask >> e & 1) for mask in range(1 << len(Engine))]
"""The engines in a mask of waits or signals."""


@dataclass(frozen=True)
class Timing:
    """Start and end cycle of a command."""

    start: int
    end: int


@dataclass(frozen=True)
class LayerPrediction:
    """Cycles of one layer (see :func:`layer_cycles`) and what it moves to and from DRAM."""

    cycles: int
    read_bytes: int
    write_bytes: int


@dataclass(frozen=True)
class Prediction:
    """Of a whole program. ``read_bytes`` include the commands, in whole beats; those of the layers
    do not."""

    cycles: int
    read_bytes: int
    write_bytes: int
    layers: list[LayerPrediction]


@lru_cache(1024)
def _im2col_row(
    x0: int,
    stride: int,
    dilation: int,
    kernel_w: int,
    kernel_h: int,
    run: int,
    in_w: int,
    out_w: int,
    rows: int,
    keeps: bool,
) -> tuple[int, list[tuple[int, int, int]]]:
    """Steps of IM2COL for a row of outputs, as :class:`hw.window.walk.TapWalk` takes them, and
    those that read: step, row of the kernel, word in its row of the input."""
    steps, reads = 0, []
    newest, words = 0, 0
    # A pixel whose last run ends in its next word takes a step more.
    flush = (kernel_w * kernel_h * run - 1) % rows < (run - 1) % rows
    for ox in range(out_w):
        fetched = []
        taken = 0
        for kx in range(kernel_w):
            words = words if keeps else 0
            word, byte = divmod(x0 + ox * stride + kx * dilation, rows)
            for done in range(0, run, rows):
                spills = byte + min(run - done, rows) > rows
                first = words > 0 and newest == word
                if not (words == 2 and newest == word + 1) and (spills or not first):
                    if spills and not first:
                        fetched.append((taken, word))
                        taken += 1
                    newest, words = word + spills, 1 + spills
                    fetched.append((taken, newest))
                taken += 1
                word += 1
        for ky in range(kernel_h):
            reads += [(steps + at, ky, w) for at, w in fetched if 0 <= w < -(-in_w // rows)]
            steps += taken
        steps += flush
    return steps, reads


def im2col_row_cycles(config: Config, **fields: int) -> int:
    """Cycles of IM2COL for a row of outputs; ``fields``: those of the command that say how."""
    return _im2col(fields, config)[0]


def _im2col(c: Mapping[str, int], config: Config) -> tuple[int, list[tuple[int, int, int]]]:
    keeps = c["kernel_w"] == 1 and c["kernel_h"] <= config.window_width
    names = ("x0", "stride_x", "dilation_x", "kernel_w", "kernel_h", "run", "in_w", "out_w")
    return _im2col_row(*(c[n] for n in names), config.rows, keeps)


@lru_cache(1024)
def _conv_words(
    blocks: int,
    src_block: int,
    src_pitch: int,
    kernel: tuple[int, int],
    out: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    first: tuple[int, int],
    present: tuple[int, int],
    least: int,
) -> np.ndarray:
    """The words CONV reads, cycle by cycle, from ``src``; -1: none. Pairs are (y, x)."""
    y, x = (
        first[i] + np.arange(out[i])[:, None] * stride[i] + np.arange(kernel[i]) * dilation[i]
        for i in (0, 1)
    )
    inside = [(n >= 0) & (n < present[i]) for i, n in enumerate((y, x))]
    # Blocks, kernel rows, kernel columns, output rows, output columns.
    y, y_inside = (n.T[None, :, None, :, None] for n in (y, inside[0]))
    x, x_inside = (n.T[None, None, :, None, :] for n in (x, inside[1]))
    block = np.arange(blocks)[:, None, None, None, None] * src_block
    words = np.where(y_inside & x_inside, block + y * src_pitch + x, -1)
    words = words.reshape(-1, out[0] * out[1])
    if words.shape[1] < least:
        words = np.pad(words, ((0, 0), (0, least - words.shape[1])), constant_values=-1)
    return words.reshape(-1)


def _conv_banks(c: Mapping[str, int], config: Config) -> np.ndarray:
    """The bank CONV reads in each cycle from its first; -1: none."""
    pairs = [
        (c[f"{name}_h"], c[f"{name}_w"]) if wide else (c[f"{name}_y"], c[f"{name}_x"])
        for name, wide in (("kernel", 1), ("out", 1), ("stride", 0), ("dilation", 0))
    ]
    words = _conv_words(
        c["blocks"],
        c["src_block"],
        c["src_pitch"],
        *pairs,
        (c["y0"], c["x0"]),
        (c["in_h"], c["in_w"]),
        config.rows,
    )
    return np.where(words < 0, -1, (c["src"] + words) % config.banks)


@dataclass(frozen=True)
class _Window:
    """What a WINDOW command takes: cycles of set-up, words issued; and what the next one must have
    in common with it to follow without the pipeline running dry."""

    set_up: int
    words: int
    mode: tuple[int, ...]


def _further_parts(c: Mapping[str, int]) -> int:
    """Cycles that a window of the fast path takes for an output beside its word's."""
    return (c["kernel_w"] > 3) + (c["kernel_h"] > 3)


def _window(c: Mapping[str, int], config: Config) -> _Window:
    out_h, out_w = c["out_h"], c["out_w"]
    taps = c["kernel_w"] * c["kernel_h"]
    factors = (abs(c["y0"]), c["stride_y"], c["dilation_y"], c["kernel_h"])
    bits, fast = max(factors).bit_length(), False
    if c["op"] == WindowOp.IM2COL:
        bits = max(bits, DIVIDEND_BITS)
        words = out_h * _im2col(c, config)[0]
    else:
        sizes, plain = [], True
        for axis, of in ("wx", "hy"):
            kernel, stride = c[f"kernel_{axis}"], c[f"stride_{of}"]
            plain &= kernel <= config.window_kernel and stride <= kernel
            plain &= c[f"dilation_{of}"] == 1 or kernel == 1
            sizes.append((c[f"out_{axis}"] - 1) * stride + kernel)
        words = out_h * out_w * taps
        fast = plain and 2 <= sizes[0] <= config.window_width
        again = c["op"] == WindowOp.DEPTHWISE and not fast and taps > config.window_width
        if fast:
            words = sizes[0] * sizes[1] + _further_parts(c) * out_h * out_w
        elif again:
            words *= 2
        if c["op"] == WindowOp.DEPTHWISE and not again:
            words += taps
        if c["op"] != WindowOp.MAX:
            words += config.window_param_words
        words *= c["blocks"]
    modes = ("op", "pad", "zero", "low", "high", "kernel_w", "kernel_h")
    return _Window(WINDOW_SET_UP + bits, words, (fast, *(c[m] for m in modes)))


def _operand_reads(c: Mapping[str, int]) -> int:
    """Reads of POST from the scratchpad for a group of two operands; one ``b`` for the whole image
    is kept."""
    size = c["out_w"] * c["out_h"]
    return size + 1 if c["b_step"] == c["b_pitch"] == 0 else 2 * size


def _bursts(c: Mapping[str, int], config: Config) -> list[int]:
    """Bus cycles of each burst of a transfer: its beats, or its words if they are more."""
    size = config.vector_bytes
    if c["opcode"] == Opcode.LOAD and c["target"] == LoadTarget.WEIGHTS:
        size = config.weight_vector_bytes
    beat, longest = config.beat_bytes, config.axi_burst_beats
    slower = max(1, beat // size)  # cycles a beat holds up an engine that takes a word a cycle
    out = []
    for j in range(c["count2"]):
        for i in range(c["count1"]):
            first = c["dram"] + i * c["dram1"] + j * c["dram2"]
            at, end = first // beat, -(-(first + c["count0"] * size) // beat)
            while at < end:
                stop = min(end, (at // longest + 1) * longest)
                out.append((stop - at) * slower)
                at = stop
    return out


@dataclass
class _Transfers:
    """A direction of the bus: bursts in order of issue, so many of them in flight."""

    outstanding: int
    head: int
    """Cycles from a burst's issue to its first beat."""
    tail: int
    """Cycles from its last beat to when another may be issued in its place."""
    free: float = 0
    flight: deque[float] = field(default_factory=deque)

    def slot(self) -> float:
        """When the next burst may be issued."""
        return self.flight[0] if len(self.flight) == self.outstanding else 0

    def issue(self, at: float, beats: int) -> float:
        """Issue a burst; the end of its last beat."""
        if len(self.flight) == self.outstanding:
            self.flight.popleft()
        self.free = max(self.free, at + self.head) + beats
        self.flight.append(self.free + self.tail)
        return self.free


class _FetchModel:
    """Fetches the program over the read bus, ahead of the commands handed out."""

    def __init__(self, words: int, bus: _Transfers, config: Config):
        self.words, self.bus = words, bus
        self.beat_words = config.beat_bytes / 8
        self.asked = self.handed = 0
        self.room = deque[float]([FETCH_START] * (FETCH_BUFFER // FETCH_WORDS))
        """Since when requests, each behind the one before, have room in the buffer."""
        self.come: deque[tuple[int, float]] = deque()
        """Requests whose words are not all handed out: the word after, when the last is there."""

    def next(self) -> float:
        """When the next request can be issued; ``inf``: not yet, or never."""
        if self.asked == self.words or not self.room:
            return inf
        return max(self.room[0], self.bus.slot())

    def issue(self, at: float) -> None:
        self.room.popleft()
        size = min(FETCH_WORDS, self.words - self.asked)
        end = self.bus.issue(at, -(-size // self.beat_words))
        self.asked += size
        self.come.append((self.asked, end + FETCH_RETURN))

    def _there(self, more: int) -> float:
        """When the first ``handed + more`` words are there; ``handed`` never goes down."""
        while self.come[0][0] < self.handed + more:
            self.come.popleft()
        after, last = self.come[0]
        return last - (after - self.handed - more) // self.beat_words

    def hand(self, size: int, at: float) -> float:
        """When the next ``size`` words, already asked for, have been handed out, from ``at`` on one
        a cycle."""
        handed = self.handed // FETCH_WORDS
        end = max(at, self._there(1) - 1) + size
        self.handed += size
        end = max(end, self._there(0))
        self.room += [end] * (self.handed // FETCH_WORDS - handed)
        return end


@dataclass(frozen=True)
class _Post:
    """The last POST command: when its last group starts, all is issued, all is written; whether
    its like may follow before that."""

    last_group: float
    issued: float
    ended: float
    overlaps: bool


_Spans = list[tuple[float, float, float, bool]]
"""Accesses of an engine, in order of their ends: from, to, how many, at an even stride."""


class _MachineModel:
    """All engines, and the state of one pass over the program."""

    def __init__(
        self,
        commands: list[Mapping[str, int]],
        config: Config,
        read_latency: int,
        write_latency: int,
    ):
        self.config = config
        self.commands = commands
        self.sizes = [1 + c["present"].bit_count() for c in commands]
        self.engines = [int(c["engine"]) for c in commands]
        self.waits = [_ENGINES_OF[c["wait"]] for c in commands]
        self.signals = [_ENGINES_OF[c["signal"]] for c in commands]
        self.bursts = [
            _bursts(c, config) if c["opcode"] in (Opcode.LOAD, Opcode.STORE) else []
            for c in commands
        ]
        self.windows = {
            i: _window(c, config) for i, c in enumerate(commands) if c["opcode"] == Opcode.WINDOW
        }
        self.read_latency, self.write_latency = read_latency, write_latency
        rows, cols = config.rows, config.cols
        self.capture = rows - rows // config.cell_rows + 1
        self.array = rows // config.cell_rows + (cols - 1) // config.cell_cols

    def run(self, delays: Mapping[int, int]) -> list[Timing]:
        """Schedule everything; ``delays`` are cycles that conflicts add to commands."""
        config, count = self.config, len(self.commands)
        self.delays = delays
        self.starts: list[float] = [inf] * count
        self.ends: list[float] = [inf] * count
        self.streams: list[tuple[float, float, int]] = []
        """When CONV reads: first and last cycle, command."""
        read = _Transfers(config.axi_outstanding, self.read_latency + READ_RETURN, 0)
        write = _Transfers(config.axi_outstanding, STORE_DEPTH, self.write_latency)
        self.buses = {Engine.LOAD: read, Engine.WLOAD: read, Engine.STORE: write}
        self.free: list[float] = [0] * len(Engine)
        self.transfers: dict[int, deque[int]] = {}
        self.current: dict[int, int] = {}
        self.tokens = [[deque[float]() for _ in Engine] for _ in Engine]
        """Of each engine: when those given to it by each other were."""
        self.conv_tile = (-inf, 0)
        self.post = _Post(0, 0, 0, False)
        self.window: tuple[tuple[int, ...], float, float] = ((), 0, 0)
        """The last WINDOW command: its mode, when all is issued, when all is written."""
        self.issues: dict[int, tuple[float, float]] = {}
        """When POST and WINDOW commands begin to issue words, and when they have."""
        self.queues = [deque[tuple[int, float]]() for _ in Engine]
        taken = [deque([0.0] * config.queue_depth) for _ in Engine]
        fetched, fetching, last = 0.0, 0, 0
        fetch = _FetchModel(sum(self.sizes) + END_WORDS, read, config)
        # When each engine can go on; ``changed``: those for which that is to be looked at again.
        next_at: list[float] = [inf] * len(Engine)
        self.changed: set[int] = set()
        while True:
            # The fetcher stands before a full queue until that engine takes a command.
            while fetching < count and taken[engine := self.engines[fetching]]:
                size = self.sizes[fetching]
                if fetch.handed + size > fetch.asked:
                    break
                fetched = fetch.hand(size, max(fetched, taken[engine].popleft()))
                self.queues[engine].append((fetching, fetched))
                self.changed.add(engine)
                fetching += 1
            for e in self.changed:
                next_at[e] = self._next(e)
            self.changed.clear()
            best = min(next_at)
            fetches = fetch.next()
            if fetches <= best:
                if fetches == inf:
                    break
                fetch.issue(fetches)
                self.changed.update(e for e in self.transfers if self.buses[e] is read)
                continue
            # At equal times the engine that was not served last goes first.
            chosen = next_at.index(best)
            if chosen == last and best in next_at[chosen + 1 :]:
                chosen = next_at.index(best, chosen + 1)
            last = chosen
            self.changed.add(chosen)
            if chosen in self.transfers:
                self._burst(chosen, best)
            else:
                index, _ = self.queues[chosen].popleft()
                taken[chosen].append(best)
                self._start(chosen, index, best)
        return [Timing(round(a), round(b)) for a, b in zip(self.starts, self.ends)]

    def _next(self, engine: int) -> float:
        """When an engine can go on: with its next burst or its next command; ``inf``: not yet."""
        if engine in self.transfers:
            return max(self.free[engine], self.buses[engine].slot())
        queue = self.queues[engine]
        if not queue:
            return inf
        index, start = queue[0]
        start = max(start, self.free[engine])
        for e in self.waits[index]:
            given = self.tokens[engine][e]
            if not given:
                return inf
            start = max(start, given[0])
        return start + 1

    def _start(self, engine: int, index: int, start: float) -> None:
        c = self.commands[index]
        for e in self.waits[index]:
            self.tokens[engine][e].popleft()
        self.starts[index] = start
        if self.bursts[index]:
            self.transfers[engine] = deque(self.bursts[index])
            self.current[engine] = index
            self.free[engine] = start + REQUEST
        elif engine == Engine.CONV:
            self._conv(c, index, start)
        elif engine == Engine.POST:
            self._post(c, index, start)
        else:
            self._window(c, index, start)

    def _burst(self, engine: int, at: float) -> None:
        bus, left = self.buses[engine], self.transfers[engine]
        beats = left.popleft()
        if not left:
            beats += self.delays.get(self.current[engine], 0)
        end = bus.issue(at, beats)
        self.changed.update(e for e in self.transfers if self.buses[e] is bus)
        self.free[engine] = at + 1
        if not left:
            del self.transfers[engine]
            self.free[engine] = at + 2
            self._end(self.current[engine], end + bus.tail + 1)

    def _conv(self, c: Mapping[str, int], index: int, start: float) -> None:
        """A tile streams as soon as its weights are in place and the tile before has streamed."""
        rows, n = self.config.rows, c["out_w"] * c["out_h"]
        before, length = self.conv_tile
        begin = max(start + CONV_START + self.capture, before + max(rows, length))
        tiles = c["blocks"] * c["kernel_h"] * c["kernel_w"]
        tile = begin + (tiles - 1) * max(rows, n)
        self.conv_tile = tile, n
        self.streams.append((begin, tile + n, index))
        # The command after the next is taken when this one streams.
        self.free[Engine.CONV] = max(start + 1, before)
        self._end(index, tile + n + CONV_SWAP + self.array)

    def _post(self, c: Mapping[str, int], index: int, start: float) -> None:
        config, before = self.config, self.post
        overlaps = c["source"] == PostSource.ACCUMULATOR and c["op"] == PostOp.NONE and not c["lut"]
        accept = max(start, before.issued if overlaps and before.overlaps else before.ended)
        begin = accept + 1
        step = n = c["out_w"] * c["out_h"]
        if c["source"] == PostSource.ACCUMULATOR:
            # Parameters are read from when the group before has started.
            begin = max(begin, max(start, before.last_group) + config.param_words + PARAM_LEAD)
            step = max(n, config.param_words + PARAM_LEAD)
        elif c["op"] != PostOp.NONE:
            step = n = _operand_reads(c)
        if c["lut"]:
            # A table is read in words of 16 bytes at most.
            table = -(-TABLE_BYTES // config.rows) * -(-config.rows // 16)
            begin = max(begin, max(start, before.ended) + table + PARAM_LEAD)
        last_group = begin + (c["groups"] - 1) * step
        issued = last_group + n + self.delays.get(index, 0)
        ended = issued + POST_DEPTH[c["op"]]
        self.post = _Post(last_group, issued, ended, overlaps)
        self.issues[index] = begin, issued
        # The next command is offered while this one is at work.
        self.free[Engine.POST] = accept
        self._end(index, ended)

    def _window(self, c: Mapping[str, int], index: int, start: float) -> None:
        window, (mode, issued, ended) = self.windows[index], self.window
        begin = max(start + window.set_up, issued + 1 if window.mode == mode else ended)
        issued = begin + window.words + self.delays.get(index, 0)
        ended = issued + WINDOW_DEPTH[c["op"]]
        self.window = window.mode, issued, ended
        self.issues[index] = begin, issued
        # The next command is prepared while this one is at work.
        self.free[Engine.WINDOW] = begin
        self._end(index, ended)

    def _end(self, index: int, end: float) -> None:
        self.ends[index] = end
        engine = self.engines[index]
        for e in self.signals[index]:
            self.tokens[e][engine].append(end)
            self.changed.add(e)

    def conflicts(self) -> dict[int, int]:
        """Cycles that commands of the last run lose to others that go first at the scratchpad."""
        convs = [
            (begin, stop, stop - begin, self.commands[conv]["stride_x"] % 2 == 0)
            for begin, stop, conv in self.streams
        ]
        loads = [
            (begin, end, c["count0"] * c["count1"] * c["count2"], False)
            for begin, end, c in (
                (self.starts[i] + REQUEST + self.read_latency, self.ends[i], self.commands[i])
                for i, engine in enumerate(self.engines)
                if engine == Engine.LOAD and self.config.beat_bytes >= self.config.vector_bytes
            )
        ]
        # Those that write every other bank.
        posts = [
            i
            for i, c in enumerate(self.commands)
            if c["opcode"] == Opcode.POST and c["out_step"] % 2 == 0
        ]
        out = {}
        for index, c in enumerate(self.commands):
            if c["opcode"] == Opcode.WINDOW:
                lost = self._window_conflicts(index, convs, posts, *self.issues[index])
            elif c["opcode"] == Opcode.POST and c["op"] != PostOp.NONE:
                # CONV reads every other bank: the two sequential readers meet again and again.
                lost = _shared(convs, *self.issues[index], even=True) / 3
            elif c["opcode"] == Opcode.POST and c["out_step"] % 2 == 0:
                # It writes every other bank, behind the loads.
                lost = _shared(loads, *self.issues[index], even=False) / 3
            else:
                continue
            if lost >= 1:
                out[index] = round(lost)
        return out

    def _window_conflicts(
        self, index: int, convs: _Spans, posts: list[int], begin: float, end: float
    ) -> float:
        c = self.commands[index]
        lost = 0.0
        if c["op"] == WindowOp.IM2COL:
            lost += self._im2col_conflicts(c, begin, end)
        elif c["op"] != WindowOp.SUM:
            # It meets CONV about every other row, and is in step with it from there on.
            rows = c["blocks"] * ((c["out_h"] - 1) * c["stride_y"] + c["kernel_h"])
            lost += rows / 2 * _shared(convs, begin, end, even=False) / (end - begin)
        return lost + self._write_conflicts(c, index, posts, begin, end)

    def _write_conflicts(
        self, c: Mapping[str, int], index: int, posts: list[int], begin: float, end: float
    ) -> int:
        """Writes of WINDOW that meet one of ``posts``, which goes first, at a bank. A word that is
        refused may wait beside the next."""
        banks = self.config.banks
        taken: dict[int, int] = {}
        first = bisect_left(posts, begin, key=lambda i: self.ends[i])
        for i in posts[first:]:
            p, at = self.commands[i], round(self.issues[i][0] - begin)
            if at >= end - begin:
                break
            for y in range(p["out_h"]):
                bank = p["out"] + y * p["out_pitch"]
                for _ in range(p["out_w"]):
                    taken[at] = bank % banks
                    bank += p["out_step"]
                    at += 1
        if not taken:
            return 0
        late = WINDOW_DEPTH[c["op"]] - POST_DEPTH[PostOp.NONE]
        lost, written, before = 0, -1, -1
        for step, word in self._window_writes(c, index):
            ready = step + late + lost
            # The word before the last must have been written when this one comes.
            if before >= ready:
                lost += before + 1 - ready
                ready = before + 1
            at, bank = max(ready, written + 1), word % banks
            while taken.get(at) == bank:
                at += 1
            before, written = written, at
        return lost

    def _window_writes(self, c: Mapping[str, int], index: int) -> Iterator[tuple[int, int]]:
        """The step that completes each word that WINDOW writes, and where it goes."""
        window = self.windows[index]
        out_w, out_h, blocks, inner = c["out_w"], c["out_h"], c["blocks"], 1
        block_words, parts = window.words / blocks, 0
        if c["op"] == WindowOp.IM2COL:
            inner = -(-c["kernel_w"] * c["kernel_h"] * c["run"] // self.config.rows)
            first, across, down = 0.0, block_words / out_h / out_w, block_words / out_h
        elif window.mode[0]:
            row = (out_w - 1) * c["stride_x"] + c["kernel_w"]
            across, down = c["stride_x"], row * c["stride_y"]
            parts = _further_parts(c)
            words = block_words - parts * out_w * out_h
            first = words - 1 - (out_h - 1) * down - (out_w - 1) * across
        else:
            across = c["kernel_w"] * c["kernel_h"]
            down = across * out_w
            first = block_words - down * out_h
        for b in range(blocks):
            for y in range(out_h):
                for x in range(out_w):
                    step = b * block_words + first + y * down + x * across
                    step += parts * (y * out_w + x + 1)
                    word = c["out"] + b * c["out_block"] + y * c["out_pitch"] + x
                    for k in range(inner):
                        yield round(step + k * across / inner), word + k * c["out_block"]

    def _im2col_conflicts(self, c: Mapping[str, int], begin: float, end: float) -> int:
        """Reads of IM2COL that meet one of CONV's, which goes first, at a bank."""
        config = self.config
        # Banks of CONV in the cycles from ``begin`` on.
        length = 2 * round(end - begin)
        taken = np.full(length, -1)
        first = bisect_left(self.streams, begin, key=lambda s: s[1])
        for start, _, index in self.streams[first:]:
            at = round(start - begin)
            if at >= length:
                break
            banks = _conv_banks(self.commands[index], config)[max(0, -at) :]
            at = max(at, 0)
            taken[at : at + len(banks)] = banks[: length - at]
        steps, reads = _im2col(c, config)
        banks = taken.tolist()
        lost = 0
        for oy in range(c["out_h"]):
            for step, ky, word in reads:
                y = c["y0"] + oy * c["stride_y"] + ky * c["dilation_y"]
                if 0 <= y < c["in_h"]:
                    bank = (c["src"] + y * c["src_pitch"] + word) % config.banks
                    at = WINDOW_LEAD + oy * steps + step
                    while at + lost < length and banks[at + lost] == bank:
                        lost += 1
        return lost


def _shared(spans: _Spans, start: float, end: float, *, even: bool) -> float:
    """Accesses from ``start`` to ``end`` of those who make so many accesses in their span; with
    ``even`` only those of an even stride. Spans are in order of their ends."""
    total = 0.0
    for begin, stop, accesses, is_even in spans[bisect_left(spans, start, key=lambda s: s[1]) :]:
        if begin >= end:
            break
        if is_even or not even:
            total += accesses * (min(stop, end) - max(begin, start)) / (stop - begin)
    return total


def predict(
    program: Program, *, read_latency: int, write_latency: int = WRITE_LATENCY
) -> list[Timing]:
    """Start and end of every command; the last end is the program's."""
    return _predict(list(program.decoded()), program.config, read_latency, write_latency)


def _predict(
    commands: list[Mapping[str, int]], config: Config, read_latency: int, write_latency: int
) -> list[Timing]:
    machine = _MachineModel(commands, config, read_latency, write_latency)
    timings, delays = machine.run({}), {}
    for _ in range(PASSES):
        before, delays = delays, machine.conflicts()
        if delays == before:
            break
        timings = machine.run(delays)
    return timings


def busy(program: Program) -> dict[str, int]:
    """Cycles that each unit has work for, whatever it waits for: reads and writes by the bus."""
    config = program.config
    machine = _MachineModel(list(program.decoded()), config, 0, 0)
    out = dict.fromkeys(("array", "POST", "WINDOW"), 0)
    for i, c in enumerate(machine.commands):
        size = c["out_w"] * c["out_h"] if "out_w" in c else 0
        if c["opcode"] == Opcode.CONV:
            tiles = c["blocks"] * c["kernel_h"] * c["kernel_w"]
            out["array"] += tiles * max(size, config.rows)
        elif c["opcode"] == Opcode.POST:
            both = c["source"] == PostSource.SCRATCHPAD and c["op"] != PostOp.NONE
            out["POST"] += c["groups"] * (_operand_reads(c) if both else size)
        elif c["opcode"] == Opcode.WINDOW:
            out["WINDOW"] += machine.windows[i].words
    moved = traffic(program)
    beat = config.beat_bytes
    out["reads"] = (sum(read for read, _ in moved) + 8 * program.command_words) // beat
    out["writes"] = sum(written for _, written in moved) // beat
    return out


def traffic(program: Program) -> list[tuple[int, int]]:
    """DRAM bytes (read, written) by each command, END excluded."""
    return _traffic(program.decoded(), program.config)


def _traffic(commands: Iterable[Mapping[str, int]], config: Config) -> list[tuple[int, int]]:
    out = []
    for c in commands:
        read = write = 0
        if c["opcode"] in (Opcode.LOAD, Opcode.STORE):
            count = c["count0"] * c["count1"] * c["count2"]
            if c["opcode"] == Opcode.STORE:
                write = count * config.vector_bytes
            elif c["target"] == LoadTarget.WEIGHTS:
                read = count * config.weight_vector_bytes
            else:
                read = count * config.vector_bytes
        out.append((read, write))
    return out


def layer_cycles(program: Program, ends: list[int]) -> list[int]:
    """Cycles of each layer: from the end of what ended before it to its own last command's end.

    Layers overlap; a cycle counts for the layer that ends next, so that the layers add up to the
    whole (less the end of the program)."""
    last = [0] * len(program.layers)
    for layer, end in zip(program.command_layers, ends):
        last[layer] = max(last[layer], end)
    out, before = [0] * len(last), 0
    for i in sorted(range(len(last)), key=lambda i: last[i]):
        out[i] = last[i] - before
        before = last[i]
    return out


def predict_layers(
    program: Program, read_latency: int, write_latency: int = WRITE_LATENCY
) -> Prediction:
    """The whole program's and every layer's cycles and DRAM bytes."""
    commands = list(program.decoded())
    timings = _predict(commands, program.config, read_latency, write_latency)
    cycles = layer_cycles(program, [t.end for t in timings])
    moved = [[0, 0] for _ in program.layers]
    for layer, (read, write) in zip(program.command_layers, _traffic(commands, program.config)):
        moved[layer][0] += read
        moved[layer][1] += write
    layers = [LayerPrediction(n, *both) for n, both in zip(cycles, moved, strict=True)]
    beat = program.config.beat_bytes
    fetched = -(-8 * program.command_words // beat) * beat
    return Prediction(
        max((t.end for t in timings), default=0) + 1,
        sum(layer.read_bytes for layer in layers) + fetched,
        sum(layer.write_bytes for layer in layers),
        layers,
    )
