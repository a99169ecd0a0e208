"""New operators in a graph, with the values that shape inference gives them."""

from __future__ import annotations

from typing import Any

from torch import fx


def insert_call(graph: fx.Graph, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Add an operator at the graph's insertion point.

    Args:
        graph: The graph.
        like: The node that it is made for; it counts as part of the same module.
        target: The operator.
        args: Its arguments, nodes among them.
        kwargs: Its keyword arguments.
    """
    made = graph.call_function(target, args, kwargs)
    for key in ("nn_module_stack", "stack_trace"):
        if key in like.meta:
            made.meta[key] = like.meta[key]
    given, named = fx.node.map_arg((args, kwargs), lambda item: item.meta.get("val", False))  # type: ignore[misc]
    made.meta["val"] = target(*given, **named)
    return made
