"""Where in the user's code a node comes from, for messages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath

from torch import fx

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_LIBRARY = re.compile(r"[/\\]torch[/\\]nn[/\\]")


def origin(node: fx.Node) -> str:
    """Name a node by operator, module and source line.

    Args:
        node: Of a Program's graph.

    Returns:
        Such as ``aten.linear.default in bert.encoder.layer.0.attention.self.query (modeling_bert.py, line 175)``: the innermost line that
        is not torch's own; what the trace does not know is left out.
    """
    modules = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values() if path]
    return described(str(node.target), modules, node.meta.get("stack_trace") or "")


def described(operator: str, modules: Sequence[str], stack_trace: str) -> str:
    """What ``origin`` says, from its parts.

    Args:
        operator: Name of an operator.
        modules: Names of the modules around it, the innermost last.
        stack_trace: As Python prints one, or empty.
    """
    frames = list(_FRAME.finditer(stack_trace))
    own = [frame for frame in frames if not _LIBRARY.search(frame["file"])] or frames
    text = operator
    if modules:
        text += f" in {modules[-1]}"
    if own:
        text += f" ({PurePath(own[-1]['file']).name}, line {own[-1]['line']})"
    return text
