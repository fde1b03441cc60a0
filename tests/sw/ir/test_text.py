"""A graph as text."""

from systole.sw.ir.text import render
from tests.helpers.small_graphs import clamp, conv, graph


def test_a_line_for_each_port_and_operator():
    lines = render(graph([conv("x", "a"), clamp("a", "b", -5, 127)], ["b"])).splitlines()
    assert lines[0] == "graph 'small'"
    assert lines[1] == "input 'x' (int8) -> 'x' int8[1, 4, 3, 3] scale 0.1 zero 0"
    assert lines[2].startswith(
        "'a' int8[1, 4, 3, 3] scale 0.1 zero 1 = Conv 'a_node' (Conv): x 'x'"
    )
    assert "weights int8[4, 4, 1, 1]" in lines[2] and "clamp -100..100" in lines[2]
    assert "group" not in lines[2]  # the default
    assert lines[3].endswith("pads [0, 0, 0, 0], clamp -5..127")
    assert lines[4:] == ["output 'b' (int8) <- 'b'"]
