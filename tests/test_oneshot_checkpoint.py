"""Pruning a checkpoint that is read piece by piece: the same bits as in memory, bounded memory, kill and go on, and the command."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import graphprune as gp
from graphprune.ir.masking import masked_sites
from graphprune.oneshot import checkpoint, prune, prune_checkpoint
from graphprune.oneshot.progress import FOLDER, decode, encode
from graphprune.oneshot.shards import INDEX, find_tensors
from graphprune.sparsity import wanda
from tests.models import MODELS
from tests.test_oneshot import data

_LAYERS = 6
_SIZE, _WIDE = 32, 88


def recipe(criterion: str, pattern: str = "2:4", **fields: object) -> str:
    more = "".join(f",{key}={value}" for key, value in fields.items())
    return f"insert-masks{{pattern={pattern},sparsity=0.5,criterion={criterion},schedule=one-shot,scope=local{more}}}"


def small_llama(layers: int = 2, *, tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=_SIZE,
        intermediate_size=_WIDE,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(0, 60, shape, generator=generator)} for shape in ((3, 9), (1, 16), (2, 5))]


def files_of(folder: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in folder.iterdir() if item.is_file()}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six blocks in many shards."""
    folder = tmp_path_factory.mktemp("llama") / "dense"
    small_llama(_LAYERS).save_pretrained(folder, max_shard_size="40KB")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"not copied")
    assert len(list(folder.glob("*.safetensors"))) > 5
    return folder


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace the six blocks once for all tests that ask for it: that takes longer than to prune them."""
    monkeypatch.setattr(checkpoint, "trace", lambda model: copy.deepcopy(_traced(model.config.to_json_string(), model)))


_TRACES: dict[str, gp.Program] = {}


def _traced(key: str, model: nn.Module) -> gp.Program:
    if key not in _TRACES:
        _TRACES[key] = gp.trace(model)
    return _TRACES[key]


@pytest.fixture(autouse=True)
def _no_bars(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("criterion", ["sparsegpt", "wanda", "magnitude"])
def test_the_same_bits_as_in_memory(llama: Path, criterion: str, tmp_path: Path) -> None:
    model = small_llama(_LAYERS)
    program = gp.transform(model, recipe(criterion))
    in_memory = prune(program, batches())
    report = prune_checkpoint(llama, recipe(criterion), batches(), tmp_path / "out", progress=True)
    found, dense = tensors_of(tmp_path / "out"), tensors_of(llama)
    sites = {site.name: site for site in masked_sites(program)}
    assert len(sites) == 7 * _LAYERS
    for name, value in found.items():
        assert torch.equal(value, sites[name].weight if name in sites else dense[name]), name
    assert report.sites == in_memory.sites
    assert report.sparsity == 0.5
    copied = files_of(tmp_path / "out")
    assert set(copied) == set(files_of(llama)) - {"pytorch_model.bin"}
    assert copied[INDEX] == files_of(llama)[INDEX]
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert torch.isfinite(loaded(**batches()[0]).logits).all()


@pytest.mark.parametrize("name", ["bert_qa", "gpt2", pytest.param("t5", marks=pytest.mark.slow), "vit", "resnet"])
def test_every_architecture_in_one_file_or_several(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "in", **({"max_shard_size": "40KB"} if name in ("bert_qa", "vit") else {}))
    program = gp.transform(model, recipe("sparsegpt"))
    prune(program, data(name))
    prune_checkpoint(tmp_path / "in", recipe("sparsegpt"), data(name), tmp_path / "out")
    loaded = type(model).from_pretrained(tmp_path / "out").state_dict()
    pruned = {site.name: site.weight for site in masked_sites(program)}
    for key, value in model.state_dict().items():
        assert torch.equal(loaded[key], pruned.get(key, value)), key


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("criterion", ["sparsegpt", "wanda"])
def test_memory_is_bounded_by_two_blocks(
    llama: Path, criterion: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wanda, "_BAND", 64)  # the 2 MB for sorting are more than this model has
    report = prune_checkpoint(llama, recipe(criterion), batches(), tmp_path / "out")
    dense = tensors_of(llama)
    weights = sum(value.nbytes for name, value in dense.items() if ".layers.0." in name)
    hessians = 4 * (3 * _SIZE**2 + _WIDE**2) if criterion == "sparsegpt" else 4 * (3 * _SIZE + _WIDE)
    assert 0 < report.peak_bytes <= 2 * (weights + hessians)
    assert report.peak_bytes < sum(value.nbytes for value in dense.values()) * (
        1.0 if criterion == "sparsegpt" else 0.5
    )


@pytest.mark.usefixtures("traced_once")
def test_memory_is_bounded_where_most_layers_are_dense(llama: Path, tmp_path: Path) -> None:
    text = recipe("wanda", select="model.layers.5.mlp.down_proj")
    report = prune_checkpoint(llama, text, batches(), tmp_path / "out")
    one = 4 * _SIZE * _WIDE
    assert report.peak_bytes <= 12 * one  # the weight and its work space; the layers before it go by in pieces


def test_weights_in_half_precision_are_rounded_before_later_layers_see_them(tmp_path: Path) -> None:
    small_llama().to(torch.bfloat16).save_pretrained(tmp_path / "in")
    report = prune_checkpoint(tmp_path / "in", recipe("sparsegpt"), batches(), tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert report.sparsity == 0.5
    prune_checkpoint(tmp_path / "in", recipe("wanda"), batches(), tmp_path / "low", dtype=torch.bfloat16)


def test_tied_weights(tmp_path: Path) -> None:
    model = small_llama(tied=True)
    model.save_pretrained(tmp_path / "in")
    prune_checkpoint(tmp_path / "in", recipe("wanda"), batches(), tmp_path / "out")
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_bare_checkpoint_for_a_class_with_a_head(tmp_path: Path) -> None:
    model = MODELS["bert_qa"]()
    model.save_pretrained(tmp_path / "in")
    stored = {
        name.removeprefix("bert."): value for name, value in tensors_of(tmp_path / "in").items() if "qa_out" not in name
    }
    renamed = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): value for name, value in stored.items()}
    save_file(renamed, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    prune_checkpoint(tmp_path / "in", recipe("wanda"), data("bert_qa"), tmp_path / "out")
    program = gp.transform(model, recipe("wanda"))
    prune(program, data("bert_qa"))
    found = tensors_of(tmp_path / "out")
    assert set(found) == set(renamed)
    for site in masked_sites(program):
        assert torch.equal(found[site.name.removeprefix("bert.")], site.weight)


_KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {root!r})
from graphprune.oneshot import progress, prune_checkpoint
from tests.test_oneshot_checkpoint import batches, recipe
saves, plain = 0, progress.save_progress
def save(*arguments):
    global saves
    plain(*arguments)
    saves += 1
    if saves == {after}:
        os.kill(os.getpid(), signal.SIGKILL)
progress.save_progress = save
prune_checkpoint({source!r}, recipe({criterion!r}), batches(), {out!r}, save_seconds=0)
"""


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize(("criterion", "after"), [("sparsegpt", 14), ("magnitude", 9)])
@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(llama: Path, criterion: str, after: int, tmp_path: Path) -> None:
    prune_checkpoint(llama, recipe(criterion), batches(), tmp_path / "whole")
    code = _KILLED.format(
        root=str(Path(__file__).parent.parent),
        after=after,
        source=str(llama),
        out=str(tmp_path / "out"),
        criterion=criterion,
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    state = json.loads((tmp_path / "out" / FOLDER / "progress.json").read_text())
    assert state["stops"] == after if criterion == "sparsegpt" else len(state["tokens"]) == after
    assert sorted(os.listdir(tmp_path / "out")) == [FOLDER]
    with pytest.raises(gp.GraphPruneError, match="progress of another request"):
        prune_checkpoint(llama, recipe(criterion), batches()[:1], tmp_path / "out") if criterion != "magnitude" else (
            prune_checkpoint(llama, recipe(criterion, "4x1"), (), tmp_path / "out")
        )
    report = prune_checkpoint(llama, recipe(criterion), batches(), tmp_path / "out")
    assert len(report.sites) == 7 * _LAYERS
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not (tmp_path / "out" / FOLDER).exists()


@pytest.mark.usefixtures("traced_once")
def test_every_stop_can_be_the_last_before_a_kill(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail right before each save, with the weights of that stop written already, and go on each time."""
    from graphprune.oneshot import output, progress

    plain = progress.save_progress
    failed: set[int] = set()

    def save(work: Path, state: progress.Progress, live: object) -> None:
        if state.stops not in failed:
            failed.add(state.stops)
            raise KeyboardInterrupt
        plain(work, state, live)  # type: ignore[arg-type]

    monkeypatch.setattr(progress, "save_progress", save)
    monkeypatch.setattr(output, "save_progress", plain)
    tries = 0
    while True:
        tries += 1
        try:
            prune_checkpoint(
                llama, recipe("sparsegpt", select="model.layers.0.*"), batches(), tmp_path / "out", save_seconds=0
            )
            break
        except KeyboardInterrupt:
            assert tries < 20
    assert tries == 5
    monkeypatch.undo()
    prune_checkpoint(llama, recipe("sparsegpt", select="model.layers.0.*"), batches(), tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_live_values_come_back_with_their_strides() -> None:
    base = torch.arange(24.0).view(2, 3, 4)
    values = [
        base,
        base.transpose(1, 2),
        base[:, :, 1:3],
        base[:, :1].expand(2, 5, 4),
        torch.zeros(0, 3),
        torch.tensor(True),
        base.to(torch.bfloat16),
        7,
        0.5,
        None,
        (base[0], [3]),
    ]
    tensors: dict[str, Tensor] = {}
    encoded = json.loads(json.dumps([encode(value, tensors) for value in values]))
    for value, entry in zip(values, encoded, strict=True):
        back = decode(entry, tensors, torch.device("cpu"))
        if isinstance(value, Tensor):
            assert torch.equal(back, value)
            assert back.stride() == value.stride()
            assert back.dtype == value.dtype
    assert decode(encoded[7], tensors, torch.device("cpu")) == 7
    with pytest.raises(gp.GraphPruneError, match="type object"):
        encode(object(), {})


class TestRefusals:
    @pytest.mark.usefixtures("traced_once")
    def test_criteria_and_scopes_that_need_the_whole_model(self, llama: Path, tmp_path: Path) -> None:
        with pytest.raises(gp.SparsityError, match="needs gradients through the whole model"):
            prune_checkpoint(llama, recipe("snip"), batches(), tmp_path / "out")
        text = recipe("magnitude").replace("local", "global")
        with pytest.raises(gp.SparsityError, match="set scope=local"):
            prune_checkpoint(llama, text, batches(), tmp_path / "out")
        with pytest.raises(gp.SparsityError, match="no batches"):
            prune_checkpoint(llama, recipe("wanda"), (), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_passes_that_make_values(self, tmp_path: Path) -> None:
        MODELS["resnet"]().save_pretrained(tmp_path / "in")
        with pytest.raises(gp.GraphPruneError, match="prune a checkpoint with insert-masks alone"):
            prune_checkpoint(tmp_path / "in", f"fold-conv-bn,{recipe('wanda')}", data("resnet"), tmp_path / "out")

    @pytest.mark.usefixtures("traced_once")
    def test_folders(self, llama: Path, tmp_path: Path) -> None:
        with pytest.raises(gp.GraphPruneError, match="the checkpoint itself"):
            prune_checkpoint(llama, recipe("magnitude"), (), llama)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("mine")
        with pytest.raises(gp.GraphPruneError, match="holds files already"):
            prune_checkpoint(llama, recipe("magnitude"), (), tmp_path / "out")
        with pytest.raises(gp.GraphPruneError, match=r"no model\.safetensors"):
            prune_checkpoint(tmp_path, recipe("magnitude"), (), tmp_path / "new")

    def test_damaged_checkpoints(self, llama: Path, tmp_path: Path) -> None:
        folder = tmp_path / "in"
        shutil.copytree(llama, folder)
        index = json.loads((folder / INDEX).read_text())
        name, file = next(iter(index["weight_map"].items()))
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[:-8])
        with pytest.raises(gp.GraphPruneError, match="does not fit into the file"):
            find_tensors(folder)
        (folder / file).write_bytes(b"\xff" * 64)
        with pytest.raises(gp.GraphPruneError, match="cannot be read as safetensors"):
            find_tensors(folder)
        (folder / file).write_bytes(content)
        index["weight_map"]["lm_head.nothing"] = file
        (folder / INDEX).write_text(json.dumps(index))
        with pytest.raises(gp.GraphPruneError, match=r"has no tensor lm_head\.nothing"):
            find_tensors(folder)
        index["weight_map"][name] = f"../{file}"
        (folder / INDEX).write_text(json.dumps(index))
        with pytest.raises(gp.GraphPruneError, match="shards lie beside the index"):
            find_tensors(folder)

    def test_a_weight_that_is_not_there_or_quantized(self, tmp_path: Path) -> None:
        small_llama().save_pretrained(tmp_path / "in")
        path = tmp_path / "in" / "model.safetensors"
        stored = load_file(path)
        name = "model.layers.1.mlp.up_proj.weight"
        save_file({**stored, name: stored[name][:4]}, path, metadata={"format": "pt"})
        with pytest.raises(gp.GraphPruneError, match=rf"{name} is F32 \[4, 32\]"):
            prune_checkpoint(tmp_path / "in", recipe("magnitude"), (), tmp_path / "out")
        del stored[name]
        save_file(stored, path, metadata={"format": "pt"})
        with pytest.raises(gp.GraphPruneError, match=f"no tensor for {name}"):
            prune_checkpoint(tmp_path / "in", recipe("magnitude"), (), tmp_path / "out")
