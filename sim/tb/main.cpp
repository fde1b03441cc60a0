// The main program of a simulator clocked from here: VPI, and so Python, comes to its turn only
// when the host port has finished an operation or one of its timers is due; the clock runs between.
#include <algorithm>
#include <cstdint>
#include <memory>

#include "Vtop.h"
#include "Vtop___024root.h"
#include "verilated.h"
#include "verilated_vpi.h"

static constexpr uint64_t HALF_PERIOD = 1000;  // ps

static uint64_t now;

double sc_time_stamp() { return now; }

extern "C" void vlog_startup_routines_bootstrap();

static void settle() {
    while (VerilatedVpi::callValueCbs()) {
    }
}

// One time step, all its regions.
static void step(Vtop &top) {
    do {
        do {
            top.eval_step();
            VerilatedVpi::clearEvalNeeded();
            VerilatedVpi::doInertialPuts();
            settle();
        } while (VerilatedVpi::evalNeeded());
        VerilatedVpi::callCbs(cbReadWriteSynch);
        VerilatedVpi::doInertialPuts();
        settle();
    } while (VerilatedVpi::evalNeeded());
    top.eval_end_step();
    VerilatedVpi::callCbs(cbReadOnlySynch);
}

static void end() { VerilatedVpi::callCbs(cbEndOfSimulation); }

int main(int argc, char **argv) {
    Verilated::commandArgs(argc, argv);
    const std::unique_ptr<Vtop> top{new Vtop("")};
    CData &clk = top->rootp->systole_tb__DOT__clk;
    const CData &done = top->rootp->systole_tb__DOT__host_done;
    Verilated::fatalOnVpiError(false);
    vlog_startup_routines_bootstrap();
    Verilated::addExitCb([](void *) { end(); }, nullptr);
    VerilatedVpi::callCbs(cbStartOfSimulation);
    settle();

    uint64_t edge = HALF_PERIOD;
    while (!Verilated::gotFinish()) {
        step(*top);
        const uint64_t timer = VerilatedVpi::cbNextDeadline();
        if (!VerilatedVpi::hasCbs(cbNextSimTime)) {
            const CData before = done;
            while (done == before && edge < timer && !Verilated::gotFinish()) {
                now = edge;
                edge += HALF_PERIOD;
                clk = !clk;
                top->eval_step();
            }
            if (done != before) continue;  // now, with VPI
        }
        now = std::min(timer, edge);
        VerilatedVpi::callCbs(cbNextSimTime);
        settle();
        VerilatedVpi::callTimedCbs();
        settle();
        if (now == edge) {
            edge += HALF_PERIOD;
            clk = !clk;
        }
    }
    top->final();
    end();
    return Verilated::threadContextp()->errorCount() > 0;
}
