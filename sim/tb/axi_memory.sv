// AXI4 subordinate memory backed by a file that the host maps too: what the host writes while the
// simulation stands still is there at once, and the file's size is the memory's size.
//
// Reads are answered in order, `read_latency` cycles after the address handshake (at least 2), any
// number (up to DEPTH) outstanding; write responses `write_latency` cycles after the last beat.
// Each direction moves at most `rate_beats` beats in `rate_cycles` cycles. `stall_*` is the
// probability in 1/256 of holding a channel back in a cycle. Bytes error_first..error_last answer
// `error_response` on reads and/or writes; beats outside the file answer DECERR.
// A violation of the AXI protocol ends the simulation with a message starting with PROTOCOL.

`timescale 1ns / 1ps

module axi_memory #(
    parameter int DATA_BITS = 128,
    parameter int ADDR_BITS = 40,
    parameter int ID_BITS = 1,
    parameter int BURST_BEATS = 64,
    parameter int DEPTH = 256
) (
    input logic clk,
    input logic rst,

    input logic reopen,
    input logic [15:0] read_latency,
    input logic [15:0] write_latency,
    input logic [15:0] rate_beats,
    input logic [15:0] rate_cycles,
    input logic [7:0] stall_ar,
    input logic [7:0] stall_r,
    input logic [7:0] stall_aw,
    input logic [7:0] stall_w,
    input logic [7:0] stall_b,
    input logic [63:0] seed,
    input logic [63:0] error_first,
    input logic [63:0] error_last,
    input logic [1:0] error_response,
    input logic error_read,
    input logic error_write,

    input logic [ADDR_BITS-1:0] araddr,
    input logic [7:0] arlen,
    input logic [2:0] arsize,
    input logic [1:0] arburst,
    input logic [ID_BITS-1:0] arid,
    input logic arvalid,
    output logic arready,
    output logic [DATA_BITS-1:0] rdata,
    output logic [1:0] rresp,
    output logic rlast,
    output logic [ID_BITS-1:0] rid,
    output logic rvalid,
    input logic rready,

    input logic [ADDR_BITS-1:0] awaddr,
    input logic [7:0] awlen,
    input logic [2:0] awsize,
    input logic [1:0] awburst,
    input logic [ID_BITS-1:0] awid,
    input logic awvalid,
    output logic awready,
    input logic [DATA_BITS-1:0] wdata,
    input logic [DATA_BITS/8-1:0] wstrb,
    input logic wlast,
    input logic wvalid,
    output logic wready,
    output logic [1:0] bresp,
    output logic [ID_BITS-1:0] bid,
    output logic bvalid,
    input logic bready
);
    localparam int BYTES = DATA_BITS / 8;
    localparam int SIZE = $clog2(BYTES);
    localparam int INDEX = $clog2(DEPTH);
    localparam logic [1:0] DECERR = 2'b11;

    // The backing file -----------------------------------------------------------------------------

    string path;
    logic [63:0] memory_bytes = 0;

`ifdef VERILATOR
    import "DPI-C" function void systole_memory_open(input string path, input longint bytes);
    import "DPI-C" function void systole_memory_read(
        input longint address, input int bytes, output bit [DATA_BITS-1:0] word);
    import "DPI-C" function void systole_memory_write(
        input longint address, input int bytes, input bit [DATA_BITS-1:0] word,
        input bit [BYTES-1:0] strobe);

    initial begin
        if ($value$plusargs("memory=%s", path) && $value$plusargs("memory_bytes=%d", memory_bytes))
            systole_memory_open(path, memory_bytes);
        else $fatal(1, "plusargs +memory=PATH and +memory_bytes=N are missing");
    end
`else
    integer file = 0;
    integer unused;
    logic [7:0] buffer[0:BYTES-1];

    initial begin
        if ($value$plusargs("memory=%s", path) && $value$plusargs("memory_bytes=%d", memory_bytes))
            file = $fopen(path, "r+b");
        if (file == 0) $fatal(1, "plusargs +memory=PATH and +memory_bytes=N are missing or wrong");
    end

    // Drops what the C library has buffered: the host may have changed the file.
    always @(reopen) begin
        if (file != 0) $fclose(file);
        file = $fopen(path, "r+b");
    end

    task automatic systole_memory_read(input logic [63:0] address, input int bytes,
                                       output logic [DATA_BITS-1:0] word);
        unused = $fseek(file, address, 0);
        unused = $fread(buffer, file);
        for (int i = 0; i < BYTES; i++) word[8*i+:8] = buffer[i];
    endtask

    task automatic systole_memory_write(
        input logic [63:0] address, input int bytes, input logic [DATA_BITS-1:0] word,
        input logic [BYTES-1:0] strobe);
        for (int i = 0; i < BYTES; i++)
            if (strobe[i]) begin
                unused = $fseek(file, address + i, 0);
                $fwrite(file, "%c", word[8*i+:8]);
            end
        $fflush(file);
    endtask
`endif

    // Pace -----------------------------------------------------------------------------------------

    logic [63:0] cycle = 0;
    logic [63:0] random;
    logic held_ar, held_r, held_aw, held_w, held_b;

    wire stalls = |{stall_ar, stall_r, stall_aw, stall_w, stall_b};
    wire [63:0] random_a = random ^ (random << 13);
    wire [63:0] random_b = random_a ^ (random_a >> 7);

    always @(posedge clk) begin
        cycle <= cycle + 1;
        if (rst) random <= seed | 64'd1;
        else if (stalls) random <= random_b ^ (random_b << 17);
        held_ar <= random[7:0] < stall_ar;
        held_r <= random[15:8] < stall_r;
        held_aw <= random[23:16] < stall_aw;
        held_w <= random[31:24] < stall_w;
        held_b <= random[39:32] < stall_b;
    end

    // A direction's credit grows by `beats` a cycle and a beat costs `cost`. They are registers, so
    // that no logic hangs on what Python may change: Verilator would evaluate it at every edge.
    logic [16:0] read_credit, write_credit;
    logic [15:0] beats = 1, cost = 1;
    logic paced = 0;

    always @(posedge clk) begin
        beats <= rate_beats;
        cost <= rate_cycles;
        paced <= rate_beats < rate_cycles;
    end

    function automatic logic [16:0] next_credit(input logic [16:0] credit, input logic spend,
                                                input logic [15:0] gain, input logic [15:0] price);
        logic [17:0] sum;
        sum = credit + gain - (spend ? price : 0);
        return sum > 2 * price ? 2 * price : sum;
    endfunction

    // Reads ----------------------------------------------------------------------------------------

    logic [63:0] ar_address[0:DEPTH-1];
    logic [63:0] ar_due[0:DEPTH-1];
    logic [7:0] ar_length[0:DEPTH-1];
    logic [ID_BITS-1:0] ar_id[0:DEPTH-1];
    logic [INDEX:0] ar_head, ar_tail;
    logic [7:0] r_beat;

    wire [INDEX:0] ar_level = ar_tail - ar_head;
    assign arready = !held_ar && !ar_level[INDEX] && !rst;
    wire r_start = ar_level != 0 && ar_due[ar_head[INDEX-1:0]] <= cycle && !held_r
        && (!paced || read_credit >= cost);
    wire r_spend = r_start && (!rvalid || rready);

    function automatic logic [1:0] response(input logic [63:0] address, input logic enable);
        if (address + BYTES > memory_bytes) return DECERR;
        if (enable && address + BYTES > error_first && address <= error_last)
            return error_response;
        return 0;
    endfunction

    always @(posedge clk) begin : reads
        logic [63:0] address;
        logic [DATA_BITS-1:0] word;
        if (paced) read_credit <= next_credit(read_credit, r_spend, beats, cost);
        if (arvalid && arready) begin
            ar_address[ar_tail[INDEX-1:0]] <= {{(64 - ADDR_BITS) {1'b0}}, araddr};
            ar_due[ar_tail[INDEX-1:0]] <= cycle + read_latency - 1;
            ar_length[ar_tail[INDEX-1:0]] <= arlen;
            ar_id[ar_tail[INDEX-1:0]] <= arid;
            ar_tail <= ar_tail + 1;
        end
        if (!rvalid || rready) begin
            rvalid <= r_start;
            if (r_start) begin
                address = (ar_address[ar_head[INDEX-1:0]] & ~64'(BYTES - 1)) + r_beat * BYTES;
                rresp <= response(address, error_read);
                if (address + BYTES <= memory_bytes) systole_memory_read(address, BYTES, word);
                else word = 0;
                rdata <= word;
                rid <= ar_id[ar_head[INDEX-1:0]];
                rlast <= r_beat == ar_length[ar_head[INDEX-1:0]];
                r_beat <= r_beat + 1;
                if (r_beat == ar_length[ar_head[INDEX-1:0]]) begin
                    r_beat <= 0;
                    ar_head <= ar_head + 1;
                end
            end
        end
        if (rst) begin
            ar_head <= 0;
            ar_tail <= 0;
            r_beat <= 0;
            rvalid <= 0;
            read_credit <= 0;
        end
    end

    // Writes ---------------------------------------------------------------------------------------

    logic [63:0] aw_address[0:DEPTH-1];
    logic [7:0] aw_length[0:DEPTH-1];
    logic [ID_BITS-1:0] aw_id[0:DEPTH-1];
    logic [INDEX:0] aw_head, aw_tail;
    logic [63:0] b_due[0:DEPTH-1];
    logic [1:0] b_response[0:DEPTH-1];
    logic [ID_BITS-1:0] b_id[0:DEPTH-1];
    logic [INDEX:0] b_head, b_tail;
    logic [7:0] w_beat;
    logic [1:0] w_response;

    wire [INDEX:0] aw_level = aw_tail - aw_head;
    wire [INDEX:0] b_level = b_tail - b_head;
    assign awready = !held_aw && !aw_level[INDEX] && !rst;
    assign wready = aw_level != 0 && !b_level[INDEX] && !held_w && !rst
        && (!paced || write_credit >= cost);
    wire b_start = b_level != 0 && b_due[b_head[INDEX-1:0]] <= cycle && !held_b;

    always @(posedge clk) begin : writes
        logic [63:0] address;
        logic [1:0] answer;
        if (paced)
            write_credit <= next_credit(write_credit, wvalid && wready, beats, cost);
        if (awvalid && awready) begin
            aw_address[aw_tail[INDEX-1:0]] <= {{(64 - ADDR_BITS) {1'b0}}, awaddr};
            aw_length[aw_tail[INDEX-1:0]] <= awlen;
            aw_id[aw_tail[INDEX-1:0]] <= awid;
            aw_tail <= aw_tail + 1;
        end
        if (wvalid && wready) begin
            address = (aw_address[aw_head[INDEX-1:0]] & ~64'(BYTES - 1)) + w_beat * BYTES;
            answer = response(address, error_write) | w_response;
            if (address + BYTES <= memory_bytes)
                systole_memory_write(address, BYTES, wdata, wstrb);
            w_response <= answer;
            w_beat <= w_beat + 1;
            if (w_beat == aw_length[aw_head[INDEX-1:0]]) begin
                w_beat <= 0;
                w_response <= 0;
                aw_head <= aw_head + 1;
                b_due[b_tail[INDEX-1:0]] <= cycle + write_latency - 1;
                b_response[b_tail[INDEX-1:0]] <= answer;
                b_id[b_tail[INDEX-1:0]] <= aw_id[aw_head[INDEX-1:0]];
                b_tail <= b_tail + 1;
            end
            if (wlast != (w_beat == aw_length[aw_head[INDEX-1:0]]))
                $fatal(1, "PROTOCOL: WLAST = %0d on beat %0d of a burst of %0d", wlast, w_beat + 1,
                       aw_length[aw_head[INDEX-1:0]] + 1);
        end
        if (!bvalid || bready) begin
            bvalid <= b_start;
            if (b_start) begin
                bresp <= b_response[b_head[INDEX-1:0]];
                bid <= b_id[b_head[INDEX-1:0]];
                b_head <= b_head + 1;
            end
        end
        if (rst) begin
            aw_head <= 0;
            aw_tail <= 0;
            b_head <= 0;
            b_tail <= 0;
            w_beat <= 0;
            w_response <= 0;
            bvalid <= 0;
            write_credit <= 0;
        end
    end

    // Protocol -------------------------------------------------------------------------------------

    task automatic check_burst(input string name, input logic [ADDR_BITS-1:0] address,
                               input logic [7:0] length, input logic [2:0] size,
                               input logic [1:0] burst);
        if (burst != 2'b01) $fatal(1, "PROTOCOL: %s burst type %0d is not INCR", name, burst);
        if (size != SIZE) $fatal(1, "PROTOCOL: %s size %0d is not %0d", name, size, SIZE);
        if (length >= BURST_BEATS)
            $fatal(1, "PROTOCOL: %s burst of %0d beats exceeds %0d", name, length + 1, BURST_BEATS);
        if ((address & 4095 & ~(BYTES - 1)) + (length + 1) * BYTES > 4096)
            $fatal(1, "PROTOCOL: %s burst of %0d beats at 0x%h crosses a 4 KiB boundary", name,
                   length + 1, address);
    endtask

    // A payload that was not taken must be the same in the next cycle.
    logic ar_kept = 0, aw_kept = 0, w_kept = 0;
    logic [ADDR_BITS+7:0] ar_payload, aw_payload;
    logic [DATA_BITS+BYTES:0] w_payload;

    always @(posedge clk) begin
        if (!rst) begin
            if (arvalid && arready) check_burst("AR", araddr, arlen, arsize, arburst);
            if (awvalid && awready) check_burst("AW", awaddr, awlen, awsize, awburst);
            if (ar_kept)
                if (!(arvalid && ar_payload == {araddr, arlen}))
                    $fatal(1, "PROTOCOL: AR changed or dropped before it was taken");
            if (aw_kept)
                if (!(awvalid && aw_payload == {awaddr, awlen}))
                    $fatal(1, "PROTOCOL: AW changed or dropped before it was taken");
            if (w_kept)
                if (!(wvalid && w_payload == {wdata, wstrb, wlast}))
                    $fatal(1, "PROTOCOL: W changed or dropped before it was taken");
`ifndef VERILATOR
            if (^{arvalid, rready, awvalid, wvalid, bready} === 1'bx)
                $fatal(1, "PROTOCOL: an AXI handshake signal is X");
`endif
        end
        ar_kept <= arvalid && !arready && !rst;
        aw_kept <= awvalid && !awready && !rst;
        w_kept <= wvalid && !wready && !rst;
        if (arvalid && !arready) ar_payload <= {araddr, arlen};
        if (awvalid && !awready) aw_payload <= {awaddr, awlen};
        if (wvalid && !wready) w_payload <= {wdata, wstrb, wlast};
    end
endmodule
