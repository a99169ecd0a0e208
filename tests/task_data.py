"""Data and tokenizers for the tests of fine-tuning tasks."""

from __future__ import annotations

import gzip
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import graphprune as gp

_WORDS = (
    "the",
    "a",
    "of",
    "in",
    "is",
    "was",
    "who",
    "what",
    "where",
    "when",
    "river",
    "city",
    "she",
    "he",
    "born",
    "live",
)
_WORDS += ("long", "near", "small", "red", "blue", "boat")


def shared(name: str) -> str:
    """A file of the shared data; skips the test where it is absent."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(os.environ.get("GRAPHPRUNE_DATA", beside)) / name
    if not path.is_file():
        pytest.skip(f"needs {name} of the shared data; set GRAPHPRUNE_DATA to its folder")
    return str(path)


@cache
def tiny_tokenizer() -> Any:
    """A fast WordPiece tokenizer as BERT's: a few whole words, and letters for all others."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,?!'-"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *_WORDS, *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=512,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def tiny_bert(folder: Path, kind: str, **options: Any) -> Path:
    """A checkpoint of a BERT with random weights and the tiny tokenizer.

    Args:
        folder: Where to.
        kind: Its class in transformers.
        **options: Of its config.
    """
    import transformers

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **{**sizes, **options})
    model: Any = getattr(transformers, kind)(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_classifier(folder: Path) -> Path:
    """A checkpoint for two classes, in a folder of its own, whose answers differ from text to text."""
    return tiny_bert(folder / "model", "BertForSequenceClassification", num_hidden_layers=1, initializer_range=0.5)


@cache
def real_tokenizer() -> Any:
    """MiniLM's tokenizer, of the demo's package or the shared data; skips the test where neither is there."""
    from transformers import AutoTokenizer

    from graphprune.demo import settings

    try:
        folder = settings.model_folder()
    except gp.GraphPruneError:
        folder = Path(shared("weights/all-MiniLM-L6-v2-fp16/tokenizer.json")).parent
    return AutoTokenizer.from_pretrained(folder)


def write(folder: Path, name: str, content: Any) -> str:
    """Write text, or anything else as JSON; gzip where the name ends so."""
    text = content if isinstance(content, str) else json.dumps(content)
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return str(path)


def squad(*paragraphs: tuple[str, list[tuple[str, list[str]]]], version: str = "1.1") -> dict[str, Any]:
    """SQuAD's structure of contexts with questions and answers; a question without an answer is impossible."""
    made = []
    for p, (context, questions) in enumerate(paragraphs):
        qas: list[dict[str, Any]] = []
        for q, (question, answers) in enumerate(questions):
            found = [{"text": text, "answer_start": context.index(text)} for text in answers]
            qas.append({"id": f"{p}.{q}", "question": question, "answers": found})
            if version == "v2.0":
                qas[-1]["is_impossible"] = not answers
        made.append({"context": context, "qas": qas})
    return {"version": version, "data": [{"title": "tiny", "paragraphs": made}]}
