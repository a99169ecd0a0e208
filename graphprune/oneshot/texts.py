"""Calibration data from a text file."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphprune.artifact.models import read_config
from graphprune.errors import GraphPruneError

_MOST = 16
"""Most texts of one length in a batch."""


def read_texts(path: Path, samples: int, seed: int = 0) -> list[str]:
    """Draw texts from a file of one text a line.

    Args:
        path: UTF-8; empty lines do not count.
        samples: How many to draw, without repetition; all where there are fewer.
        seed: Of the draw.

    Returns:
        The texts in the order of the file.

    Raises:
        GraphPruneError: The file cannot be read or has no text, or ``samples`` is below 1.
    """
    if samples < 1:
        raise GraphPruneError(f"samples={samples} draws no text; give 1 or more")
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise GraphPruneError(f"{path} cannot be read as text: {error}") from error
    if not lines:
        raise GraphPruneError(f"{path} has no text; write one text a line")
    places = sorted(random.Random(seed).sample(range(len(lines)), min(samples, len(lines))))
    return [lines[place] for place in places]


def token_batches(folder: Path, texts: Sequence[str], length: int, most: int = _MOST) -> list[dict[str, Tensor]]:
    """Turn texts into batches of token ids without padding.

    Args:
        folder: Holds a Hugging Face config and tokenizer.
        texts: The texts; those of equal length share a batch.
        length: Most tokens of a text, at least 1; longer ones are cut, also to what the model has positions for.
        most: Most texts in a batch, at least 1.

    Returns:
        ``input_ids``, int64 ``[texts, tokens]``, shortest first, with an ``attention_mask`` of ones where the tokenizer
        makes one; for an encoder-decoder model the same ids again as ``decoder_input_ids``.

    Raises:
        GraphPruneError: There is no tokenizer, ``length`` is below 1, or no text has a token.
    """
    from transformers import AutoTokenizer

    if length < 1:
        raise GraphPruneError(f"length={length} leaves no token; give 1 or more")
    config = read_config(str(folder), str(folder / "config.json"))
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises several kinds where there are no or damaged tokenizer files
        reason = (str(error).strip().splitlines() or [""])[0]
        raise GraphPruneError(
            f"{folder} has no tokenizer that can be loaded ({type(error).__name__}: {reason}); text data needs one: for other "
            f"models give batches in Python, to graphprune.oneshot.prune_checkpoint or gp.transform(..., data=batches)"
        ) from error
    positions = getattr(config, "max_position_embeddings", None) or length
    cut = min(length, int(positions), int(tokenizer.model_max_length))
    encoded = tokenizer(list(texts), truncation=True, max_length=cut)["input_ids"]
    by_length: dict[int, list[list[int]]] = {}
    for ids in encoded:
        by_length.setdefault(len(ids), []).append(ids)
    by_length.pop(0, None)
    if not by_length:
        raise GraphPruneError("no text has a token")
    batches = []
    for _, group in sorted(by_length.items()):
        for start in range(0, len(group), most):
            ids = torch.tensor(group[start : start + most])
            more = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
            if "attention_mask" in tokenizer.model_input_names:
                more["attention_mask"] = torch.ones_like(ids)
            batches.append({"input_ids": ids, **more})
    return batches
