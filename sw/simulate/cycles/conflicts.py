"""Conflicts at the scratchpad: what commands lose to others that go first at a bank.

Some are counted, access by access; for the others a share of the accesses that fall into the same
time is taken, as measured against the RTL."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import numpy as np

from systole.isa import Config, Engine, Opcode, PostOp, PostSource, WindowOp
from systole.isa.timing import (
    POST_DEPTH,
    POST_RETIRE,
    TRANSFER_START,
    WINDOW_DEPTH,
    WINDOW_LEAD,
)
from systole.sw.simulate.cycles.engines import (
    WindowTiming,
    conv_banks,
    post_group_cycles,
    window_banks,
    window_writes,
)
from systole.sw.simulate.cycles.machine import Timetable

EVERY_OTHER_BANK = 3
"""Where two accessors meet again and again because one of them only visits every other bank, one in
so many of the other's accesses costs the one behind a cycle. Fitted to the RTL in commit fa8eea2,
for POST with two operands next to a CONV of stride 2, and in commit 0449c36, for interleaved writes
of POST behind loads (yolov3-tiny's resize was predicted 4.2 % short before)."""
ROWS_PER_MEETING = 2
"""A window meets CONV once in so many of its rows, and is in step with it from there on. Fitted to
the RTL in commit fa8eea2; with it, commit 718b878 measured every layer of more than 1,000 cycles of
MobileNetV1 and V2, vww and dscnn-kws at 16x16 within 3 %."""
READS_AT_ONCE = 256
"""Reads of WINDOW that are compared with CONV's at a time."""

_Spans = Sequence[tuple[float, float, float, bool]]
"""Accesses of an engine, in order of their ends: from, to, how many, at an even stride."""


class Conflicts:
    """The conflicts of a program's commands, as passes have scheduled them."""

    def __init__(
        self,
        commands: Sequence[Mapping[str, int]],
        windows: Mapping[int, WindowTiming],
        config: Config,
        read_latency: int,
    ):
        self.commands, self.windows, self.config = commands, windows, config
        self.read_latency = read_latency
        self.posts = [
            i
            for i, c in enumerate(commands)
            if c["opcode"] == Opcode.POST
            and c["source"] == PostSource.ACCUMULATOR
            and c["op"] == PostOp.NONE
        ]
        """Commands that write a word a cycle."""
        # What WINDOW reads in its own time is the same in all passes.
        self.window_banks = {
            i: window_banks(commands[i], window, config) for i, window in windows.items()
        }

    def lost(self, schedule: Timetable) -> dict[int, int]:
        """Cycles that commands lose in a pass, by index; without those that lose none."""
        self.schedule = schedule
        self.convs: _Spans = [
            (begin, stop, stop - begin, self.commands[i]["stride_x"] % 2 == 0)
            for begin, stop, i in schedule.streams
        ]
        self.loads: _Spans = [
            (
                schedule.starts[i] + TRANSFER_START + self.read_latency,
                schedule.ends[i],
                c["count0"] * c["count1"] * c["count2"],
                False,
            )
            for i, c in enumerate(self.commands)
            if c["engine"] == Engine.LOAD and self.config.beat_bytes >= self.config.vector_bytes
        ]
        out = {}
        for index, c in enumerate(self.commands):
            if c["opcode"] == Opcode.WINDOW:
                lost = self._window_conflicts(index)
            elif c["opcode"] == Opcode.POST:
                lost = self._post_conflicts(index)
            else:
                continue
            if lost >= 1:
                out[index] = round(lost)
        return out

    def _post_conflicts(self, index: int) -> float:
        c, (begin, end) = self.commands[index], self.schedule.issues[index]
        if c["op"] != PostOp.NONE:
            # CONV reads every other bank: the two sequential readers meet again and again.
            return _shared(self.convs, begin, end, even=True) / EVERY_OTHER_BANK
        if c["out_step"] % 2 == 0:
            # It writes every other bank, behind the loads.
            return _shared(self.loads, begin, end, even=False) / EVERY_OTHER_BANK
        return 0

    def _window_conflicts(self, index: int) -> float:
        c, (begin, end) = self.commands[index], self.schedule.issues[index]
        lost = 0.0
        banks = self.window_banks[index]
        if banks is not None:
            lost += self._read_conflicts(banks, begin)
        elif c["op"] != WindowOp.SUM:
            rows = c["blocks"] * ((c["out_h"] - 1) * c["stride_y"] + c["kernel_h"])
            meetings = rows / ROWS_PER_MEETING
            lost += meetings * _shared(self.convs, begin, end, even=False) / (end - begin)
        return lost + self._write_conflicts(index, begin, end)

    def _write_conflicts(self, index: int, begin: float, end: float) -> int:
        """Cycles that WINDOW's writes lose to those of ``posts``, which go first, at a bank. A word
        that is refused may wait beside the next."""
        c = self.commands[index]
        posts_banks = self._posts_banks(begin, 2 * end - begin)
        if (posts_banks < 0).all():
            return 0
        taken: list[int] = posts_banks.tolist()
        late = WINDOW_DEPTH[WindowOp(c["op"])] - (POST_DEPTH[PostOp.NONE] - POST_RETIRE)
        lost, written, before = 0, -1, -1
        steps, banks = window_writes(c, self.windows[index], self.config)
        for step, bank in zip(steps.tolist(), banks.tolist(), strict=True):
            ready = step + late + lost
            # The word before the last must have been written before this one comes.
            if before >= ready - 1:
                lost += before + 2 - ready
                ready = before + 2
            at = max(ready, written + 1)
            while 0 <= at < len(taken) and taken[at] == bank:
                at += 1
            before, written = written, at
        return lost

    def _posts_banks(self, begin: float, end: float) -> np.ndarray:
        """The banks that ``posts`` write, by cycle from ``begin``, in which their words issue; -1:
        none."""
        config, length = self.config, round(end - begin)
        taken = np.full(length, -1)
        first = bisect_left(self.posts, begin, key=lambda i: self.schedule.ends[i])
        for i in self.posts[first:]:
            p, start = self.commands[i], round(self.schedule.issues[i][0] - begin)
            if start >= length:
                break
            y, x = np.arange(p["out_h"])[:, None], np.arange(p["out_w"])
            words = (p["out"] + y * p["out_pitch"] + x * p["out_step"]).reshape(-1)
            group_cycles = post_group_cycles(words.size, config)
            for group in range(p["groups"]):
                block = (p["lane"] + group) // config.word_groups
                banks = (words + block * p["out_block"]) % config.banks
                _lay(taken, start + group * group_cycles, banks)
        return taken

    def _read_conflicts(self, banks: np.ndarray, begin: float) -> int:
        """Cycles that WINDOW's reads lose to CONV's, which go first, at a bank. ``banks``: which it
        reads at each step from ``begin`` on; -1: none."""
        # Twice the time, as there will be delays.
        taken = self._convs_banks(begin, WINDOW_LEAD + 2 * len(banks))
        lost = at = 0
        while at < len(banks):
            own = banks[at : at + READS_AT_ONCE]
            refused = (own >= 0) & (own == taken[WINDOW_LEAD + at + lost :][: len(own)])
            if refused.any():
                at += int(refused.argmax())
                lost += 1
                if lost == len(banks):
                    break
            else:
                at += len(own)
        return lost

    def _convs_banks(self, begin: float, length: int) -> np.ndarray:
        """The banks that CONV reads in the ``length`` cycles from ``begin`` on; -1: none."""
        taken = np.full(length, -1)
        first = bisect_left(self.schedule.streams, begin, key=lambda s: s[1])
        for start, _, index in self.schedule.streams[first:]:
            at = round(start - begin)
            if at >= length:
                break
            _lay(taken, at, conv_banks(self.commands[index], self.config))
        return taken


def _lay(taken: np.ndarray, at: int, banks: np.ndarray) -> None:
    """Put ``banks`` into the cycles from ``at`` on, as far as they lie within ``taken``."""
    banks, at = banks[max(0, -at) :], max(at, 0)
    taken[at : at + len(banks)] = banks[: max(len(taken) - at, 0)]


def _shared(spans: _Spans, start: float, end: float, *, even: bool) -> float:
    """Accesses of ``spans`` that fall between ``start`` and ``end``; with ``even`` only those at an
    even stride."""
    total = 0.0
    for begin, stop, accesses, is_even in spans[bisect_left(spans, start, key=lambda s: s[1]) :]:
        if begin >= end:
            break
        if is_even or not even:
            total += accesses * (min(stop, end) - max(begin, start)) / (stop - begin)
    return total
