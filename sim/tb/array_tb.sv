// The systolic array alone, with nothing around it: a vector every cycle, a tile of weights every TILE
// cycles, for +cycles=N cycles. What the whole system's simulation rate is compared with.
`timescale 1ns / 1ps

module array_tb #(
    parameter int ROWS = 16,
    parameter int COLS = 16,
    parameter int TILE = 256,
    parameter int CAPTURE_LEAD = 13
);
    logic clk = 0;
    always #1 clk = !clk;

    logic [8*ROWS-1:0] x = 1;
    logic [8*COLS-1:0] weights = 3;
    int cycle = 0, cycles;
    initial
        if (!$value$plusargs("cycles=%d", cycles)) $fatal(1, "+cycles=N is missing");

    always @(posedge clk) begin
        cycle <= cycle + 1;
        // xorshift, so that about every other bit toggles
        x <= x ^ (x << 13) ^ ((x ^ (x << 13)) >> 7);
        weights <= weights ^ (weights << 11) ^ ((weights ^ (weights << 11)) >> 5);
        if (cycle == cycles) $finish;
    end

    logic [31:0] sums, seen = 0;
    always @(posedge clk) seen <= seen ^ sums;
    final $display("%h", seen);  // so that nothing is optimised away

    array_alone array (
        .sums(sums),
        .clk(clk),
        .rst(cycle < 2),
        .x(x),
        .valid(1'b1),
        .weights(weights),
        .capture(cycle % TILE == TILE - CAPTURE_LEAD),
        .swap(cycle % TILE == 0)
    );
endmodule
