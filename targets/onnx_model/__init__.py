"""From a Program to an ONNX graph and back: what the targets that read ONNX share."""
