"""``inspect``: sites, exclusions, totals; and finding the model that a text names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from graphprune.artifact.inspection import inspect
from graphprune.artifact.models import load_model
from graphprune.errors import GraphPruneError, RecipeError, SparsityError
from graphprune.ir.program import Program
from graphprune.ir.trace import trace
from graphprune.pipeline.transform import transform
from tests.models import HUGGING_FACE, MODELS, PLAIN, example

_LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
}


def test_lists_sites_with_their_costs() -> None:
    found = inspect(MODELS["conv_bn"](), example("conv_bn"))
    first, second = found.sites
    assert (first.name, first.op, first.shape, first.parameters) == ("conv1.weight", "conv2d", (8, 27), 216)
    assert first.macs == 8 * 27 * 8 * 8
    assert second.macs == 16 * 72 * 4 * 4
    assert first.patterns == ("unstructured", "4x1", "channelx1", "1xchannel")  # 27 columns are no multiple of 4
    assert second.patterns == ("unstructured", "4x1", "2:4", "channelx1", "1xchannel")
    assert found.totals.macs == first.macs + second.macs
    assert found.totals.prunable_parameters == 216 + 1152
    assert found.totals.parameters == sum(item.numel() for item in MODELS["conv_bn"]().parameters())


def test_says_why_a_weight_is_left_out() -> None:
    reasons = {item.name: item.reason for item in inspect(MODELS["bert_qa"]()).excluded}
    assert "last layer before the output" in reasons["qa_outputs.weight"]
    assert "embedding" in reasons["bert.embeddings.word_embeddings.weight"]


def test_tied_weights_count_once() -> None:
    found = inspect(MODELS["shared_weight"](), example("shared_weight"))
    assert [site.name for site in found.sites] == ["body.weight"]
    assert found.sites[0].macs == 3 * 16 * 16


def test_selection() -> None:
    model, inputs = MODELS["mlp"](), example("mlp")
    assert [site.name for site in inspect(model, inputs, select=["first"]).sites] == ["first.weight"]
    assert [site.name for site in inspect(model, inputs, exclude=["first"]).sites] == ["second.weight"]
    assert len(inspect(model, inputs, include_last=True).sites) == 3
    assert inspect(model, inputs, ops=["conv2d"]).sites == ()
    with pytest.raises(RecipeError, match="did you mean 'second'"):
        inspect(model, inputs, select=["secnd"])
    with pytest.raises(SparsityError, match="unknown sparsity pattern"):
        inspect(model, inputs, patterns=["5:"])


def test_sparsity_is_measured() -> None:
    model = MODELS["mlp"]()
    with torch.no_grad():
        model.get_parameter("first.weight")[:8] = 0
    found = inspect(model, example("mlp"))
    assert [site.sparsity for site in found.sites] == [0.25, 0.0]
    assert found.totals.sparsity == pytest.approx(8 * 16 / (512 + 1024))


def test_masked_entries_count_as_zeros() -> None:
    passes = "insert-masks{sparsity=0.5,criterion=magnitude,schedule=one-shot}"
    program = transform(MODELS["mlp"](), passes, example("mlp"))
    assert inspect(program).totals.sparsity == pytest.approx(0.5)


def test_a_model_without_prunable_weights_is_no_error() -> None:
    found = inspect(nn.Sequential(nn.Embedding(4, 4), nn.ReLU()), torch.zeros(2, 3, dtype=torch.int64))
    assert found.sites == ()
    assert found.totals.sparsity is None
    assert "0 prunable weights" in str(found)


@pytest.mark.parametrize("name", ["mlp", "gpt2", "vit", "resnet"])
def test_changes_nothing(name: str) -> None:
    model = MODELS[name]().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    inspect(model, example(name))
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_agrees_with_a_dynamic_trace() -> None:
    program = trace(MODELS["llama"](), check=False)
    static, dynamic = inspect(MODELS["llama"]()), inspect(program)
    assert [(site.name, site.shape) for site in static.sites] == [(site.name, site.shape) for site in dynamic.sites]


def test_json_form_is_plain_data() -> None:
    found = inspect(MODELS["mlp"](), example("mlp"))
    data = json.loads(json.dumps(found.to_dict()))
    assert data["sites"][0] == {
        "name": "first.weight",
        "op": "linear",
        "shape": [32, 16],
        "parameters": 512,
        "macs": 512,
        "sparsity": 0.0,
        "patterns": ["unstructured", "4x1", "2:4", "channelx1", "1xchannel"],
    }
    assert data["excluded"][0].keys() == {"name", "reason"}
    assert data["totals"]["sites"] == len(data["sites"]) == 2
    assert data["totals"]["inputs"] == {"x": [4, 16]}


def test_text_form(golden: Callable[[str, str], None]) -> None:
    golden(
        "inspect_tied_embedding", str(inspect(MODELS["tied_embedding"](), example("tied_embedding"), patterns=["2:4"]))
    )


@pytest.mark.parametrize("name", sorted(HUGGING_FACE))
def test_meta_device_gives_the_same_sites(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    model.config.architectures = [type(model).__name__]  # type: ignore[union-attr]
    path = tmp_path / "config.json"
    path.write_text(model.config.to_json_string())  # type: ignore[union-attr, operator]
    loaded = load_model(str(path))
    assert "meta device" in " ".join(loaded.notes)
    found, wanted = inspect(loaded.model), inspect(model)
    assert {site.sparsity for site in found.sites} == {None}
    assert [(site.name, site.shape, site.macs) for site in found.sites] == [
        (site.name, site.shape, site.macs) for site in wanted.sites
    ]
    assert found.totals.parameters == wanted.totals.parameters
    assert found.excluded == wanted.excluded


def test_llama_70b_needs_only_its_config(tmp_path: Path) -> None:
    path = tmp_path / "llama.json"
    path.write_text(json.dumps({**_LLAMA_70B, "num_hidden_layers": 2}))
    found = inspect(load_model(str(path)).model)
    layer = 8192 * 8192 * 2 + 8192 * 1024 * 2 + 8192 * 28672 * 3
    assert found.totals.prunable_parameters == 2 * layer
    assert found.totals.macs == 128 * 2 * layer


@pytest.mark.slow
def test_llama_70b_in_full(tmp_path: Path) -> None:
    path = tmp_path / "llama.json"
    path.write_text(json.dumps(_LLAMA_70B))
    assert inspect(load_model(str(path)).model).totals.parameters == 70_553_706_496


def test_loads_a_folder_with_weights(tmp_path: Path) -> None:
    model = MODELS["bert_qa"]()
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = load_model(str(tmp_path))
    assert loaded.notes == ()
    assert not loaded.model.training
    assert type(loaded.model) is type(model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.model.state_dict().items())


def test_says_what_a_checkpoint_lacks(tmp_path: Path) -> None:
    model = MODELS["bert_qa"]()
    model.bert.save_pretrained(tmp_path)  # type: ignore[union-attr, operator]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertForQuestionAnswering"]}))
    assert "2 weights are not in the checkpoint" in load_model(str(tmp_path)).notes[0]


def test_a_folder_without_weights_is_built_on_meta(tmp_path: Path) -> None:
    MODELS["vit"]().config.save_pretrained(tmp_path)  # type: ignore[union-attr, operator]
    loaded = load_model(str(tmp_path))
    assert "AutoModel" in loaded.notes[0]
    assert "no weights: meta device" in loaded.notes[1]
    assert inspect(loaded.model).totals.sparsity is None


def test_loads_a_saved_program(tmp_path: Path) -> None:
    from graphprune.artifact.checkpoint import save_program

    save_program(transform(MODELS["bert_sequence"]()), tmp_path / "saved")
    loaded = load_model(str(tmp_path / "saved"))
    assert isinstance(loaded.model, Program)
    assert inspect(loaded.model).totals.sites == 13


def test_loads_a_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("my_factories.py").write_text(
        "from torch import nn\n"
        "model = nn.Linear(4, 4)\n"
        "def build(): return nn.Linear(4, 4)\n"
        "def wrong(): return 3\n"
        "def fails(): raise ValueError('no data')\n"
    )
    Path("my_broken.py").write_text("import nothing_like_this\n")
    loaded = load_model("my_factories:build")
    assert isinstance(loaded.model, nn.Linear)
    assert loaded.factory == "my_factories:build"
    for text, message in {
        "my_factories:biuld": "did you mean 'build'",
        "my_factories:wrong": "returned a int, not an nn.Module",
        "my_factories:fails": "failed with ValueError: no data",
        "my_factories:model": "is a model, not a function",
        "my_broken:build": "no module named 'nothing_like_this' .my_broken imports it",
        "no_such_package.models:build": "no module named 'no_such_package'",
    }.items():
        with pytest.raises(GraphPruneError, match=message):
            load_model(text)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "is no JSON"),
        ("a.json", "[]", "no model_type"),
        ("a.json", '{"model_type": "no-such-model"}', "no config that transformers knows"),
        ("a.json", '{"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 7}', "cannot be built"),
        ("a.txt", "", "no .json config"),
        ("folder/x", "", "has no config.json"),
        ("folder/manifest.json", "{}", "exported artifact"),
    ],
)
def test_refuses_files_that_are_no_model(name: str, content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(GraphPruneError, match=message):
        load_model(str(path.parent if path.parent != tmp_path else path))


def test_refuses_damaged_weights(tmp_path: Path) -> None:
    MODELS["bert_qa"]().save_pretrained(tmp_path)  # type: ignore[operator]
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(GraphPruneError, match="the weights cannot be loaded"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    "text", ["./nowhere", "/nowhere/at/all", "nowhere.json", "two words", "no-such-model/at-all", ""]
)
def test_says_that_a_name_is_neither_here_nor_on_the_hub(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GraphPruneError, match="no such model"):
        load_model(text)


def test_every_plain_model_is_inspected() -> None:
    for name in PLAIN:
        found = inspect(MODELS[name](), example(name))
        assert found.sites, name
