"""Networks of the zoo, and their runs on the RTL at 16x16, once for all tests of a process."""

from __future__ import annotations

import functools

from systole.isa import Config
from systole.sw.cli import bench
from systole.sw.ir.graph import Graph
from systole.sw.report.results import Measurement


@functools.cache
def load_network(name: str) -> Graph:
    return bench.load_network(name)


@functools.cache
def measured(name: str) -> Measurement:
    return bench.measured(name, load_network(name), Config())
