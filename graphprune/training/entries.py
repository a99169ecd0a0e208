"""How many rows and tokens of a batch count, so that a batch in parts has the gradient of the whole.

A loss is a mean over rows or over tokens. The mean over an accumulated batch is that of its parts weighted by what they hold:
``mean = sum_i own_i / whole * mean_i``. Parts differ in length, so dividing by their number would not do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

IGNORED = -100
"""The label of what does not count, as in ``torch.nn.functional.cross_entropy``."""


@dataclass(frozen=True)
class Entries:
    """What counts in a batch; numbers, or tensors without dimensions.

    Attributes:
        rows: Examples.
        tokens: Real tokens, by the attention mask.
        labeled: Tokens that are real and have a label; all real tokens where labels are not by token.
        task: What the model's own loss is the mean of.
    """

    rows: Tensor | float
    tokens: Tensor | float
    labeled: Tensor | float
    task: Tensor | float

    def __add__(self, other: Entries) -> Entries:
        return Entries(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))

    def stacked(self) -> Tensor:
        """All four as one float64 tensor ``[4]``, to be summed over processes."""
        return torch.stack([torch.as_tensor(item, dtype=torch.float64).cpu() for item in astuple(self)])

    @classmethod
    def unstacked(cls, values: Tensor) -> Entries:
        """The inverse of ``stacked``."""
        return cls(*values.tolist())

    def share(self, whole: Entries) -> Entries:
        """This part's fraction of the whole, entry by entry; 0 where the whole has none."""
        pairs = zip(astuple(self), astuple(whole), strict=True)
        return Entries(*(one / max(float(all_), 1.0) for one, all_ in pairs))


WHOLE = Entries(1.0, 1.0, 1.0, 1.0)
"""The shares of a batch that is whole."""


def token_mask(inputs: Mapping[str, object]) -> Tensor | None:
    """Bool ``[rows, tokens]``, True = a real token; None where the inputs have no attention mask of this shape."""
    mask = inputs.get("attention_mask")
    return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


def labeled_mask(inputs: Mapping[str, object], shape: torch.Size) -> Tensor | None:
    """Which entries of token logits count: a real token, and a label that is not -100.

    Args:
        inputs: A batch.
        shape: ``[rows, tokens]`` of the logits.

    Returns:
        Bool of ``shape``; None where neither labels nor attention mask have that shape: then all count.
    """
    mask, labels = token_mask(inputs), inputs.get("labels")
    if mask is not None and mask.shape != shape:
        mask = None
    if isinstance(labels, Tensor) and labels.shape == shape and not labels.is_floating_point():
        counted = labels != IGNORED
        return counted if mask is None else counted & mask
    return mask


def count_entries(inputs: Mapping[str, object], *, shifted: bool = False) -> Entries:
    """Count what counts in a batch.

    Args:
        inputs: A batch, with its labels.
        shifted: Whether the model's loss drops the first label of every row, as causal language models do.
    """
    tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.dim()]
    rows = tensors[0].shape[0] if tensors else 0
    mask, labels = token_mask(inputs), inputs.get("labels")
    tokens = float(rows) if mask is None else mask.sum()
    labeled: Tensor | float = tokens
    task: Tensor | float = float(rows)
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        task = (labels[..., 1:] if shifted else labels).ne(IGNORED).sum()
        if labels.dim() == 2:
            counted = labeled_mask(inputs, labels.shape)
            labeled = counted.sum() if counted is not None else labels.numel()
    return Entries(float(rows), tokens, labeled, task)
