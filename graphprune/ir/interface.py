"""How a Program is called: the same arguments as its source model, the same output object back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from graphprune.errors import TraceError, suggest


def is_label(name: str) -> bool:
    """Whether an input serves the loss only: ``labels``, ``start_positions``, ``end_positions`` and the like."""
    return "label" in name or name in ("start_positions", "end_positions")


@dataclass(frozen=True)
class Fill:
    """What stands in for an input that was left out: a constant tensor shaped like another input.

    Recorded only where tracing has shown that the source model computes the same without the input.
    """

    like: str
    value: int


@dataclass(frozen=True)
class Input:
    """One tensor that a Program takes.

    Attributes:
        name: The argument's name in the source model's ``forward``.
        dtype: Its dtype at tracing.
        shape: One entry a dimension: an int where the trace is fixed to it, else the name of a dynamic size.
        fill: Its stand-in where the caller leaves it out, if there is one.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    fill: Fill | None = None

    def check(self, value: object) -> Tensor:
        """Return ``value`` as the tensor that it must be, or say what is wrong with it.

        Raises:
            TraceError: Not a tensor, the wrong number of dimensions, or a size that the trace is fixed to differs.
        """
        if not isinstance(value, Tensor):
            raise TraceError(f"input {self.name!r} must be a tensor, not {type(value).__name__}")
        if value.dim() != len(self.shape):
            raise TraceError(
                f"input {self.name!r} has {value.dim()} dimensions, but was traced with {len(self.shape)}; "
                f"trace again with example_inputs of this rank"
            )
        for dim, (size, traced) in enumerate(zip(value.shape, self.shape, strict=True)):
            if isinstance(traced, int) and size != traced:
                raise TraceError(
                    f"input {self.name!r} has size {size} in dimension {dim}, but the trace is fixed to {traced}; "
                    f"trace again with dynamic_shapes that make this dimension dynamic"
                )
        return value


@dataclass(frozen=True)
class Interface:
    """The calling convention of a Program.

    Attributes:
        parameters: All argument names of the source's ``forward``, in order.
        inputs: The tensors that were traced, in order.
        constants: Arguments that are no tensors, with the values that they are fixed to.
        output: Tree of the output object; its leaves are the graph's outputs in order.
    """

    parameters: tuple[str, ...]
    inputs: tuple[Input, ...]
    constants: Mapping[str, object]
    output: pytree.TreeSpec = field(repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensor inputs, in order."""
        return tuple(item.name for item in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """A name for each tensor of the output, in order: its key, with its index where it lies in a tuple.

        ``logits`` and ``hidden_states_0`` for Hugging Face outputs; ``output``, or ``output_0`` and so on, for plain tensors.
        """
        names: dict[int, str] = {}

        def walk(value: object, path: str) -> None:
            if isinstance(value, int):
                names[value] = path or "output"
            elif isinstance(value, Mapping):
                for key, item in value.items():
                    walk(item, f"{path}_{key}" if path else str(key))
            elif isinstance(value, (tuple, list)):
                for index, item in enumerate(value):
                    walk(item, f"{path or 'output'}_{index}")

        count = self.output.num_leaves
        walk(pytree.tree_unflatten(list(range(count)), self.output), "")
        return tuple(names.get(index, f"output_{index}") for index in range(count))

    def without(self, names: frozenset[str]) -> Interface:
        """The interface with some inputs gone for good."""
        return replace(self, inputs=tuple(item for item in self.inputs if item.name not in names))

    def bind(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> dict[str, Tensor]:
        """Match a call's arguments to the traced inputs.

        Args:
            args: Positional arguments, in the order of the source's ``forward``.
            kwargs: Keyword arguments. None means left out.

        Returns:
            The given tensors by input name, in the order of ``inputs``; inputs that were left out are filled where that
            is known to be the same and are absent otherwise.

        Raises:
            TraceError: An argument that the trace does not know, or one that does not fit it.
        """
        given: dict[str, object] = {}
        if len(args) > len(self.parameters):
            raise TraceError(
                f"{len(args)} positional arguments given; the source's forward takes {len(self.parameters)}"
            )
        for name, value in (*zip(self.parameters, args, strict=False), *kwargs.items()):
            if name in given:
                raise TraceError(f"input {name!r} is given twice, by position and by name")
            if value is not None:
                given[name] = value
        tensors: dict[str, Tensor] = {}
        for item in self.inputs:
            if item.name in given:
                tensors[item.name] = item.check(given.pop(item.name))
            elif item.fill is not None and item.fill.like in tensors:
                like = tensors[item.fill.like]
                tensors[item.name] = torch.full_like(like, item.fill.value, dtype=item.dtype)
        for name, value in given.items():
            self._check_constant(name, value)
        return tensors

    def _check_constant(self, name: str, value: object) -> None:
        if name in self.constants:
            if not isinstance(value, Tensor) and self.constants[name] == value:
                return
            raise TraceError(
                f"argument {name!r} was traced as {self.constants[name]!r} and cannot be {value!r} now; trace again"
            )
        if name == "return_dict" and value is True:
            return
        if name not in self.parameters:
            raise TraceError(f"unknown input {name!r}{suggest(name, self.names)}")
        raise TraceError(
            f"input {name!r} was not traced; traced inputs: {', '.join(self.names)}. "
            f"Trace again with example_inputs that hold it (or labels=True for labels)"
        )

    def signature(self) -> inspect.Signature:
        """A ``forward`` signature that names the inputs, for callers that look at it (Hugging Face's Trainer does)."""
        keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter("self", keyword)]
        parameters += [inspect.Parameter(name, keyword, default=None, annotation=Tensor) for name in self.names]
        return inspect.Signature(parameters)


def named_forward(call: Callable[..., Any], interface: Interface) -> Callable[..., Any]:
    """A ``forward`` function with the interface's signature that hands every argument on to ``call``."""

    def forward(self: object, *args: object, **kwargs: object) -> Any:
        return call(self, *args, **kwargs)

    forward.__signature__ = interface.signature()  # type: ignore[attr-defined]
    return forward


def source_signature(model: nn.Module) -> tuple[str, ...]:
    """Argument names of a module's ``forward``, without ``self`` and without ``**kwargs``."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(name for name, item in inspect.signature(model.forward).parameters.items() if item.kind in kinds)
