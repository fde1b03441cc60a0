"""A small trained network on handwritten digits: the model, its test set, how both were made."""

from pathlib import Path

MODEL = Path(__file__).with_name("digits.onnx")
TEST_SET = Path(__file__).with_name("test.npz")
"""``x`` float32 (360, 1, 8, 8) as the model takes it, ``y`` int64 (360,)."""
