"""What can be measured, and how a result is known to be current."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from systole.hw.synthesis import ecp5, yosys
from systole.hw.synthesis.__main__ import app
from systole.hw.synthesis.blocks import BLOCKS, design, rtl_hash, small, split
from systole.hw.synthesis.results import PARTS, TARGETS, Job, Store, measure, plan


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_is_what_the_chip_has(block):
    built = design(block, small(4, 4, row_ops=True), {})
    assert built.signature.members
    assert BLOCKS[block].instances(small(4, 4, row_ops=True)) >= 1


def test_settings_are_fields_or_parameters():
    config, given = split({"rows": 8, "trace": False, "lanes": 2}, None)
    assert (config.rows, config.cols, config.trace, given) == (8, 4, False, {"lanes": 2})


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["nothing"], "no block 'nothing'"),
        (["conv.array:Nothing"], "no block"),
        (["array", "--set", "lanes=4"], "SystolicArray has no parameter 'lanes'"),
        (["array", "--set", "rows"], "must be NAME=NUMBER"),
        (["array", "--set", "rows=100"], "must be 4..64"),
        (["array", "--config", "none.toml"], "none.toml"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert sentence in result.output and len(result.output.splitlines()) == 1


def test_a_device_that_is_too_small():
    area = ecp5.Area(lut=1, carry=0, small_ram=0, ff=0, dsp=157, ram=0)
    with pytest.raises(yosys.ToolError, match="157 MULT18X18D are needed, it has 156"):
        ecp5._need_room(area)


def test_a_result_is_kept_until_the_rtl_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(yosys, "version", lambda package: "1")
    counted = []
    target = TARGETS["generic"]
    monkeypatch.setitem(
        TARGETS,
        "generic",
        type(target)(target.device, target.tools, lambda d: counted.append(d) or {"ge": 1}),
    )
    job = Job("output-walk", 4, 4, "generic")
    store = Store(tmp_path / "kept" / "now.json")
    assert measure(job, store)
    assert not measure(job, Store(store.path))
    monkeypatch.setattr(yosys, "version", lambda package: "2")
    assert measure(job, Store(store.path), only_check=True)
    assert len(counted) == 1 and store.get(job) == {"ge": 1}


def test_the_hash_is_of_the_rtl(tmp_path):
    hashes = []
    for i, lines in enumerate(("a\n", "// a tool's version\na\n", "b\n")):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / "top.sv").write_text(lines)
        hashes.append(rtl_hash(tmp_path / f"{i}"))
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_plan_names_blocks_and_targets_that_exist():
    jobs = list(plan())
    assert len({job.label for job in jobs}) == len(jobs)
    assert all(job.block in BLOCKS and job.target in TARGETS for job in jobs)
    assert set(PARTS) <= set(BLOCKS)


RTL = r"""
module \top.window.reduce (input clk, input signed [7:0] a, b, output reg signed [15:0] o);
  always @(posedge clk) o <= a * b;
endmodule
module top(
  input clk, input signed [7:0] a, b, c, output signed [15:0] o, output reg signed [15:0] p);
  \top.window.reduce reduce (.clk(clk), .a(a), .b(b), .o(o));
  always @(posedge clk) p <= a * c + o;
endmodule
"""


@pytest.mark.parametrize("available, multipliers, soft", [(2, 2, False), (1, 1, True)])
def test_where_multipliers_run_out_some_products_are_luts(
    tmp_path, monkeypatch, available, multipliers, soft
):
    pytest.importorskip("pyosys", reason="pyosys is not installed: the extra synth")
    (tmp_path / "top.sv").write_text(RTL)
    monkeypatch.setitem(ecp5.AVAILABLE, "dsp", available)
    found = ecp5.synthesise(tmp_path)
    assert (found.area.dsp, found.soft) == (multipliers, soft)
