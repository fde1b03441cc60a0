"""The window engine: pooling, depthwise convolution, im2col."""
