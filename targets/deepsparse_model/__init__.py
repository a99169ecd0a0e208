"""What the DeepSparse target adds to the ONNX passes."""
