"""The machine: all engines and the bus in time, command by command."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

from systole.isa import Config, Engine, Opcode, PostOp, PostSource, WindowOp
from systole.isa.commands import ROW_OPS
from systole.isa.timing import (
    END_WORDS,
    POST_DEPTH,
    POST_RETIRE,
    READ_AHEAD,
    READ_RETURN,
    STORE_DEPTH,
    TRANSFER_START,
    WINDOW_DEPTH,
    WINDOW_DRAIN,
    WINDOW_GAP,
    array_latency,
    array_lead,
    conv_lead,
    post_overlaps,
    table_reads,
)
from systole.sw.simulate.cycles.bus import BusModel, FetchModel, bursts
from systole.sw.simulate.cycles.engines import post_group_cycles, post_reads, window_timing

_ENGINES_OF = [tuple(int(e) for e in Engine if mask >> e & 1) for mask in range(1 << len(Engine))]
"""The engines in a mask of waits or signals."""
_SHARING = {
    int(e): both
    for both in ((int(Engine.LOAD), int(Engine.WLOAD)), (int(Engine.STORE),))
    for e in both
}
"""By engine that transfers, those on the same bus."""


@dataclass(frozen=True)
class Timetable:
    """When commands run in one pass, in cycles, by their index in the program."""

    starts: list[float]
    ends: list[float]
    streams: list[tuple[float, float, int]]
    """When CONV reads: first and last cycle, command."""
    issues: dict[int, tuple[float, float]]
    """When POST and WINDOW commands begin to issue words, and when they have issued all."""


@dataclass(frozen=True)
class _Post:
    """The last POST command."""

    last_group: float
    """When its last group starts."""
    issued: float
    """When all its words are issued."""
    written: float
    """When all its words are written."""
    overlaps: bool
    """Another such command may follow before it ends."""


class MachineModel:
    """All engines, and the state of one pass over the program."""

    def __init__(
        self,
        commands: Sequence[Mapping[str, int]],
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
            bursts(c, config) if c["opcode"] in (Opcode.LOAD, Opcode.STORE) else []
            for c in commands
        ]
        self.windows = {
            i: window_timing(c, config)
            for i, c in enumerate(commands)
            if c["opcode"] == Opcode.WINDOW
        }
        self.read_latency, self.write_latency = read_latency, write_latency
        self.conv_lead = conv_lead(config)
        self.array = array_lead(config) + array_latency(config, config.cols - 1)

    def run(self, delays: Mapping[int, int]) -> Timetable:
        """Schedules all commands; ``delays``: cycles that conflicts add to commands."""
        config, count = self.config, len(self.commands)
        self.delays = delays
        self.starts: list[float] = [inf] * count
        self.ends: list[float] = [inf] * count
        self.streams: list[tuple[float, float, int]] = []
        self.issues: dict[int, tuple[float, float]] = {}
        read = BusModel(config.axi_outstanding, self.read_latency + READ_RETURN, 0)
        write = BusModel(config.axi_outstanding, STORE_DEPTH, self.write_latency)
        self.buses: dict[int, BusModel] = {
            Engine.LOAD: read,
            Engine.WLOAD: read,
            Engine.STORE: write,
        }
        self.free: list[float] = [0] * len(Engine)
        self.transfers: dict[int, deque[int]] = {}
        """By engine, the bursts of its transfer that are still to be issued."""
        self.current: dict[int, int] = {}
        """By engine, the command of its last transfer."""
        self.tokens = [[deque[float]() for _ in Engine] for _ in Engine]
        """``tokens[taker][giver]``: the cycles at which tokens were given."""
        self.conv_tile: tuple[float, int] = (-inf, 0)
        """CONV's last tile: when it begins to stream, and its outputs."""
        self.post = _Post(0, 0, 0, False)
        self.window: tuple[tuple[int, ...], float, float] = ((), 0, 0)
        """The last WINDOW command: its mode, when all is issued, when all is written."""
        self.queues = [deque[tuple[int, float]]() for _ in Engine]
        """By engine, the commands in its queue, and when they came."""
        self.taken = [deque([0.0] * config.queue_depth) for _ in Engine]
        """By engine, since when its queue has had the places that are free."""
        self.fetch = FetchModel(sum(self.sizes) + END_WORDS, read, config)
        self.fetched, self.fetching = 0.0, 0
        self.changed: set[int] = set()
        """Engines whose next time has to be looked at again."""
        self._run()
        return Timetable(self.starts, self.ends, self.streams, self.issues)

    def _run(self) -> None:
        next_at: list[float] = [inf] * len(Engine)
        last = 0
        while True:
            for e in self.changed:
                next_at[e] = self._next(e)
            self.changed.clear()
            best = min(next_at)
            fetches = self.fetch.next()
            if fetches <= best:
                if fetches == inf:
                    return
                self.fetch.issue(fetches)
                self.changed.update(_SHARING[Engine.LOAD])
                self._hand_out()
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
                self.taken[chosen].append(best)
                self._start(chosen, index, best)
                self._hand_out()

    def _hand_out(self) -> None:
        """Hand out fetched commands; before a full queue, wait for its engine to take one."""
        while self.fetching < len(self.commands):
            engine, size = self.engines[self.fetching], self.sizes[self.fetching]
            if not self.taken[engine] or self.fetch.handed + size > self.fetch.asked:
                return
            self.fetched = self.fetch.hand(size, max(self.fetched, self.taken[engine].popleft()))
            self.queues[engine].append((self.fetching, self.fetched))
            self.changed.add(engine)
            self.fetching += 1

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
            self.free[engine] = start + TRANSFER_START
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
        self.changed.update(_SHARING[engine])
        self.free[engine] = at + 1
        if not left:
            del self.transfers[engine]
            self.free[engine] = at + 2
            self._end(self.current[engine], end + bus.tail + 1)

    def _conv(self, c: Mapping[str, int], index: int, start: float) -> None:
        """A tile streams as soon as its weights are in place and the tile before has streamed."""
        rows, n = self.config.rows, c["out_w"] * c["out_h"]
        before, length = self.conv_tile
        begin = max(start + self.conv_lead, before + max(rows, length))
        tiles = c["blocks"] * c["kernel_h"] * c["kernel_w"]
        tile = begin + (tiles - 1) * max(rows, n)
        self.conv_tile = tile, n
        self.streams.append((begin, tile + n, index))
        # The command after the next is taken when this one streams.
        self.free[Engine.CONV] = max(start + 1, before)
        self._end(index, tile + n + self.array)

    def _post(self, c: Mapping[str, int], index: int, start: float) -> None:
        config, before = self.config, self.post
        overlaps = bool(post_overlaps(c["source"], c["op"], c["lut"]))
        accept = max(start, before.issued if overlaps and before.overlaps else before.written)
        begin = accept + 1
        step = n = c["out_w"] * c["out_h"]
        if c["source"] == PostSource.ACCUMULATOR:
            # Parameters are read from when the group before has started.
            begin = max(begin, max(start, before.last_group) + config.param_words + READ_AHEAD)
            step = post_group_cycles(n, config)
        else:
            step = n = post_reads(c)
        if c["lut"]:
            begin = max(begin, max(start, before.written) + table_reads(config) + READ_AHEAD)
        last_group = begin + (c["groups"] - 1) * step
        issued = last_group + n + self.delays.get(index, 0)
        ended = issued + POST_DEPTH[PostOp(c["op"])]
        self.post = _Post(last_group, issued, ended - POST_RETIRE, overlaps)
        self.issues[index] = begin, issued
        # The next command is offered while this one is at work.
        self.free[Engine.POST] = accept
        self._end(index, ended)

    def _window(self, c: Mapping[str, int], index: int, start: float) -> None:
        window, (mode, issued, ended) = self.windows[index], self.window
        # Behind a row operation, the pipeline must run dry.
        follows = window.mode == mode and c["op"] not in ROW_OPS
        may_follow = issued + WINDOW_GAP if follows else ended + WINDOW_DRAIN
        begin = max(start + window.set_up, may_follow) + window.walk_start
        issued = begin + window.words + self.delays.get(index, 0)
        ended = issued + WINDOW_DEPTH[WindowOp(c["op"])]
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
