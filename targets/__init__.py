"""The targets of graphprune, one file each; ``__all__`` is what the registry finds."""

from graphprune.targets.deepsparse import DeepSparse
from graphprune.targets.inductor import Inductor
from graphprune.targets.ipex import Ipex
from graphprune.targets.onnx import Onnx
from graphprune.targets.openvino import OpenVino
from graphprune.targets.reference import Reference
from graphprune.targets.sparse_cpu import SparseCpu
from graphprune.targets.torch import Torch

__all__ = ["DeepSparse", "Inductor", "Ipex", "Onnx", "OpenVino", "Reference", "SparseCpu", "Torch"]
