"""Trace events as a timeline for https://ui.perfetto.dev: one track per engine, one slice per
command."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import TrackEvent
from perfetto.trace_builder.proto_builder import TraceProtoBuilder

from systole.isa import Engine, TraceKind
from systole.sw.files import write_atomically
from systole.sw.runtime.program import Program

SEQUENCE = 1


def write_timeline(path: str | Path, program: Program, events: Iterable[Mapping[str, int]]) -> None:
    """Write the timeline; one cycle is shown as one nanosecond. A command that an engine takes
    while it works on another begins where that one ends."""
    builder = TraceProtoBuilder()
    for engine in Engine:
        track = builder.add_packet().track_descriptor
        track.uuid = engine + 1
        track.name = engine.name
    starts: dict[int, Mapping[str, int]] = {}
    ends = dict.fromkeys(Engine, 0)
    for event in events:
        index = int(event["index"])
        if event["kind"] == TraceKind.START:
            starts[index] = event
            continue
        engine, start = Engine(int(event["engine"])), starts.pop(index, None)
        if start is None:  # its START was dropped
            continue
        begin = max(int(start["cycle"]), ends[engine])
        ends[engine] = int(event["cycle"])
        packet = builder.add_packet()
        packet.timestamp = begin
        packet.trusted_packet_sequence_id = SEQUENCE
        slice_begin = packet.track_event
        slice_begin.type = TrackEvent.TYPE_SLICE_BEGIN
        slice_begin.track_uuid = engine + 1
        slice_begin.name = program.layers[program.command_layers[index]].name or f"command {index}"
        for key, value in (
            ("command", index),
            ("waited", int(start["waited"])),
            ("stalled", int(event["stalled"])),
        ):
            annotation = slice_begin.debug_annotations.add()
            annotation.name, annotation.int_value = key, value
        packet = builder.add_packet()
        packet.timestamp = ends[engine]
        packet.trusted_packet_sequence_id = SEQUENCE
        packet.track_event.type = TrackEvent.TYPE_SLICE_END
        packet.track_event.track_uuid = engine + 1
    write_atomically(path, builder.serialize())
