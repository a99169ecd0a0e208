"""The torch target: a checkpoint that transformers loads alone, with the Program's weights and masks beside it."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertModel

import graphprune as gp
from graphprune.artifact.models import load_model
from graphprune.errors import LoweringError
from graphprune.ir.masking import masked_sites
from graphprune.targets.torch import Torch, _make_semi_structured
from tests.models import MODELS, example
from tests.test_quant_matrix import pruned, quantized
from tests.traced import traced

KINDS = ("bert_sequence", "distilbert_qa", "vit", "resnet")


def randomized(program: gp.Program) -> gp.Program:
    """Give biases and running statistics values that matter."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in (*program.named_parameters(), *program.named_buffers()):
            if name.endswith("bias") or "running" in name:
                value.copy_(torch.rand(value.shape, generator=generator) * 0.5 + 0.1)
    return program


@pytest.mark.parametrize("pattern", ["dense", "4x1"])
@pytest.mark.parametrize("way", ["float", "static", "dynamic"])
@pytest.mark.parametrize("name", [*KINDS, "gpt2"])
def test_every_combination(name: str, way: str, pattern: str, tmp_path: Path) -> None:
    program = randomized(traced(name))
    if name == "resnet" and way != "float":
        program = gp.transform(program, "fold-conv-bn")
    program = pruned(program, pattern)
    if way != "float":
        program = quantized(program, way)
    manifest = gp.export(program, "torch", tmp_path / "out").manifest
    assert manifest.parity.max_abs <= manifest.parity.tolerance
    assert manifest.parity.steps is None  # no quantizer is left, so the bound is that of float
    assert manifest.sparsity() == pytest.approx(0.5 if pattern == "4x1" else 0.0, abs=0.03)
    names = {site.name for site in manifest.sites}
    if way == "float":
        assert set(manifest.coverage["float"]) == names
        assert "remove-quant" not in manifest.recipe
    else:
        assert set(manifest.coverage["int8 values in float"]) == set(manifest.coverage["activations: float"]) == names
        assert manifest.recipe.endswith("remove-quant")
    assert ("masks.safetensors" in {item.name for item in manifest.files}) is (pattern == "4x1")


def test_anyone_loads_the_checkpoint(tmp_path: Path) -> None:
    """Without graphprune: what transformers loads has the weights and gives the outputs, and the masks say what was pruned."""
    from transformers import AutoModelForSequenceClassification

    program = pruned(traced("bert_sequence", labels=True), "4x1")
    masks = {site.name: site.mask for site in masked_sites(program)}
    artifact = gp.export(program, "torch", tmp_path / "out")
    assert artifact.manifest.outputs == ["logits"]
    model, info = AutoModelForSequenceClassification.from_pretrained(artifact.folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    stored = load_file(artifact.folder / "masks.safetensors")
    assert {name: (value.dtype, value.shape) for name, value in stored.items()} == {
        name: (torch.bool, value.shape) for name, value in masks.items()
    }
    for name, mask in masks.items():
        assert torch.equal(stored[name], mask)
        assert torch.equal(model.get_parameter(name), program.tensor(name) * mask)
    ids = torch.randint(0, 99, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, program(input_ids=ids).logits, rtol=1e-5, atol=1e-6)
    loaded = load_model(str(artifact.folder)).model  # and graphprune goes on from it
    assert type(loaded) is type(model)
    locked = gp.transform(loaded, "lock-masks{pattern=4x1}")
    assert {site.name for site in masked_sites(locked)} == set(masks)


def test_a_class_that_was_built_without_a_part(tmp_path: Path) -> None:
    model = BertModel(MODELS["bert_qa"]().config, add_pooling_layer=False).eval()
    gp.export(gp.trace(model), "torch", tmp_path / "out")
    assert gp.verify(tmp_path / "out").passed
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if name.startswith("pooler")]


def test_a_normalization_takes_the_folded_bias(tmp_path: Path) -> None:
    """The class has no bias in its convolutions, and the checkpoint has no tensor that the class does not know."""
    program = gp.transform(randomized(traced("resnet")), "fold-conv-bn")
    artifact = gp.export(program, "torch", tmp_path / "out")
    keys = set(load_file(artifact.folder / "model.safetensors"))
    assert keys == set(MODELS["resnet"]().state_dict())
    assert not [key for key in keys if "convolution.bias" in key]


def test_a_model_of_a_factory(tmp_path: Path) -> None:
    program = pruned(gp.trace(MODELS["mlp"](), example("mlp"), factory="tests.models:mlp"), "4x1")
    artifact = gp.export(program, "torch", tmp_path / "out")
    assert set(load_file(artifact.folder / "model.safetensors")) == set(MODELS["mlp"]().state_dict())
    assert json.loads((artifact.folder / "checkpoint.json").read_text())["factory"] == "tests.models:mlp"
    assert gp.verify(artifact.folder).passed
    with pytest.raises(gp.GraphPruneError, match="no Hugging Face config"):
        gp.export(traced("mlp"), "torch", tmp_path / "nothing")


def test_a_model_traced_in_bfloat16_stays_so(tmp_path: Path) -> None:
    program = gp.trace(copy.deepcopy(MODELS["bert_sequence"]()).bfloat16())
    artifact = gp.export(program, "torch", tmp_path / "out")
    assert {value.dtype for value in load_file(artifact.folder / "model.safetensors").values()} == {torch.bfloat16}
    assert artifact.manifest.parity.max_abs <= artifact.manifest.parity.tolerance


def test_casts_have_no_place(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"casts of cast-mixed.*dtype=torch\.bfloat16"):
        gp.export(gp.transform(traced("bert_sequence"), "cast-mixed"), "torch", tmp_path / "out")


def test_damaged_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"holds no checkpoint\.json"):
        Torch().open(tmp_path)
    folder = gp.export(traced("bert_sequence"), "torch", tmp_path / "out").folder
    with pytest.raises(LoweringError, match="'attention_mask' is missing"):
        Torch().open(folder)({"input_ids": np.zeros((1, 4), dtype=np.int64)})
    for name, content, message in (
        ("model.safetensors", b"x", "does not load"),
        ("checkpoint.json", b"{}", "not of the form"),
        ("checkpoint.json", b"{", "cannot read"),
    ):
        broken = Path(shutil.copytree(folder, tmp_path / f"{name}{len(content)}"))
        (broken / name).write_bytes(content)
        with pytest.raises(LoweringError, match=message):
            Torch().weights(broken, {})


def test_a_checkpoint_without_a_weight_does_not_start_from_random_ones(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = gp.export(traced("bert_sequence"), "torch", tmp_path / "out").folder
    state = load_file(folder / "model.safetensors")
    del state["classifier.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoweringError, match=r"does not fit .* classifier\.weight"):
        Torch().open(folder)


def test_semi_structured_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    program = pruned(traced("bert_sequence"), "2:4")
    with pytest.raises(LoweringError, match="needs an NVIDIA GPU"):
        gp.export(program, Torch(semi_structured=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert Torch(semi_structured=True).tolerance() == 2e-2
    assert Torch().tolerance() is None


def test_semi_structured_takes_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: made.append(weight) or weight)
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64), nn.Linear(64, 32))
    with pytest.raises(LoweringError, match="no linear layer's weight is 2:4 sparse"):
        _make_semi_structured(model)
    with torch.no_grad():
        for layer in model:
            layer.weight.view(-1, 4)[:, ::2] = 0
        model[2].weight[0, 0] = 1.0
    _make_semi_structured(model)
    assert len(made) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="semi-structured matrices need an NVIDIA GPU")
def test_semi_structured_on_a_gpu(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    model = BertForSequenceClassification(BertConfig(vocab_size=99, **sizes)).eval()
    program = pruned(gp.trace(model), "2:4")
    artifact = gp.export(program, Torch(semi_structured=True), tmp_path / "out")
    assert artifact.manifest.parity.max_abs <= artifact.manifest.parity.tolerance
