"""Tiny models of every kind that graphprune must handle, with fixed seeds: plain torch ones and Hugging Face classes.

``MODELS[name]()`` builds a model in eval mode; ``example(name)`` gives its example inputs, or None where tracing finds
them in the model itself (the Hugging Face ones).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Mlp(nn.Module):
    """Three linear layers: [b, 16] to [b, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.second = nn.Linear(32, 32)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(F.relu(self.second(F.relu(self.first(x))))))


class ConvBn(nn.Module):
    """Two convolutions with batch norm and a classifier: [b, 3, 8, 8] to [b, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


class Residual(nn.Module):
    """A residual connection: the outputs of `stem` and `branch2` are added: [b, 16] to [b, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(16, 16)
        self.branch1 = nn.Linear(16, 32)
        self.branch2 = nn.Linear(32, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.norm(x + self.branch2(F.gelu(self.branch1(x)))))


class Attention(nn.Module):
    """One block around nn.MultiheadAttention: [b, s, 16] to [b, s, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.feed = nn.Linear(16, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head(F.gelu(self.feed(x)))


class SharedWeight(nn.Module):
    """One linear module used twice, and a second module that holds the same weight: [b, 16] to [b, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 16)
        self.again = nn.Linear(16, 16)
        self.again.weight = self.body.weight
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.body(x))
        x = F.relu(self.body(x))
        return self.head(F.relu(self.again(x)))


class TiedEmbedding(nn.Module):
    """A language model whose output layer is its embedding: int64 [b, s] below 32 to [b, s, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.feed = nn.Linear(16, 16)
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.relu(self.feed(self.embedding(ids))))


class Gpt2Conv1d(nn.Module):
    """GPT-2's Conv1D, whose weight is stored [in, out]: [b, s, 16] to [b, s, 4]."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.up = Conv1D(32, 16)
        self.down = Conv1D(16, 32)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(F.gelu(self.up(x))))


class GroupedConv(nn.Module):
    """A grouped, a depthwise and a dilated 1-d convolution: [b, 8, 16] to [b, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv1d(8, 16, 3, padding=1, groups=4)
        self.depthwise = nn.Conv1d(16, 16, 3, padding=1, groups=16)
        self.dilated = nn.Conv1d(16, 8, 3, padding=2, dilation=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.depthwise(F.relu(self.grouped(x))))
        return self.head(F.relu(self.dilated(x)).mean(2))


class ConvTranspose(nn.Module):
    """An encoder and a transposed convolution, whose weight is stored [in, out, kh, kw]: [b, 3, 8, 8] to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 2, stride=2)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.up(F.relu(self.down(x)))))


_BERT: dict[str, int] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
_VISION: dict[str, int] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
# name: class, config class, config arguments; real Hugging Face classes at toy sizes
HUGGING_FACE: dict[str, tuple[str, str, dict[str, object]]] = {
    "bert_qa": ("BertForQuestionAnswering", "BertConfig", {**_BERT}),
    "bert_sequence": ("BertForSequenceClassification", "BertConfig", {**_BERT}),
    "bert_token": ("BertForTokenClassification", "BertConfig", {**_BERT}),
    "distilbert_qa": (
        "DistilBertForQuestionAnswering",
        "DistilBertConfig",
        {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
    ),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {**_BERT}),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": 99,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_BERT, "num_key_value_heads": 2}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", {**_VISION}),
    "resnet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    ),
}


def _hugging_face(name: str) -> nn.Module:
    import transformers

    model, config, options = HUGGING_FACE[name]
    built = getattr(transformers, model)(getattr(transformers, config)(**options))
    assert isinstance(built, nn.Module)
    return built


def _seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def factory() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build().eval()

    return factory


def _hugging_face_factory(name: str) -> Callable[[], nn.Module]:
    return _seeded(lambda: _hugging_face(name))


_PLAIN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (Mlp, (4, 16)),
    "conv_bn": (ConvBn, (4, 3, 8, 8)),
    "residual": (Residual, (4, 16)),
    "attention": (Attention, (4, 6, 16)),
    "shared_weight": (SharedWeight, (4, 16)),
    "tied_embedding": (TiedEmbedding, (4, 6)),
    "gpt2_conv1d": (Gpt2Conv1d, (4, 6, 16)),
    "grouped_conv": (GroupedConv, (4, 8, 16)),
    "conv_transpose": (ConvTranspose, (4, 3, 8, 8)),
}

MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: _seeded(build) for name, (build, _) in _PLAIN.items()},
    **{name: _hugging_face_factory(name) for name in HUGGING_FACE},
}
PLAIN = tuple(_PLAIN)


def example(name: str) -> tuple[Tensor, ...] | None:
    """Example inputs of ``MODELS[name]``, the same at every call; None where the model brings its own."""
    if name not in _PLAIN:
        return None
    shape = _PLAIN[name][1]
    generator = torch.Generator().manual_seed(1)
    if name == "tied_embedding":
        return (torch.randint(0, 32, shape, generator=generator),)
    return (torch.randn(shape, generator=generator),)


def mlp() -> nn.Module:
    """A factory by name, for ``graphprune inspect tests.models:mlp --input x=4x16``."""
    return MODELS["mlp"]()


def bert_qa() -> nn.Module:
    return MODELS["bert_qa"]()
