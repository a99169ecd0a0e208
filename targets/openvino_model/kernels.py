"""Which kernels of OpenVINO's CPU plugin the weights of a model end in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from graphprune.targets.openvino_model.graph import constants, operators, users

_LAYERS = ("FullyConnected", "MatMul", "Convolution", "Deconvolution")
_INTEGERS = ("i8", "u8")
_ENDS = ("_original", "/DequantizationMultiply", "/DequantizationSubtract")
"""What OpenVINO adds to the name of an operator that it writes with integers."""


def kernels(model: Any, compiled: Any, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Read off the graph that OpenVINO executes which weights are multiplied as integers.

    Args:
        model: The model, as it was read.
        compiled: The model, compiled for the CPU.
        names: Names of weights; those that are only looked up are in no list.

    Returns:
        ``integer kernel``: weights whose operator gets int8 or uint8 and multiplies integers. ``float kernel``: the others, also those
        whose integers become floats in the kernel.
    """
    executed = {
        name: node
        for node in compiled.get_runtime_model().get_ordered_ops()
        if _information(node, "layerType") in _LAYERS
        for name in (node.get_friendly_name(), *_information(node, "originalLayersNames").split(","))
    }
    known = constants(model)
    found: dict[str, list[str]] = {"integer kernel": [], "float kernel": []}
    for name in names:
        if name not in known:
            continue
        multiplying = [node for node in operators(known[name]) if node.get_type_name() != "Gather"]
        if multiplying:
            integer = all(_multiplies_integers(executed, node) for node in multiplying)
            found["integer kernel" if integer else "float kernel"].append(name)
    return {kind: tuple(items) for kind, items in found.items()}


def _multiplies_integers(executed: dict[str, Any], operator: Any) -> bool:
    names = _names(operator)
    node = next((executed[name] for name in names if name in executed), None)
    if node is None:
        return False
    source = node.input_value(0)
    precisions = _information(source.get_node(), "outputPrecisions").split(",")
    return precisions[source.get_index() % len(precisions)] in _INTEGERS


def _names(operator: Any) -> list[str]:
    """Names that an operator may have when it runs: its own, or, where it was fused, that of what scales it or adds its bias."""
    names = []
    while operator is not None:
        names += [operator.get_friendly_name() + end for end in ("", *_ENDS)]
        behind = list(users(operator))
        operator = behind[0] if len(behind) == 1 and behind[0].get_type_name() in ("Multiply", "Add") else None
    return names


def _information(node: Any, key: str) -> str:
    """What the plugin says of a node that it executes; empty where it says nothing."""
    told = node.get_rt_info()
    return str(told[key].astype(str)) if key in told else ""
