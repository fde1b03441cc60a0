// Testbench top: clock, reset, the accelerator, its memory, and a host port for Python.
//
// The clock does not wait for Python, which sets host_*, flips host_go, and awaits one edge of
// host_done, however many cycles that takes. Results are in host_result and host_response.
//
//   host_op  does
//   WRITE    one AXI4-Lite write of host_data to host_address; response code in host_response
//   READ     one AXI4-Lite read; data in host_result
//   WAIT     until irq is high (host_result = 1) or host_data cycles have passed (0)
//   RUN      host_data cycles
//   RESET    host_data cycles of rst

`timescale 1ns / 1ps

module systole_tb #(
    parameter int DATA_BITS = 128,
    parameter int ADDR_BITS = 40,
    parameter int ID_BITS = 1,
    parameter int CSR_BITS = 9,
    parameter int BURST_BEATS = 64
) ();
    typedef enum logic [2:0] {WRITE, READ, WAIT, RUN, RESET} op_t;

    logic [2:0] host_op  /* verilator public_flat_rw */ = 0;
    logic [31:0] host_address  /* verilator public_flat_rw */ = 0;
    logic [31:0] host_data  /* verilator public_flat_rw */ = 0;
    logic host_go  /* verilator public_flat_rw */ = 0;
    logic host_done  /* verilator public_flat_rd */ = 0;
    logic [31:0] host_result  /* verilator public_flat_rd */ = 0;
    logic [1:0] host_response  /* verilator public_flat_rd */ = 0;
    logic [63:0] cycles  /* verilator public_flat_rd */ = 0;

    logic [15:0] read_latency  /* verilator public_flat_rw */ = 64;
    logic [15:0] write_latency  /* verilator public_flat_rw */ = 64;
    logic [15:0] rate_beats  /* verilator public_flat_rw */ = 1;
    logic [15:0] rate_cycles  /* verilator public_flat_rw */ = 1;
    logic [7:0] stall_ar  /* verilator public_flat_rw */ = 0;
    logic [7:0] stall_r  /* verilator public_flat_rw */ = 0;
    logic [7:0] stall_aw  /* verilator public_flat_rw */ = 0;
    logic [7:0] stall_w  /* verilator public_flat_rw */ = 0;
    logic [7:0] stall_b  /* verilator public_flat_rw */ = 0;
    logic [63:0] seed  /* verilator public_flat_rw */ = 1;
    logic [63:0] error_first  /* verilator public_flat_rw */ = 0;
    logic [63:0] error_last  /* verilator public_flat_rw */ = 0;
    logic [1:0] error_response  /* verilator public_flat_rw */ = 2;
    logic error_read  /* verilator public_flat_rw */ = 0;
    logic error_write  /* verilator public_flat_rw */ = 0;

`ifdef CLOCK_OUTSIDE  // main.cpp drives the clock, or cocotb for comparison
    logic clk  /* verilator public_flat_rw */ = 0;
`else
    logic clk = 0;
    always #1 clk = !clk;
`endif
    logic rst = 1;
    logic irq;

`ifndef VERILATOR
    string waves;
    initial
        if ($value$plusargs("waves=%s", waves)) begin
            $dumpfile(waves);
            $dumpvars(0, systole_tb);
        end
`endif

    logic [ADDR_BITS-1:0] araddr, awaddr;
    logic [7:0] arlen, awlen;
    logic [2:0] arsize, awsize;
    logic [1:0] arburst, awburst, rresp, bresp;
    logic [ID_BITS-1:0] arid, awid, rid, bid;
    logic arvalid, arready, rlast, rvalid, rready;
    logic awvalid, awready, wlast, wvalid, wready, bvalid, bready;
    logic [DATA_BITS-1:0] rdata, wdata;
    logic [DATA_BITS/8-1:0] wstrb;

    logic [CSR_BITS-1:0] csr_address = 0;
    logic [31:0] csr_wdata = 0, csr_rdata;
    logic [1:0] csr_bresp, csr_rresp;
    logic csr_awvalid = 0, csr_awready, csr_wvalid = 0, csr_wready, csr_bvalid;
    logic csr_arvalid = 0, csr_arready, csr_rvalid;

    systole dut (
        .clk(clk),
        .rst(rst),
        .irq(irq),
        .m_axi__araddr(araddr),
        .m_axi__arlen(arlen),
        .m_axi__arsize(arsize),
        .m_axi__arburst(arburst),
        .m_axi__arid(arid),
        .m_axi__arvalid(arvalid),
        .m_axi__arready(arready),
        .m_axi__rdata(rdata),
        .m_axi__rresp(rresp),
        .m_axi__rlast(rlast),
        .m_axi__rid(rid),
        .m_axi__rvalid(rvalid),
        .m_axi__rready(rready),
        .m_axi__awaddr(awaddr),
        .m_axi__awlen(awlen),
        .m_axi__awsize(awsize),
        .m_axi__awburst(awburst),
        .m_axi__awid(awid),
        .m_axi__awvalid(awvalid),
        .m_axi__awready(awready),
        .m_axi__wdata(wdata),
        .m_axi__wstrb(wstrb),
        .m_axi__wlast(wlast),
        .m_axi__wvalid(wvalid),
        .m_axi__wready(wready),
        .m_axi__bresp(bresp),
        .m_axi__bid(bid),
        .m_axi__bvalid(bvalid),
        .m_axi__bready(bready),
        .s_axil__awaddr(csr_address),
        .s_axil__awprot(3'b000),
        .s_axil__awvalid(csr_awvalid),
        .s_axil__awready(csr_awready),
        .s_axil__wdata(csr_wdata),
        .s_axil__wstrb(4'b1111),
        .s_axil__wvalid(csr_wvalid),
        .s_axil__wready(csr_wready),
        .s_axil__bresp(csr_bresp),
        .s_axil__bvalid(csr_bvalid),
        .s_axil__bready(1'b1),
        .s_axil__araddr(csr_address),
        .s_axil__arprot(3'b000),
        .s_axil__arvalid(csr_arvalid),
        .s_axil__arready(csr_arready),
        .s_axil__rdata(csr_rdata),
        .s_axil__rresp(csr_rresp),
        .s_axil__rvalid(csr_rvalid),
        .s_axil__rready(1'b1)
    );

    axi_memory #(
        .DATA_BITS(DATA_BITS),
        .ADDR_BITS(ADDR_BITS),
        .ID_BITS(ID_BITS),
        .BURST_BEATS(BURST_BEATS)
    ) memory (
        .reopen(host_go),
        .*
    );

    // Host port ------------------------------------------------------------------------------------

    typedef enum logic [1:0] {IDLE, ACCESS, COUNT} state_t;
    state_t state = IDLE;
    logic seen = 0;
    logic [31:0] left = 4;
    logic until_irq = 0;

    task automatic finish(input logic [31:0] result, input logic [1:0] response);
        host_result <= result;
        host_response <= response;
        host_done <= !host_done;
        state <= IDLE;
    endtask

    always @(posedge clk) begin
        cycles <= cycles + 1;
        // After power-on, too, reset is held for a few cycles.
        if (rst && left == 0) rst <= 0;
        if (left != 0) left <= left - 1;
        case (state)
            IDLE:
            if (host_go != seen && !rst) begin
                seen <= host_go;
                csr_address <= host_address[CSR_BITS-1:0];
                csr_wdata <= host_data;
                left <= host_data;
                until_irq <= host_op == WAIT;
                state <= COUNT;
                if (host_op == WRITE || host_op == READ) begin
                    csr_awvalid <= host_op == WRITE;
                    csr_wvalid <= host_op == WRITE;
                    csr_arvalid <= host_op == READ;
                    left <= 10000;
                    state <= ACCESS;
                end
                if (host_op == RESET) rst <= 1;
            end
            ACCESS: begin
                if (csr_awready) csr_awvalid <= 0;
                if (csr_wready) csr_wvalid <= 0;
                if (csr_arready) csr_arvalid <= 0;
                if (csr_bvalid) finish(0, csr_bresp);
                if (csr_rvalid) finish(csr_rdata, csr_rresp);
                if (left == 0)
                    $fatal(1, "PROTOCOL: no answer to the CSR access at 0x%h", csr_address);
            end
            COUNT: begin
                if (until_irq && irq) finish(1, 0);
                else if (left == 0) finish(0, 0);
            end
            default: ;
        endcase
    end
endmodule
