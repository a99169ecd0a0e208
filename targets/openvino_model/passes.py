"""The passes over the ONNX graph that OpenVINO reads.

OpenVINO moves dequantization, folds transposes and fuses quantizers itself, so few are needed: weights are stored as integers in the
order of the source model, tables are looked up as integers, a value is quantized once, and before it is moved.
"""

from __future__ import annotations

from graphprune.targets.onnx_model.cleanup import remove_identities
from graphprune.targets.onnx_model.draft import Draft, GraphPass
from graphprune.targets.onnx_model.passes import name_of
from graphprune.targets.onnx_model.quantized_moves import cancel_quantize_pairs, share_quantize
from graphprune.targets.onnx_model.weight_folds import clip_reduced_ranges, fold_weight_casts, fold_weight_quantization
from graphprune.targets.onnx_model.weight_lookups import look_up_integers
from graphprune.targets.openvino_model.moves import lift_pairs, part_scalars

PASSES: tuple[GraphPass, ...] = (
    remove_identities,
    fold_weight_casts,
    fold_weight_quantization,
    clip_reduced_ranges,
    look_up_integers,
    share_quantize,
    cancel_quantize_pairs,
    lift_pairs,
    part_scalars,
)
"""In the order in which they run."""


def run_passes(draft: Draft) -> dict[str, int]:
    """Run the passes in order, and sort the graph.

    Args:
        draft: Rewritten in place.

    Returns:
        Number of matches by pass name.

    Raises:
        LoweringError: An activation has a format that no operator has.
    """
    counts = {}
    for function in PASSES:
        counts[name_of(function)] = function(draft)
        draft.graph.cleanup(remove_unused_graph_inputs=False)
    draft.graph.toposort()
    return counts
