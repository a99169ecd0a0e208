"""The demo's text: English sentences of Python's own ``pydoc_data.topics``, with a fixed held-out part."""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Sequence
from pydoc_data.topics import topics  # type: ignore[import-untyped]
from typing import Any

import torch
from torch import Tensor

_RULE = re.compile(r'^\s*([*=\-~^#+"])\1{2,}\s*$')  # underline of a heading
_CODE = re.compile(r"::=|>>>|[{}\\|<>^%]{2,}|\w=\S+=|\s[=<>|&^%]+\s\S+\s[=<>|&^%]+\s|_{3,}")
_END = re.compile(r"(?<=[a-z0-9)\]][.!?])\s+(?=[A-Z(])")
_MARKUP = (
    (re.compile(r"^(?:[*\-•]|\d+\.|\[\d+\]|Note:|See also:)\s+"), ""),
    (re.compile(r'["“”`]'), ""),
    (re.compile(r"\*{1,2}([A-Za-z][^*]*)\*{1,2}"), r"\1"),
    (re.compile(r"\[\d+\]"), ""),
    (re.compile(r"\s+"), " "),
)
_HELD_OUT = 10  # one sentence in ten


def sentences() -> list[str]:
    """All usable sentences, in a fixed order, each once: 4 to 60 words, mostly letters, no code, no headings."""
    found: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            lines = [line for line in paragraph.split("\n") if line.strip()]
            if any(_RULE.match(line) for line in lines) or "::=" in paragraph or ">>>" in paragraph:
                continue
            for sentence in _END.split(_plain(" ".join(line.strip() for line in lines))):
                if _usable(sentence):
                    sentence = sentence[0].upper() + sentence[1:]
                    found.setdefault(sentence.lower(), sentence)
    return list(found.values())


def _plain(text: str) -> str:
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return text.replace("\u2019", "'").replace("\u2026", "...").strip()


def _usable(sentence: str) -> bool:
    sentence = sentence.strip()
    if not 4 <= len(sentence.split()) <= 60 or sentence[-1] not in ".!?:;" or not sentence[0].isalpha():
        return False
    letters = sum(symbol.isalpha() or symbol == " " for symbol in sentence)
    return letters >= 0.8 * len(sentence) and not _CODE.search(sentence)


def split() -> tuple[list[str], list[str]]:
    """Training and held-out sentences. Which part a sentence is in depends on nothing but its text."""
    train: list[str] = []
    held_out: list[str] = []
    for sentence in sentences():
        (train if zlib.crc32(sentence.lower().encode()) % _HELD_OUT else held_out).append(sentence)
    return train, held_out


def tokenize(tokenizer: Any, texts: Sequence[str], length: int) -> list[list[int]]:
    """Token ids of each text, cut to ``length`` tokens."""
    return [list(ids) for ids in tokenizer(list(texts), truncation=True, max_length=length)["input_ids"]]


def batches(items: Sequence[Sequence[int]], tokens: int, seed: int, jitter: float = 3.0) -> list[list[int]]:
    """One epoch of batches of similar length, shuffled.

    Args:
        items: Token ids of each text.
        tokens: Most tokens in a batch, padding included.
        seed: Of the order; the same seed gives the same batches.
        jitter: Lengths are disturbed by up to this many tokens before they are sorted, so that batches differ from one
            epoch to the next.

    Returns:
        Indices into ``items``, a list a batch.
    """
    generator = random.Random(seed)
    keys = [len(item) + generator.random() * jitter for item in items]
    made: list[list[int]] = [[]]
    longest = 0
    for index in sorted(range(len(items)), key=keys.__getitem__):
        longest = max(longest, len(items[index]))
        if made[-1] and longest * (len(made[-1]) + 1) > tokens:
            made.append([])
            longest = len(items[index])
        made[-1].append(index)
    generator.shuffle(made)
    return made


def pad(items: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 ``[batch, longest]``, padded with zeros."""
    longest = max(len(item) for item in items)
    ids = torch.zeros(len(items), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, item in enumerate(items):
        ids[row, : len(item)] = torch.tensor(item)
        mask[row, : len(item)] = 1
    return ids, mask
