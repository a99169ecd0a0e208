"""ONNX (being written)."""
