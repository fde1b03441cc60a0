"""The golden model in numpy, and onnxruntime as its oracle."""
