"""Networks of the zoo, and their runs on the RTL at 16x16, once for all tests of a process."""

from __future__ import annotations

import functools

from isa import Config
from sw import bench
from sw.bench import Result
from sw.graph import Graph


@functools.cache
def load_network(name: str) -> Graph:
    return bench.load_network(name)


@functools.cache
def measured(name: str) -> Result:
    return bench.measured(name, load_network(name), Config())
