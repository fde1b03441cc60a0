"""The timeline, read back: a track per engine, a slice per command."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TrackEvent

from systole.isa import TRACE_EVENT, Config, Engine, TraceKind
from systole.sw.compiler import compile_graph
from systole.sw.frontend.load import load
from systole.sw.report.timeline import write_timeline
from systole.sw.zoo import digits


@pytest.fixture(scope="module")
def program():
    return compile_graph(load(digits.MODEL), Config())


def trace(rows) -> np.ndarray:
    """Events from (kind, engine, index, cycle, waited or stalled)."""
    out = np.zeros(len(rows), [(f.name, np.int64) for f in TRACE_EVENT])
    for event, (kind, engine, index, cycle, number) in zip(out, rows, strict=True):
        event["kind"], event["engine"], event["index"], event["cycle"] = kind, engine, index, cycle
        event["waited" if kind == TraceKind.START else "stalled"] = number
    return out


def slices(path) -> dict[str, list[tuple[int, int, str, dict[str, int]]]]:
    """Begin, end, name and annotations of each slice, by the name of its track."""
    content = Trace()
    content.ParseFromString(path.read_bytes())
    tracks = {
        packet.track_descriptor.uuid: packet.track_descriptor.name
        for packet in content.packet
        if packet.HasField("track_descriptor")
    }
    assert list(tracks.values()) == [engine.name for engine in Engine]
    found, begun = defaultdict(list), {}
    for packet in content.packet:
        if not packet.HasField("track_event"):
            continue
        event = packet.track_event
        if event.type == TrackEvent.TYPE_SLICE_BEGIN:
            assert event.track_uuid not in begun, "slices of a track must not overlap"
            begun[event.track_uuid] = packet
        else:
            first = begun.pop(event.track_uuid)
            notes = {a.name: a.int_value for a in first.track_event.debug_annotations}
            found[tracks[event.track_uuid]].append(
                (first.timestamp, packet.timestamp, first.track_event.name, notes)
            )
    assert not begun
    return found


def test_commands_become_slices(program, tmp_path):
    """One that is taken while another runs begins where that one ends; one whose START was dropped
    is left out."""
    start, end = TraceKind.START, TraceKind.END
    last = len(program.command_layers) - 1
    path = tmp_path / "t.pftrace"
    write_timeline(
        path,
        program,
        trace(
            [
                (start, Engine.LOAD, 0, 5, 2),
                (start, Engine.CONV, last, 8, 0),
                (start, Engine.LOAD, 1, 10, 0),
                (end, Engine.LOAD, 0, 20, 3),
                (end, Engine.STORE, 2, 25, 0),
                (end, Engine.LOAD, 1, 30, 0),
                (end, Engine.CONV, last, 40, 1),
            ]
        ),
    )
    names = [program.layers[program.command_layers[i]].name for i in (0, 1, last)]
    assert slices(path) == {
        "LOAD": [
            (5, 20, names[0], {"command": 0, "waited": 2, "stalled": 3}),
            (20, 30, names[1], {"command": 1, "waited": 0, "stalled": 0}),
        ],
        "CONV": [(8, 40, names[2], {"command": last, "waited": 0, "stalled": 1})],
    }


def test_no_events_make_empty_tracks(program, tmp_path):
    path = tmp_path / "t.pftrace"
    write_timeline(path, program, trace([]))
    assert slices(path) == {}
