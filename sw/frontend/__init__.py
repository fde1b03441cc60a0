"""From an ONNX file to the quantised graph."""
