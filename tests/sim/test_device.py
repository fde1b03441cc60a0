"""The simulator device and its memory model, around a little copying machine instead of systole."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from systole.isa import Config
from systole.sim.build import BuildError, build
from systole.sim.device import MemoryModel, RtlDevice
from systole.sw.runtime.device import DeviceError
from systole.sw.session.backends import open_device
from tests.helpers.marks import needs_icarus
from tests.helpers.processes import hear_interrupts

pytestmark = pytest.mark.xdist_group("copier")

SOURCE, TARGET, BEATS, MODE, START, RESPONSE, CYCLES = range(0, 28, 4)
COPY, FAIL_ASSERTION, BAD_WLAST, BAD_STABILITY = range(4)
CONFIG = Config.sized(4, 4, axi_data_bits=64, axi_burst_beats=64)

COPIER = """
module systole (
    input logic clk, input logic rst, output logic irq,
    output logic [39:0] m_axi__araddr, output logic [7:0] m_axi__arlen,
    output logic [2:0] m_axi__arsize, output logic [1:0] m_axi__arburst, output logic m_axi__arid,
    output logic m_axi__arvalid, input logic m_axi__arready, input logic [63:0] m_axi__rdata,
    input logic [1:0] m_axi__rresp, input logic m_axi__rlast, input logic m_axi__rid,
    input logic m_axi__rvalid, output logic m_axi__rready,
    output logic [39:0] m_axi__awaddr, output logic [7:0] m_axi__awlen,
    output logic [2:0] m_axi__awsize, output logic [1:0] m_axi__awburst, output logic m_axi__awid,
    output logic m_axi__awvalid, input logic m_axi__awready, output logic [63:0] m_axi__wdata,
    output logic [7:0] m_axi__wstrb, output logic m_axi__wlast, output logic m_axi__wvalid,
    input logic m_axi__wready, input logic [1:0] m_axi__bresp, input logic m_axi__bid,
    input logic m_axi__bvalid, output logic m_axi__bready,
    input logic [ABITS-1:0] s_axil__awaddr, input logic [2:0] s_axil__awprot,
    input logic s_axil__awvalid, output logic s_axil__awready,
    input logic [31:0] s_axil__wdata, input logic [3:0] s_axil__wstrb,
    input logic s_axil__wvalid, output logic s_axil__wready,
    output logic [1:0] s_axil__bresp, output logic s_axil__bvalid, input logic s_axil__bready,
    input logic [ABITS-1:0] s_axil__araddr, input logic [2:0] s_axil__arprot,
    input logic s_axil__arvalid, output logic s_axil__arready, output logic [31:0] s_axil__rdata,
    output logic [1:0] s_axil__rresp, output logic s_axil__rvalid, input logic s_axil__rready
);
    // Registers by index: source, target, beats, mode, start, response, cycles. Index 9: bus error;
    // index 10: no answer.
    logic [31:0] source, target, beats, mode, cycles;
    logic [1:0] response;
    logic [63:0] line[0:255];
    logic [8:0] got, put;
    logic busy;
    wire write = s_axil__awvalid && s_axil__wvalid && !s_axil__bvalid;
    wire read = s_axil__arvalid && !s_axil__rvalid;
    wire start = write && s_axil__awaddr[5:2] == 4;
    assign s_axil__awready = write;
    assign s_axil__wready = write;
    assign s_axil__bresp = 0;
    assign s_axil__arready = read;
    assign m_axi__arlen = beats[7:0] - 1;
    assign m_axi__arsize = 3;
    assign m_axi__arburst = 1;
    assign m_axi__arid = 1;
    assign m_axi__araddr = {8'd0, source};
    assign m_axi__rready = 1;
    assign m_axi__awaddr = {8'd0, target};
    assign m_axi__awlen = beats[7:0] - 1;
    assign m_axi__awsize = 3;
    assign m_axi__awburst = 1;
    assign m_axi__awid = 0;
    assign m_axi__wdata = line[put[7:0]] ^ (mode == 3 ? {63'd0, clk} ^ cycles : 0);
    assign m_axi__wstrb = mode == 0 && put == 0 ? 8'hfe : 8'hff;
    assign m_axi__wlast = mode == 2 ? put == 0 : put + 1 == beats;
    assign m_axi__wvalid = busy && put < got;
    assign m_axi__bready = 1;
    always_ff @(posedge clk) begin
        if (s_axil__bready) s_axil__bvalid <= write;
        if (s_axil__rready) s_axil__rvalid <= read && s_axil__araddr[5:2] != 10;
        s_axil__rresp <= s_axil__araddr[5:2] == 9 ? 2 : 0;
        case (s_axil__araddr[5:2])
            0: s_axil__rdata <= source;
            5: s_axil__rdata <= response;
            6: s_axil__rdata <= cycles;
            default: s_axil__rdata <= 32'hx;
        endcase
        if (write) case (s_axil__awaddr[5:2])
            0: source <= s_axil__wdata;
            1: target <= s_axil__wdata;
            2: beats <= s_axil__wdata;
            3: mode <= s_axil__wdata;
            default: ;
        endcase
        if (m_axi__arready) m_axi__arvalid <= 0;
        if (m_axi__awready) m_axi__awvalid <= 0;
        if (m_axi__rvalid) begin
            line[got[7:0]] <= m_axi__rdata;
            got <= got + 1;
            response <= response | m_axi__rresp;
            assert (m_axi__rid == 1 && m_axi__rlast == (got + 1 == beats));
        end
        if (m_axi__wvalid && m_axi__wready) put <= put + 1;
        if (m_axi__bvalid) begin
            busy <= 0;
            irq <= 1;
            response <= response | m_axi__bresp;
        end
        if (busy) cycles <= cycles + 1;
        if (start) begin
            assert (mode != 1);
            m_axi__arvalid <= 1;
            m_axi__awvalid <= 1;
            busy <= 1;
            irq <= 0;
            got <= 0;
            put <= 0;
            response <= 0;
            cycles <= 0;
        end
        if (rst) begin
            irq <= 0; busy <= 0; mode <= 0; got <= 0; put <= 0;
            m_axi__arvalid <= 0; m_axi__awvalid <= 0; s_axil__bvalid <= 0; s_axil__rvalid <= 0;
        end
    end
endmodule
"""

SIMULATORS = [
    pytest.param("verilator"),
    pytest.param("icarus", marks=needs_icarus),
]


@pytest.fixture(scope="module")
def copier(tmp_path_factory):
    from systole.isa.csr import CSR_ADDR_BITS

    path = tmp_path_factory.mktemp("a copier") / "systole.sv"
    path.write_text(COPIER.replace("ABITS", str(CSR_ADDR_BITS)))
    return path


@pytest.fixture(params=SIMULATORS)
def opened(request, copier):
    """A function that opens the device; whatever it opened is closed in the end."""
    devices = []

    def opened(**options):
        devices.append(
            RtlDevice(CONFIG, simulator=request.param, memory_bytes=1 << 20, rtl=copier, **options)
        )
        return devices[-1]

    yield opened
    for device in devices:
        device.close()


def copy(device, source, target, beats, mode=COPY, timeout=5000):
    for register, value in ((SOURCE, source), (TARGET, target), (BEATS, beats), (MODE, mode)):
        device.write_csr(register, value)
    device.write_csr(START, 1)
    return device.wait_interrupt(timeout)


def test_copies_with_backpressure_many_programs_in_one_process(opened):
    rng = random.Random(7)
    device = opened(memory=MemoryModel.hostile(7))
    for _ in range(8):
        data = rng.randbytes(4096)
        device.write_memory(4096, data)
        device.write_memory(8192, bytes(4096))
        beats = rng.randint(1, 64)
        at = rng.randrange(0, 4096 - 8 * beats + 1, 8)
        assert copy(device, 4096 + at, 8192 + at, beats)
        # The first byte of the first beat is masked by its strobe.
        expected = bytes(at) + b"\0" + data[at + 1 : at + 8 * beats]
        assert device.read_memory(8192, 4096) == expected.ljust(4096, b"\0")
        assert device.read_csr(RESPONSE) == 0


def test_latency_and_rate_are_as_set(opened):
    device = opened(memory=MemoryModel(read_latency=2, write_latency=2))
    copy(device, 0, 4096, 64)
    fast = device.read_csr(CYCLES)
    # Latencies, beats, and one cycle from a beat read to that beat written.
    assert fast == 2 + 64 + 1 + 2
    device.set_memory_model(MemoryModel(read_latency=102, write_latency=52))
    copy(device, 0, 4096, 64)
    assert device.read_csr(CYCLES) == fast + 150
    device.set_memory_model(
        MemoryModel(read_latency=2, write_latency=2, rate_beats=2, rate_cycles=5)
    )
    copy(device, 0, 4096, 64)
    assert abs(device.read_csr(CYCLES) - (fast + 96)) <= 6


def test_errors_where_injected_and_beyond_the_memory(opened):
    device = opened()
    where = {"error_first": 4096 + 80, "error_last": 4096 + 80}
    for model, expected in (
        (MemoryModel(**where, error_read=True), 2),
        (MemoryModel(**where, error_read=True, error_response=3), 3),
        (MemoryModel(**where, error_write=True), 0),
    ):
        device.set_memory_model(model)
        assert copy(device, 4096, 8192, 11)
        assert device.read_csr(RESPONSE) == expected
        assert copy(device, 4096, 8192, 10)
        assert device.read_csr(RESPONSE) == 0
        assert copy(device, 8192, 4096, 11)
        assert device.read_csr(RESPONSE) == (2 if model.error_write else 0)
    assert copy(device, 4096, (1 << 20), 1)
    assert device.read_csr(RESPONSE) == 3


def test_wait_times_out_in_cycles_and_time_stands_still_otherwise(opened):
    device = opened()
    before = device.cycles
    assert device.wait_interrupt(2500) is False
    assert 2500 <= device.cycles - before <= 2520
    before = device.cycles
    time.sleep(0.1)
    assert device.cycles == before


def test_csr_error_is_an_exception_and_the_device_lives_on(opened):
    device = opened()
    device.write_csr(SOURCE, 0xDEADBEEF)
    with pytest.raises(DeviceError, match="CSR access at 0x24"):
        device.read_csr(9 * 4)
    assert device.read_csr(SOURCE) == 0xDEADBEEF


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4096 - 8, 8192, 2), "PROTOCOL: A[RW] burst of 2 beats at .* crosses a 4 KiB boundary"),
        ((0, 8192, 65), "PROTOCOL: A[RW] burst of 65 beats exceeds 64"),
        ((0, 8192, 4, BAD_WLAST), "PROTOCOL: WLAST = 1 on beat 1 of a burst of 4"),
        ((0, 8192, 64, BAD_STABILITY), "PROTOCOL: W changed or dropped"),
        ((0, 8192, 4, FAIL_ASSERTION), "(?i)assertion"),
    ],
)
def test_violations_end_the_simulation_with_a_message(opened, arguments, message):
    device = opened(memory=MemoryModel(stall_w=100))
    with pytest.raises(DeviceError, match=message):
        copy(device, *arguments)
    with pytest.raises(DeviceError, match="closed"):
        device.read_csr(SOURCE)


def test_unanswered_csr_access_ends_the_simulation(opened):
    device = opened()
    with pytest.raises(DeviceError, match=r"no answer to the CSR access at 0x0*28"):
        device.read_csr(10 * 4)


def test_dead_and_hung_simulators_are_reported(opened):
    device = opened()
    device._process.kill()
    with pytest.raises(DeviceError, match="died of SIGKILL"):
        device.read_csr(SOURCE)
    device = opened()
    device.patience = 1.5
    os.kill(device._process.pid, 19)
    with pytest.raises(DeviceError, match=r"no sign of life for 1.5 seconds"):
        device.read_csr(SOURCE)


WAITING = """
import sys
from pathlib import Path
from systole.isa.tools.interrupt import interruptible
with interruptible():
    from systole.sim.device import RtlDevice
    from tests.sim.test_device import CONFIG
    _, simulator, rtl = sys.argv
    with RtlDevice(CONFIG, simulator=simulator, memory_bytes=4096, rtl=Path(rtl)) as device:
        print(device._process.pid, flush=True)
        device.wait_interrupt(1 << 31)
"""
"""A program that waits for the simulator until it is interrupted."""


@pytest.mark.parametrize("whole_group", [False, True], ids=["kill", "terminal"])
@pytest.mark.parametrize("simulator", SIMULATORS)
def test_an_interrupt_ends_the_simulator(simulator, whole_group, copier, tmp_path):
    """One line, status 130, no process and no file left; a terminal signals the whole group."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, simulator, str(copier)],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
        preexec_fn=hear_interrupts,
    )
    child = int(process.stdout.readline())
    assert Path(f"/proc/{child}").exists()
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, errors) == (130, "interrupted\n")
    assert not Path(f"/proc/{child}").exists()
    assert not list(tmp_path.iterdir())


def test_waves(opened, tmp_path):
    device = opened(waves=tmp_path / "waves.vcd")
    copy(device, 0, 4096, 4)
    device.close()
    assert (tmp_path / "waves.vcd").stat().st_size > 5000


def test_memory_is_bounded_and_taken_only_where_touched(copier):
    with RtlDevice(CONFIG, memory_bytes=6 << 30, rtl=copier) as device:
        data = bytes(range(256)) * (16 << 10)
        device.write_memory(0, data)
        assert device.read_memory(0, len(data)) == data
        taken = (device._directory / "memory").stat().st_blocks * 512
        assert taken < 2 * len(data)
        with pytest.raises(ValueError, match="outside the device's"):
            device.write_memory((6 << 30) - 1, b"12")


def test_build_errors_name_the_error(tmp_path):
    (tmp_path / "systole.sv").write_text("module systole (input logic clk); wibble endmodule")
    with pytest.raises(BuildError, match="failed on the RTL"):
        build("verilator", CONFIG, rtl=tmp_path / "systole.sv")


def test_missing_simulators_say_what_to_install(monkeypatch, copier):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(DeviceError, match=r"^Icarus Verilog is not installed: .*\.$"):
        open_device("icarus", CONFIG, rtl=copier)
    with pytest.raises(ValueError, match="unknown device 'modelsim'; known: verilator"):
        open_device("modelsim", CONFIG)
