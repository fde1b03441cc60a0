"""cocotb benches of the blocks and of the whole accelerator."""
