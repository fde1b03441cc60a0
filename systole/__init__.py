"""Systole: a generator of int8 inference accelerators, with its compiler, golden model and
simulators."""
