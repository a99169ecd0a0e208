"""Quantization as pure functions over tensors: schemes, observers, affine arithmetic, presets. No graph, no files."""

from graphprune.quant.affine import (
    choose_qparams,
    dequantize,
    dynamic_qparams,
    fake_quantize,
    quantize,
    quantize_range,
)
from graphprune.quant.histograms import EntropyHistogram, HistogramObserver, MeanSquaredError, Percentile
from graphprune.quant.observer_text import OBSERVERS, format_observer, parse_observer
from graphprune.quant.observers import MinMax, MovingAverageMinMax, Observer, State
from graphprune.quant.presets import OPERATORS, PRESETS, Preset, has_vnni, preset
from graphprune.quant.schemes import ACTIVATION_UINT8, WEIGHT_INT8, QuantDtype, Scheme, parse_scheme

__all__ = [
    "ACTIVATION_UINT8",
    "OBSERVERS",
    "OPERATORS",
    "PRESETS",
    "WEIGHT_INT8",
    "EntropyHistogram",
    "HistogramObserver",
    "MeanSquaredError",
    "MinMax",
    "MovingAverageMinMax",
    "Observer",
    "Percentile",
    "Preset",
    "QuantDtype",
    "Scheme",
    "State",
    "choose_qparams",
    "dequantize",
    "dynamic_qparams",
    "fake_quantize",
    "format_observer",
    "has_vnni",
    "parse_observer",
    "parse_scheme",
    "preset",
    "quantize",
    "quantize_range",
]
