"""The demo: a real pretrained transformer becomes a 4x1-sparse int8 ONNX file that is proven to be so."""
