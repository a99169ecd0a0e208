"""How a session finds the Program in what is trained, and hangs on to it and to its optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from graphprune.errors import SparsityError
from graphprune.ir.program import Program


def unwrap(module: nn.Module) -> Program:
    """The Program inside DistributedDataParallel, ``torch.compile`` and the like.

    Raises:
        SparsityError: There is none.
    """
    while not isinstance(module, Program):
        inner = getattr(module, "module", None) or getattr(module, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            raise SparsityError(f"a session drives a Program, not {type(module).__name__}; use graphprune.transform")
        module = inner
    return module


def refuse_second(program: Program) -> None:
    """Raise SparsityError where another session drives a Program."""
    other = program.__dict__.get("_session")
    if other is not None and other() is not None:
        raise SparsityError(
            "another session drives this Program already; close() it first, or its hooks would act twice"
        )


def with_gradients(
    args: tuple[Any, ...], kwargs: dict[str, Any], act: Callable[[], None]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Act when an optimizer's step has its gradients: at once, or each time that the closure which makes them was called.

    Args:
        args: The optimizer and the positional arguments of its step.
        kwargs: The others.
        act: What to do.

    Returns:
        Other arguments for the step; None where it has no closure.
    """
    given = args[1] if len(args) > 1 else kwargs.get("closure")
    if given is None:
        act()
        return None

    def closure() -> Any:
        loss = given()
        act()
        return loss

    return (args[0], closure, *args[2:]), {name: value for name, value in kwargs.items() if name != "closure"}


def weak_hook(owner: object, method: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that calls ``method(owner, ...)`` and does not keep its owner alive."""
    reference = weakref.ref(owner)

    def hook(*args: Any) -> Any:
        alive = reference()
        if alive is None:
            raise SparsityError(
                "the training session was garbage-collected while its optimizer still steps; keep it in a variable"
            )
        return method(alive, *args)

    return hook
