"""Pairs of values of a student and its teacher that layer pairs name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from graphprune.errors import GraphPruneError
from graphprune.training.layers import LayerPair, ModuleOutputs, layer_value, program_layers, spread_layers
from graphprune.training.teaching import inner_program

_MODULES = "module_outputs"
Output = Mapping[str, Any]
Pair = tuple[Tensor, Tensor]


class Matcher:
    """Finds in two outputs what layer pairs name.

    Args:
        layers: See ``graphprune.training.layers``; empty = spread evenly.
    """

    def __init__(self, layers: Sequence[LayerPair]) -> None:
        self.layers = tuple(layers)
        self._numbers: dict[str, int] = {}  # of modules of a Program
        self._hooks: dict[str, ModuleOutputs] = {}

    @property
    def numbered(self) -> bool:
        """Whether the models' own ``hidden_states`` are needed."""
        return not self.layers or any(isinstance(one, int) for one, _ in self.layers)

    def attach(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Hang on to the modules that are named.

        Raises:
            GraphPruneError: There is no such module, or a Program does not return what it computes.
        """
        self.close()
        named = [(one, two) for one, two in self.layers if isinstance(one, str) and isinstance(two, str)]
        if not named or teacher is None:
            return
        program = inner_program(student)
        if program is not None:
            self._numbers = program_layers(program, [one for one, _ in named])
        else:
            self._hooks["student"] = ModuleOutputs(student, [one for one, _ in named], "student")
        self._hooks["teacher"] = ModuleOutputs(teacher, [two for _, two in named], "teacher")

    def close(self) -> None:
        """Take the hooks off."""
        for hooks in self._hooks.values():
            hooks.close()
        self._hooks, self._numbers = {}, {}

    def collect(self, output: Output, who: str) -> Output:
        """An output with what hooks kept of its forward pass."""
        if who not in self._hooks or _MODULES in output:
            return output
        return {**output, _MODULES: self._hooks[who].take()}

    def hidden(self, student: Output, teacher: Output) -> list[Pair]:
        """Hidden states, a pair each."""
        layers: Sequence[LayerPair] = self.layers
        if not layers:
            counts = len(states(student, "student")) - 1, len(states(teacher, "teacher")) - 1
            layers = spread_layers(*counts)
        return [(self._value(student, one, "student"), self._value(teacher, two, "teacher")) for one, two in layers]

    def attentions(self, student: Output, teacher: Output) -> list[Pair]:
        """Attention maps ``[rows, heads, queries, keys]``, a pair each; the mean over heads where their numbers differ."""
        own, others = states(student, "student", "attentions"), states(teacher, "teacher", "attentions")
        numbers = [
            (one, two) for one, two in self.layers if isinstance(one, int) and isinstance(two, int) and one and two
        ]
        found = []
        for first, second in numbers or spread_layers(len(own), len(others)):
            one = layer_value(own, first, "student", attention=True)
            two = layer_value(others, second, "teacher", attention=True)
            if one.shape[1] != two.shape[1]:
                one, two = one.mean(1, keepdim=True), two.mean(1, keepdim=True)
            check_shapes(f"attentions of layers {first} and {second}", one, two)
            found.append((one, two))
        return found

    def _value(self, output: Output, layer: int | str, who: str) -> Tensor:
        numbers = self._numbers if who == "student" else {}
        if isinstance(layer, str) and layer not in numbers:
            kept: Mapping[str, Tensor] = output.get(_MODULES) or {}
            if layer not in kept:
                raise GraphPruneError(f"layers: nothing was kept of module {layer} of the {who}; call prepare first")
            return kept[layer]
        return layer_value(states(output, who), numbers[layer] if isinstance(layer, str) else layer, who)


def check_shapes(name: str, student: Tensor, teacher: Tensor) -> None:
    """Raise GraphPruneError where shapes differ."""
    if student.shape != teacher.shape:
        raise GraphPruneError(
            f"{name}: the student's have shape {list(student.shape)}, the teacher's {list(teacher.shape)}; both must have the "
            f"same labels and take the same tokens, so tokenize with one tokenizer and one maximum length"
        )


def states(output: Output, who: str, name: str = "hidden_states") -> Sequence[Tensor]:
    """Hidden states or attention maps of an output.

    Raises:
        GraphPruneError: It has none.
    """
    found = output.get(name)
    if not found or any(item is None for item in found):
        eager = '; load the model with attn_implementation="eager"' if name == "attentions" else ""
        raise GraphPruneError(f"the {who} returns no {name}; trace or call it with output_{name}=True{eager}")
    return tuple(found)
