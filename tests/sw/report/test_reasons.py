"""Reasons of the host's operators: grouped, the real ones first."""

from systole.sw.compiler.placement import FOR_HOST, NodePlacement
from systole.sw.report.reasons import host_reasons


def on_host(op_type: str, name: str, rule: str, **more) -> NodePlacement:
    return NodePlacement(name, op_type, name, host=True, rule=rule, **more)


def test_equal_reasons_are_one_line_and_real_ones_come_first():
    cascade = dict(rule="because Softmax 's' runs on the host", because="Softmax 's'")
    placements = [
        on_host("Mul", "m", **cascade, macs=0),
        NodePlacement("c", "Conv", "c", host=False, rule="", macs=500),
        *(
            on_host("Reshape", f"r{i}", f"its result [{i}, 8] takes elements of 'x{i}' too far")
            for i in range(24)
        ),
        on_host("Softmax", "s", "operator not supported"),
        on_host("MatMul", "p0", **cascade, macs=70),
        on_host("MatMul", "p1", **cascade | dict(rule="because Softmax 'b' runs on the host")),
        on_host("QuantizeLinear", "q", **cascade),
        on_host("DequantizeLinear", "d", FOR_HOST),
    ]
    reasons = host_reasons(placements)
    assert [str(reason) for reason in reasons] == [
        "24 Reshape (first 'r0'): its result [0, 8] takes elements of 'x0' too far",
        "Softmax 's': operator not supported",
        "Mul, 2 MatMul (first 'm'): because Softmax 's' runs on the host",
    ]
    assert [reason.macs for reason in reasons] == [0, 0, 70]


def test_conversions_with_a_reason_of_their_own_are_named():
    (reason,) = host_reasons([on_host("DequantizeLinear", "d", "block_size = 16: it must be 0")])
    assert str(reason) == "DequantizeLinear 'd': block_size = 16: it must be 0"


def test_the_same_words_about_different_operators_stay_apart():
    placements = [on_host(op, op, "operator not supported") for op in ("LSTM", "Softmax")]
    assert len(host_reasons(placements)) == 2
