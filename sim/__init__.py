"""Simulation of the RTL: testbench, memory model, building of simulators, device and benches."""
