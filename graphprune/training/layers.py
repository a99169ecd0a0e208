"""Which layer of a student learns from which of its teacher's, and the values that those layers give.

A layer is a number, as in ``hidden_states``: 0 is the embeddings' output, ``k`` that of layer ``k``, -1 that of the last one; the
attention map of layer ``k`` is ``attentions[k - 1]``. Or it is the dotted name of a module, whose output a hook keeps. A Program
has no modules: there a name stands for the hidden state that is this module's output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from graphprune.errors import GraphPruneError, suggest
from graphprune.ir.program import Program

LayerPair = tuple[int, int] | tuple[str, str]


def spread_layers(student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """Pair every layer of a student with one of a teacher, evenly spaced; the last learns from the last.

    Args:
        student: Number of layers, without the embeddings.
        teacher: Likewise.

    Returns:
        Pairs of layer numbers from 1 on: ``(i, round(i * teacher / student))``, halves rounded up, at least 1.
    """
    return tuple((i, max(1, (2 * i * teacher + student) // (2 * student))) for i in range(1, student + 1))


def check_layers(layers: Sequence[LayerPair]) -> tuple[LayerPair, ...]:
    """Layer pairs as tuples.

    Raises:
        GraphPruneError: One is no pair of numbers and no pair of names.
    """
    found: list[LayerPair] = []
    for pair in layers:
        kinds = {type(item) for item in pair}
        if len(pair) != 2 or kinds not in ({int}, {str}):
            raise GraphPruneError(
                f"layers has {pair!r}; give pairs [student, teacher] of two layer numbers, or of two module names"
            )
        found.append((pair[0], pair[1]))  # type: ignore[arg-type]
    return tuple(found)


def layer_value(states: Sequence[Tensor], layer: int, who: str, *, attention: bool = False) -> Tensor:
    """The hidden state, or the attention map, of a layer number.

    Raises:
        GraphPruneError: There is no such layer.
    """
    count = len(states) if attention else len(states) - 1
    number = layer + count + 1 if layer < 0 else layer
    if not (1 if attention else 0) <= number <= count:
        raise GraphPruneError(
            f"layers asks for layer {layer} of the {who}, which has {count} layers; give numbers up to it"
        )
    return states[number - 1 if attention else number]


class ModuleOutputs:
    """Outputs of modules of one model, kept by forward hooks until they are taken.

    Args:
        model: The student or the teacher; a Program or what wraps one is refused (see ``program_layers``).
        names: Dotted module names.
        who: For messages.

    Raises:
        GraphPruneError: There is no such module.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], who: str) -> None:
        self._who = who
        self._values: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        known = dict(model.named_modules())
        for name in names:
            if name not in known:
                raise GraphPruneError(f"layers: the {who} has no module {name!r}{suggest(name, known)}")
            self._handles.append(known[name].register_forward_hook(self._keeper(name)))

    def _keeper(self, name: str) -> Any:
        def keep(module: nn.Module, arguments: object, output: object) -> None:
            value = first_tensor(output)
            if value is None:
                raise GraphPruneError(f"layers: module {name} of the {self._who} returns no tensor to learn from")
            self._values[name] = value

        return keep

    def take(self) -> dict[str, Tensor]:
        """The outputs of the last forward pass; they are kept no longer."""
        values, self._values = self._values, {}
        return values

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._values = [], {}


def first_tensor(output: object) -> Tensor | None:
    """A tensor itself, or the first one of a tuple or a model output."""
    if isinstance(output, Tensor):
        return output
    items = list(output.values()) if isinstance(output, Mapping) else output
    if isinstance(items, (tuple, list)):
        return next((item for item in items if isinstance(item, Tensor)), None)
    return None


def program_layers(program: Program, names: Sequence[str]) -> dict[str, int]:
    """Which entry of ``hidden_states`` each named module of a Program's source gives.

    Raises:
        GraphPruneError: No module of this name was traced, or its output is no hidden state that the Program returns.
    """
    leaves: tuple[Any, ...] = program.flat_graph().output_node().args[0]  # type: ignore[assignment]
    prefix = "hidden_states_"
    states = {
        leaf: int(name.removeprefix(prefix))
        for name, leaf in zip(program.interface.output_names, leaves, strict=True)
        if name.startswith(prefix) and isinstance(leaf, fx.Node)
    }
    if not states:
        raise GraphPruneError(
            f"layers names modules, and {program.name} returns no hidden_states; trace it with output_hidden_states=True"
        )
    inside: dict[str, list[fx.Node]] = {}
    for node in next(iter(states)).graph.nodes:
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            inside.setdefault(path, []).append(node)
    found = {}
    for name in names:
        if name not in inside:
            raise GraphPruneError(f"layers: the student has no module {name!r}{suggest(name, inside)}")
        last = next((node for node in reversed(inside[name]) if node in states), None)
        if last is None:
            raise GraphPruneError(
                f"layers: {name} computes no hidden state that the Program {program.name} returns; give the name of a layer "
                f"that does, or its number"
            )
        found[name] = states[last]
    return found


def make_projections(widths: Sequence[tuple[int, int]], *, seed: int = 0) -> nn.ModuleDict:
    """A trainable linear layer for each pair of layers whose widths differ, keyed by the pair's position.

    Args:
        widths: ``(student, teacher)`` for each pair.
        seed: Their weights depend on it alone; the global random state stays as it is, so that all processes, and a run that is
            resumed, have the same.
    """
    made = nn.ModuleDict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for position, (student, teacher) in enumerate(widths):
            if student != teacher:
                made[str(position)] = nn.Linear(student, teacher)
    return made
