"""AXI4 channels and managers, and the interfaces between the blocks."""
