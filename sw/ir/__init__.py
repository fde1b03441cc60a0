"""The quantised graph and the layout of its tensors in DRAM."""
