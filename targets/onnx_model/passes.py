"""The order of graphprune's passes over an ONNX graph, for each form of the file."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from graphprune.targets.onnx_model.bfloat16 import widen_bfloat16
from graphprune.targets.onnx_model.cleanup import (
    compose_transposes,
    divide_by_roots,
    remove_identities,
    write_residuals_as_sums,
)  # fmt: skip
from graphprune.targets.onnx_model.draft import Draft, GraphPass
from graphprune.targets.onnx_model.integer_convolutions import convolve_dynamic, convolve_integers, convolve_quantized
from graphprune.targets.onnx_model.integer_products import (
    fuse_products,
    multiply_dynamic,
    multiply_integers,
    multiply_quantized,
)  # fmt: skip
from graphprune.targets.onnx_model.quantized_layers import (
    dedicate_dequantize,
    quantize_biases,
    split_all_gemms,
    split_gemms,
)  # fmt: skip
from graphprune.targets.onnx_model.quantized_moves import (
    cancel_quantize_pairs,
    lift_quantize,
    pool_means,
    share_quantize,
    sink_dequantize,
)  # fmt: skip
from graphprune.targets.onnx_model.weight_blocks import FIRST_OPSET, check_formats, pack_products, pack_weight_only
from graphprune.targets.onnx_model.weight_folds import (
    clip_reduced_ranges,
    fold_weight_casts,
    fold_weight_quantization,
    fold_weight_transposes,
)
from graphprune.targets.onnx_model.weight_lookups import look_up_blocks, look_up_integers

_STORED: tuple[GraphPass, ...] = (
    remove_identities,
    fold_weight_casts,
    fold_weight_quantization,
    clip_reduced_ranges,
    look_up_integers,
    look_up_blocks,
    fold_weight_transposes,
    widen_bfloat16,
)
_PLACED: tuple[GraphPass, ...] = (
    share_quantize,
    pool_means,
    lift_quantize,
    sink_dequantize,
    cancel_quantize_pairs,
    compose_transposes,
)
_DYNAMIC: tuple[GraphPass, ...] = (multiply_dynamic, convolve_dynamic)
_INTEGER: tuple[GraphPass, ...] = (
    multiply_quantized,
    convolve_quantized,
    multiply_integers,
    convolve_integers,
    fuse_products,
    share_quantize,
)
_SPELLED: tuple[GraphPass, ...] = (dedicate_dequantize, write_residuals_as_sums, divide_by_roots)

FORMS: Mapping[str, tuple[GraphPass, ...]] = MappingProxyType({
    "qdq": (*_STORED, *_PLACED, split_gemms, *_DYNAMIC, quantize_biases, *_SPELLED, check_formats),
    "integer": (
        *_STORED, *_PLACED, split_all_gemms, split_gemms, pack_products, pack_weight_only, *_DYNAMIC, quantize_biases, *_INTEGER, *_SPELLED,
        check_formats,
    ),
    "float": (
        remove_identities, fold_weight_casts, fold_weight_transposes, widen_bfloat16, compose_transposes, write_residuals_as_sums,
        divide_by_roots,
    ),
})  # fmt: skip
"""Passes by form of the file, in the order in which they run."""


def passes_of(form: str, opset: int) -> tuple[GraphPass, ...]:
    """The passes of a form; weights of four bits are packed where the operator set has no DequantizeLinear for them."""
    passes = FORMS[form]
    if form == "qdq" and opset < FIRST_OPSET:
        at = passes.index(split_gemms) + 1
        passes = (*passes[:at], pack_products, *passes[at:])
    return passes


def run_passes(draft: Draft, form: str = "qdq") -> dict[str, int]:
    """Run the passes of a form in order, and sort the graph.

    Args:
        draft: Rewritten in place.
        form: A key of ``FORMS``.

    Returns:
        Number of matches by pass name; those of a pass that runs twice are added.

    Raises:
        LoweringError: A format has no form in the operator set.
    """
    counts: dict[str, int] = {}
    for function in passes_of(form, draft.opset):
        name = name_of(function)
        counts[name] = counts.get(name, 0) + function(draft)
        draft.graph.cleanup(remove_unused_graph_inputs=False)
    draft.graph.toposort()
    return counts


def name_of(function: GraphPass) -> str:
    """Name of a pass, as the manifest has it."""
    return function.__name__.replace("_", "-")
