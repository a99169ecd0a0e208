"""ONNX passes that know nothing of quantization: identities, transposes, and forms that onnxruntime's fusions know."""

from __future__ import annotations

from graphprune.targets.onnx_model.draft import Draft, is_constant, made_by, quantized, quantizer_behind, replace_value


def remove_identities(draft: Draft) -> int:
    """Drop nodes that hand a value on.

    Before: ``Identity(x)``, or ``Cast(Cast(x, to=T), to=T)``.  After: ``x``.  A graph output keeps its name.  Exact.
    """
    count = 0
    for node in draft.nodes("Identity", "Cast"):
        source, result = node.inputs[0], node.outputs[0]
        if node.op == "Cast":
            before = made_by(source, "Cast")
            if before is None or before.attrs["to"] != node.attrs["to"]:
                continue
        if draft.is_output(result):
            continue
        replace_value(draft, result, source)
        node.outputs.clear()
        count += 1
    return count


def compose_transposes(draft: Draft) -> int:
    """Make one Transpose of two in a row.

    Before: ``Transpose(Transpose(x))``.  After: one Transpose, or none where they cancel.  Exact.
    """
    count = 0
    for node in draft.nodes("Transpose"):
        before = made_by(node.inputs[0], "Transpose")
        if before is None or "perm" not in before.attrs or "perm" not in node.attrs:
            continue
        perm = [before.attrs["perm"][index] for index in node.attrs["perm"]]
        if perm == sorted(perm) and draft.is_output(node.outputs[0]):
            continue
        if perm == sorted(perm):
            replace_value(draft, node.outputs[0], before.inputs[0])
            node.outputs.clear()
        else:
            node.inputs[0] = before.inputs[0]
            node.attrs["perm"] = perm
        count += 1
    return count


def write_residuals_as_sums(draft: Draft) -> int:
    """Keep onnxruntime from fusing a residual into its SkipLayerNormalization.

    Before: ``LayerNormalization(Add(x, residual))``.  After: ``LayerNormalization(Sum(x, residual))``, the same
    numbers.  The fused kernel of onnxruntime's CPU provider (1.31) was measured to take several times as
    long as its parts.  A sum that onnxruntime adds in integers, QLinearAdd, is left.
    """
    count = 0
    for node in draft.nodes("Add"):
        users = {user.op for user in node.outputs[0].outputs}
        if "LayerNormalization" not in users or any(is_constant(item) for item in node.inputs):
            continue
        if all(quantized(item) for item in node.inputs) and quantizer_behind(draft, node.outputs[0]):
            continue
        node.op = "Sum"
        count += 1
    return count


def divide_by_roots(draft: Draft) -> int:
    """Write the root mean square normalization of Llama and T5 as onnxruntime's fusion knows it.

    Before: ``Mul(x, Reciprocal(Sqrt(v)))``.  After: ``Div(x, Sqrt(v))``; equal up to one rounding.
    """
    count = 0
    for node in draft.nodes("Mul"):
        for index, value in enumerate(node.inputs):
            inverse = made_by(value, "Reciprocal")
            if inverse is not None and made_by(inverse.inputs[0], "Sqrt") is not None:
                node.op = "Div"
                node.inputs = [node.inputs[1 - index], inverse.inputs[0]]
                count += 1
                break
    return count
