"""The order of passes over an ONNX graph for DeepSparse, and the model that they make."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from graphprune.ir.program import Program
from graphprune.targets.deepsparse_model.integers import convolve_integers, dequantize_weights, multiply_integers
from graphprune.targets.deepsparse_model.layers import pool_floats, pool_pixels
from graphprune.targets.deepsparse_model.masks import drop_open_masks, gather_in_order, multiply_masks
from graphprune.targets.onnx_model.cleanup import compose_transposes, remove_identities
from graphprune.targets.onnx_model.draft import Draft, GraphPass, finish, surgeon
from graphprune.targets.onnx_model.export import export_model
from graphprune.targets.onnx_model.nodes import track_values, write_names
from graphprune.targets.onnx_model.opsets import to_opset
from graphprune.targets.onnx_model.passes import name_of
from graphprune.targets.onnx_model.quantized_layers import split_all_gemms, split_gemms
from graphprune.targets.onnx_model.quantized_moves import (
    cancel_quantize_pairs,
    lift_quantize,
    share_quantize,
    sink_dequantize,
)  # fmt: skip
from graphprune.targets.onnx_model.weight_folds import (
    clip_reduced_ranges,
    fold_weight_casts,
    fold_weight_quantization,
    fold_weight_transposes,
)
from graphprune.targets.onnx_model.weight_lookups import look_up_integers
from graphprune.targets.onnx_model.weights import TRANSPOSED

if TYPE_CHECKING:
    import onnx

_EXPORTED, OPSET = 18, 13
"""Operator sets: the oldest one that torch.onnx writes, and the one whose forms the engine knows (normalization in its parts, axes
as attributes)."""
_IR_VERSION = 8

PASSES: tuple[GraphPass, ...] = (
    remove_identities,
    fold_weight_casts,
    fold_weight_quantization,
    clip_reduced_ranges,
    look_up_integers,
    fold_weight_transposes,
    gather_in_order,
    drop_open_masks,
    multiply_masks,
    share_quantize,
    pool_pixels,
    lift_quantize,
    pool_floats,
    sink_dequantize,
    cancel_quantize_pairs,
    compose_transposes,
    split_all_gemms,
    split_gemms,
    multiply_integers,
    convolve_integers,
    dequantize_weights,
)
"""Passes in the order in which they run."""


def run_passes(draft: Draft) -> dict[str, int]:
    """Run the passes in order, and sort the graph.

    Args:
        draft: In operator set 13; rewritten in place.

    Returns:
        Number of matches by pass name.

    Raises:
        LoweringError: The engine has no form for a weight.
    """
    counts: dict[str, int] = {}
    for function in PASSES:
        counts[name_of(function)] = function(draft)
        draft.graph.cleanup(remove_unused_graph_inputs=False)
    draft.graph.toposort()
    return counts


def write_model(program: Program) -> tuple[onnx.ModelProto, dict[str, int]]:
    """Write a Program as the ONNX that DeepSparse takes.

    Args:
        program: From ``inference_copy``.

    Returns:
        The model in operator set 13 and IR version 8 or older, and how often each pass matched.

    Raises:
        LoweringError: Something in the Program has no form there.
    """
    model = to_opset(export_model(program, _EXPORTED), OPSET)
    draft = Draft(surgeon().import_onnx(model))
    tracked = track_values(draft.graph, program)
    counts = run_passes(draft)
    written = finish(draft)
    written.ir_version = min(int(model.ir_version), _IR_VERSION)
    written.producer_name = "graphprune"
    written.metadata_props.add(key=TRANSPOSED, value=json.dumps(sorted(draft.transposed)))
    write_names(written, tracked)
    return written, counts
