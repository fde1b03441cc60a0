"""The registers as SystemRDL, read back by a compiler of it."""

from __future__ import annotations

import pytest
from systemrdl import RDLCompiler
from systemrdl.node import FieldNode, RegNode

from systole.isa import CSRS, DEVICE_ID
from systole.isa.csr import Control, Fault, Status
from systole.isa.tools.systemrdl import registers


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, RegNode]:
    path = tmp_path_factory.mktemp("rdl") / "systole.rdl"
    path.write_text(registers())
    compiler = RDLCompiler()
    compiler.compile_file(str(path))
    top = compiler.elaborate().top
    return {node.inst_name: node for node in top.children() if isinstance(node, RegNode)}


def test_every_register_is_at_its_offset(compiled):
    assert {name: r.absolute_address for name, r in compiled.items()} == {
        c.name: c.offset for c in CSRS.values()
    }


def test_access_follows_the_declaration(compiled):
    for register in CSRS.values():
        node = compiled[register.name]
        assert node.has_sw_writable == (register.access != "ro"), register.name
        kept = sum((1 << f.high + 1) - (1 << f.low) for f in node.fields() if f.is_sw_writable)
        if register.mask:
            assert kept == register.mask, register.name


def fields(node: RegNode) -> dict[str, FieldNode]:
    return {f.inst_name: f for f in node.fields()}


def test_bits_and_values(compiled):
    for name, flags in (("CONTROL", Control), ("STATUS", Status)):
        bits = {f: 1 << node.low for f, node in fields(compiled[name]).items()}
        assert bits == {flag.name: flag.value for flag in flags}
    encoded = fields(compiled["FAULT_CODE"])["value"].get_property("encode")
    assert {m.name: m.value for m in encoded} == {f.name: f.value for f in Fault}
    assert fields(compiled["ID"])["value"].get_property("reset") == DEVICE_ID
    state = {n: (f.low, f.high) for n, f in fields(compiled["CONV_STATE"]).items()}
    assert state == {"state": (0, 1), "missing": (8, 15), "head": (16, 31)}
