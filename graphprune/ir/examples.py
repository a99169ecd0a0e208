"""Example inputs: what a model is traced with when the caller gives none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.errors import TraceError
from graphprune.ir.interface import Fill, source_signature
from graphprune.ir.program import device_of

_OPTIONAL = {"attention_mask": 1, "decoder_attention_mask": 1, "token_type_ids": 0}  # input: value that means "none"
_LABELS = ("labels", "start_positions", "end_positions")
_BATCH = 2
_LENGTH = 8


def default_inputs(model: nn.Module, batch: int = _BATCH, length: int = _LENGTH) -> dict[str, Tensor]:
    """Example inputs of a Hugging Face model, from its own ``dummy_inputs`` and its config.

    Args:
        model: A model with ``dummy_inputs`` and ``main_input_name``.
        batch: Examples, at least 2 (a batch of 1 would be taken for a constant).
        length: Tokens in an example.

    Returns:
        Tensors by argument name: token ids ``[batch, length]`` int64, or pixels ``[batch, channels, height, width]``.

    Raises:
        TraceError: The model offers no example inputs.
    """
    main = getattr(model, "main_input_name", None)
    device = device_of(model)
    if main == "pixel_values":
        return {"pixel_values": torch.randn(_pixel_shape(model, batch), device=device)}
    dummy = getattr(model, "dummy_inputs", None)
    if not isinstance(dummy, Mapping):
        raise TraceError(
            f"{type(model).__name__} has no dummy_inputs to trace with; pass example_inputs, a mapping of argument "
            f"names to tensors (batch of 2 or more)"
        )
    vocabulary = int(getattr(model.config, "vocab_size", 2))  # type: ignore[union-attr]
    inputs: dict[str, Tensor] = {}
    for name, value in dummy.items():
        if isinstance(value, Tensor) and value.dim() >= 2 and not value.is_floating_point() and "mask" not in name:
            inputs[name] = (torch.arange(batch * length, device=device).view(batch, length) * 7 + 3) % vocabulary
    if not inputs:
        raise TraceError(f"dummy_inputs of {type(model).__name__} holds no token ids; pass example_inputs")
    return inputs


def _pixel_shape(model: nn.Module, batch: int) -> tuple[int, int, int, int]:
    config: Any = model.config
    size = getattr(config, "image_size", None) or 64
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return batch, int(getattr(config, "num_channels", 3)), height, width


def add_optional_inputs(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Fill]:
    """Add the masks and type ids that a model takes, where leaving them out means the same as a constant.

    Args:
        model: The source, in eval mode. It is run once for each candidate, unless it is on the meta device.
        inputs: Example inputs so far; mutated.

    Returns:
        The constants that stand for the added inputs when a caller leaves them out, by name. Only inputs for which the
        model's outputs were equal with and without the constant are added (on the meta device, those where that is usual).
    """
    fills: dict[str, Fill] = {}
    signature = source_signature(model)
    for name, value in _OPTIONAL.items():
        like = "decoder_input_ids" if name.startswith("decoder") else "input_ids"
        if name in inputs or name not in signature or like not in inputs:
            continue
        extended = {**inputs, name: torch.full_like(inputs[like], value)}
        if _same_outputs(model, inputs, extended) if device_of(model).type != "meta" else _is_usual(model, name):
            inputs.update(extended)
            fills[name] = Fill(like, value)
    return fills


def _is_usual(model: nn.Module, name: str) -> bool:
    """Whether the constant is what the input's absence means, by the config: no outputs can be compared without weights.

    A mask of ones is no mask. Type ids have an embedding of their own where the config says so; GPT-2 takes them for tokens.
    """
    return name != "token_type_ids" or bool(getattr(getattr(model, "config", None), "type_vocab_size", 0))


def _same_outputs(model: nn.Module, left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    with torch.no_grad():
        try:
            first, second = _tensors(model(**left)), _tensors(model(**right))
        except (TypeError, ValueError, RuntimeError, IndexError):
            return False  # the model refuses the candidate, so it stays out
    return len(first) == len(second) and all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(first, second, strict=True)
    )


def _tensors(output: object) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def add_labels(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Add label inputs of the shape that the model accepts: one a token, else one an example.

    Args:
        model: The source, in eval mode, on a real device.
        inputs: Example inputs so far; mutated.

    Raises:
        TraceError: ``forward`` takes no labels, or none of the shapes gives a loss.
    """
    names = [name for name in _LABELS if name in source_signature(model)]
    if not names:
        raise TraceError(f"{type(model).__name__}.forward takes none of {', '.join(_LABELS)}; trace without labels")
    first = next(iter(inputs.values()))
    text = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    shapes = [text.shape] if text is not None and len(names) == 1 else []
    problems = []
    for shape in (*shapes, first.shape[:1]):
        labels = {name: torch.ones(shape, dtype=torch.int64, device=first.device) for name in names}
        try:
            with torch.no_grad():
                output = model(**inputs, **labels)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            problems.append(f"{list(shape)}: {error}")
            continue
        if getattr(output, "loss", None) is not None:
            inputs.update(labels)
            return
        problems.append(f"{list(shape)}: no loss in the output")
    raise TraceError(
        f"{type(model).__name__} gave no loss for labels of any usual shape ({'; '.join(problems)}); pass example_inputs with labels"
    )
