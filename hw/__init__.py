"""The generator: Amaranth HDL for the whole accelerator. Imports :mod:`isa` only."""
