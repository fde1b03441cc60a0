"""Simulation of compiled programs: command level, races, cycles."""
