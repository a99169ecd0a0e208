"""The targets of graphprune, one file each; ``__all__`` is what the registry finds."""

from graphprune.targets.onnx import Onnx

__all__ = ["Onnx"]
