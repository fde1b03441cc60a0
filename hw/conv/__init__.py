"""The convolution engine: systolic array and its sequencer."""
