"""What a system on chip needs of the generated hardware beside the hardware itself."""
