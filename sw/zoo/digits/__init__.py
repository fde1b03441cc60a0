"""Small trained networks on handwritten digits, their test set, and how all of it was made."""

from pathlib import Path

MODEL = Path(__file__).with_name("digits.onnx")
TRANSFORMER = Path(__file__).with_name("vit.onnx")
"""A vision transformer on the same digits."""
TEST_SET = Path(__file__).with_name("test.npz")
"""``x`` float32 (360, 1, 8, 8) as the model takes it, ``y`` int64 (360,)."""
