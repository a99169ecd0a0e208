"""Quantization as pure functions over tensors: schemes, observers, affine arithmetic. No graph, no files."""

from graphprune.quant.affine import choose_qparams, dequantize, fake_quantize, quantize, quantize_range
from graphprune.quant.observers import OBSERVERS, MinMax, MovingAverageMinMax, Observer
from graphprune.quant.schemes import ACTIVATION_UINT8, WEIGHT_INT8, QuantDtype, Scheme, parse_scheme

__all__ = [
    "ACTIVATION_UINT8",
    "OBSERVERS",
    "WEIGHT_INT8",
    "MinMax",
    "MovingAverageMinMax",
    "Observer",
    "QuantDtype",
    "Scheme",
    "choose_qparams",
    "dequantize",
    "fake_quantize",
    "parse_scheme",
    "quantize",
    "quantize_range",
]
