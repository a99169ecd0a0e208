"""Presets: what each runtime can execute in integers, as schemes, observers and operators to quantize."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from graphprune.errors import RecipeError, suggest
from graphprune.quant.schemes import ACTIVATION_UINT8, WEIGHT_INT8, QuantDtype, Scheme

OPERATORS = frozenset({"linear", "conv", "embedding", "matmul", "add"})
"""Operators that a preset may name: ``matmul`` multiplies two activations, ``add`` is the sum of a residual."""


@dataclass(frozen=True)
class Preset:
    """How to quantize for a runtime.

    Attributes:
        name: Its name.
        weights: Scheme of the weights of linear and conv operators, axis 0 their output channels.
        activations: Scheme of activations.
        embeddings: Scheme of embedding tables; None: they stay as they are.
        observer: Text of the observer of activations, for ``parse_observer``.
        weight_observer: Text of the observer of weights and embeddings.
        outputs: Whether outputs of convolutions and sums of residuals are quantized too, so that the runtime fuses
            them; else only inputs of the operators are.
        operators: Which operators are quantized, out of ``OPERATORS``.
        reduce_without_vnni: Whether ``preset`` takes one bit off the weights for CPUs without VNNI.
        products: Scheme of the operands of products of two activations; None: as ``activations``.
    """

    name: str
    weights: Scheme
    activations: Scheme
    embeddings: Scheme | None
    observer: str
    weight_observer: str
    outputs: bool
    operators: frozenset[str]
    reduce_without_vnni: bool = False
    products: Scheme | None = None


_INT8_TENSOR = Scheme(QuantDtype.INT8, symmetric=True)

ONNXRUNTIME = Preset(
    name="onnxruntime",
    weights=WEIGHT_INT8,
    activations=ACTIVATION_UINT8,
    embeddings=WEIGHT_INT8,
    observer="min-max",
    weight_observer="min-max",
    outputs=True,
    operators=frozenset({"linear", "conv", "embedding", "add"}),
    reduce_without_vnni=True,
)
"""ONNX Runtime on CPUs: uint8 activations by int8 weights, a scale a channel (a row of an embedding), outputs quantized
too, so that operators between QuantizeLinear and DequantizeLinear fuse; observers as its calibration has them by
default. Source: onnxruntime documentation, "Quantize ONNX models", with its advice on reduce_range.
"""

DEEPSPARSE = Preset(
    name="deepsparse",
    weights=_INT8_TENSOR,
    activations=ACTIVATION_UINT8,
    embeddings=ACTIVATION_UINT8,
    observer="moving-average-min-max",
    weight_observer="min-max",
    outputs=False,
    operators=frozenset({"linear", "conv", "embedding", "matmul"}),
)
"""DeepSparse: asymmetric inputs, symmetric weights, a scale a tensor, no outputs, products of attention too; embedding
tables uint8. Source: SparseML, scheme "deepsparse" of its QuantizationModifier, and its ONNX export.
"""

TENSORRT = Preset(
    name="tensorrt",
    weights=WEIGHT_INT8,
    activations=_INT8_TENSOR,
    embeddings=None,
    observer="histogram-kl",
    weight_observer="min-max",
    outputs=False,
    operators=frozenset({"linear", "conv", "add"}),
)
"""TensorRT: zero points are 0 everywhere, a scale a channel for weights, entropy calibration. Source: Migacz, 8-bit
Inference with TensorRT, GPU Technology Conference 2017; TensorRT developer guide, "Working with quantized types".
"""

IPEX = Preset(
    name="ipex",
    weights=WEIGHT_INT8,
    activations=ACTIVATION_UINT8,
    embeddings=None,
    observer="mse",
    weight_observer="min-max",
    outputs=False,
    operators=frozenset({"linear", "conv"}),
)
"""Intel Extension for PyTorch, static: uint8 activations by int8 weights, a scale a channel; ranges of activations by
histograms with the least squared error. Source: its documentation, ``default_static_qconfig``; the operators that
Intel Neural Compressor quantizes by int8 weights with a scale a channel.
"""

OPENVINO = Preset(
    name="openvino",
    weights=WEIGHT_INT8,
    activations=ACTIVATION_UINT8,
    embeddings=WEIGHT_INT8,
    observer="moving-average-min-max(momentum=0.1)",
    weight_observer="min-max",
    outputs=False,
    operators=frozenset({"linear", "conv", "embedding", "matmul", "add"}),
    products=_INT8_TENSOR,
)
"""OpenVINO: as the "mixed" preset of NNCF: symmetric weights with a scale a channel, asymmetric activations, but symmetric ones for
products of attention, which its CPU plugin computes as integers only where there are no zero-points. NNCF
averages the smallest and largest values over the samples; the moving average comes next to it.
Source: OpenVINO documentation, "Basic quantization flow".
"""

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {item.name: item for item in (ONNXRUNTIME, DEEPSPARSE, TENSORRT, IPEX, OPENVINO)}
)
"""Every preset by name, with all bits of the weights."""


def has_vnni() -> bool:
    """Whether this CPU multiplies uint8 by int8 without saturating in between: VNNI or AMX on x86, any ARM.

    What ``torch.cpu.get_capabilities`` tells; False where it cannot tell. Never raises.
    """
    try:
        if not hasattr(torch.cpu, "get_capabilities"):  # torch 2.8 knows x86 only, and by another name
            return bool(torch.cpu._is_vnni_supported())
        found = torch.cpu.get_capabilities()
    except (AttributeError, RuntimeError):  # a CPU that it cannot ask
        return False
    if str(found.get("architecture", "")).lower() in ("arm64", "aarch64"):
        return True
    return any(bool(found.get(name)) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


def preset(name: str, *, vnni: bool | None = None) -> Preset:
    """Return a preset by name.

    Args:
        name: One of ``PRESETS``.
        vnni: Whether the CPU that the model is for has VNNI; None: as this one, ``has_vnni``.

    Returns:
        The preset; weights of "onnxruntime" are reduced by one bit where VNNI is missing.

    Raises:
        RecipeError: The name is not known.
    """
    if name not in PRESETS:
        raise RecipeError(f"unknown quantization preset {name!r}{suggest(name, PRESETS)}")
    chosen = PRESETS[name]
    if not chosen.reduce_without_vnni or (has_vnni() if vnni is None else vnni):
        return chosen
    return replace(chosen, weights=replace(chosen.weights, reduced=True))
