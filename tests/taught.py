"""Tiny students, teachers and data for tests of distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
)

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(95)))
KINDS = {"sequence": BertForSequenceClassification, "token": BertForTokenClassification, "qa": BertForQuestionAnswering}


def bert(kind: str = "sequence", *, seed: int = 0, dropout: float = 0.0, **options: Any) -> Any:
    """A BERT with 2 layers of width 16, in eval mode."""
    config = BertConfig(
        **{
            "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 32, "max_position_embeddings": 32, "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout, "initializer_range": 0.3, **options,
        }
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return KINDS[kind](config).eval()


def tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """Splits at spaces."""
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
    )


def examples(kind: str = "sequence", count: int = 16, *, length: int = 0, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of 3 to 8 tokens with labels; padded to ``length`` where it is given."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        size = int(torch.randint(3, 9, (), generator=generator))
        ids = torch.randint(4, len(WORDS), (size,), generator=generator).tolist()
        padding = max(length - size, 0)
        row: dict[str, Any] = {"input_ids": ids + [0] * padding, "attention_mask": [1] * size + [0] * padding}
        if kind == "sequence":
            row["labels"] = ids[0] % 2
        elif kind == "token":
            row["labels"] = [-100, *(item % 2 for item in ids[1:])] + [-100] * padding
        else:
            row["start_positions"], row["end_positions"] = ids[0] % size, size - 1
        rows.append(row)
    return rows


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Pad to the longest row."""
    filler = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    batch = {}
    for name in rows[0]:
        values = [torch.as_tensor(row[name]) for row in rows]
        if values[0].dim():
            batch[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=filler[name])
        else:
            batch[name] = torch.stack(values)
    return batch


def saved(model: Any, folder: Path) -> Path:
    """A model and its tokenizer as files."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
