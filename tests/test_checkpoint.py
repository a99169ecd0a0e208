"""Saving and loading Programs: equal outputs and structure, without pickle, and clear errors for damaged folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import BertModel

import graphprune as gp
from graphprune.ir.printer import print_program
from tests.models import MODELS, example

PIPELINES = {
    "traced": (),
    "masked": "insert-masks{pattern=4x1,sparsity=0.5,criterion=magnitude,schedule=one-shot}",
    "quantized": "insert-masks{pattern=4x1,sparsity=0.5,criterion=magnitude,schedule=one-shot},insert-fake-quant",
    "folded": "insert-masks{pattern=4x1,sparsity=0.5,criterion=magnitude,schedule=one-shot},fold-masks",
}


def build() -> nn.Module:
    return MODELS["residual"]()


@pytest.fixture(scope="module")
def hugging_face() -> gp.Program:
    return gp.trace(MODELS["bert_qa"]().eval(), labels=True)


@pytest.mark.parametrize("pipeline", PIPELINES.values(), ids=PIPELINES)
def test_hugging_face_programs_come_back_equal(hugging_face: gp.Program, pipeline: str, tmp_path: Path) -> None:
    program = gp.transform(hugging_face, pipeline)
    ids = torch.randint(0, 99, (2, 6))
    if "quant" in pipeline:
        gp.training.calibrate(program, [{"input_ids": ids}])
    gp.save(program, tmp_path / "saved")
    loaded = gp.load(tmp_path / "saved")
    assert print_program(loaded) == print_program(program)
    assert torch.equal(program(ids).start_logits, loaded(ids).start_logits)
    assert loaded.history == program.history
    assert type(loaded.config) is type(program.config)
    gp.save(loaded, tmp_path / "again")
    for name, value in safetensors.torch.load_file(tmp_path / "again" / "model.safetensors").items():
        assert torch.equal(value, program.state_dict()[name]), name


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    program = gp.trace(MODELS["gpt2"]().eval(), labels=True)
    gp.save(program, tmp_path / "saved")
    loaded = gp.load(tmp_path / "saved")
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    ids = torch.randint(0, 99, (2, 6))
    assert torch.equal(program(ids).logits, loaded(ids).logits)


def test_plain_modules_come_back_through_their_factory_or_a_model(tmp_path: Path) -> None:
    program = gp.trace(build().eval(), example("residual"), factory="tests.test_checkpoint:build")
    gp.save(program, tmp_path / "saved")
    x = torch.randn(3, 16)
    assert torch.equal(gp.load(tmp_path / "saved")(x), program(x))
    nameless = gp.trace(build().eval(), example("residual"))
    gp.save(nameless, tmp_path / "nameless")
    assert torch.equal(gp.load(tmp_path / "nameless", build())(x), nameless(x))
    with pytest.raises(gp.GraphPruneError, match="load it with model="):
        gp.load(tmp_path / "nameless")


def test_cut_outputs_stay_cut(tmp_path: Path) -> None:
    program = gp.transform(MODELS["bert_qa"]().eval(), "keep-outputs{names=start_logits}")
    gp.save(program, tmp_path / "saved")
    assert list(gp.load(tmp_path / "saved")(torch.ones(2, 4, dtype=torch.int64)).keys()) == ["start_logits"]


def test_what_the_class_was_built_without_stays_out(tmp_path: Path) -> None:
    model = BertModel(MODELS["bert_qa"]().config, add_pooling_layer=False).eval()
    program = gp.transform(model, "insert-masks{pattern=4x1}")
    gp.save(program, tmp_path / "saved")
    loaded = gp.load(tmp_path / "saved")
    ids = torch.randint(0, 99, (2, 6))
    assert torch.equal(loaded(ids).last_hidden_state, program(ids).last_hidden_state)
    assert not [name for name in loaded.state_dict() if name.startswith("pooler")]


class TestRefusals:
    def test_no_program(self, tmp_path: Path) -> None:
        with pytest.raises(gp.GraphPruneError, match="is no saved Program"):
            gp.load(tmp_path)

    def test_other_files_in_the_folder(self, hugging_face: gp.Program, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("mine")
        with pytest.raises(gp.GraphPruneError, match="graphprune did not write"):
            gp.save(hugging_face, tmp_path)
        assert (tmp_path / "thesis.tex").read_text() == "mine"

    def test_damaged_record(self, hugging_face: gp.Program, tmp_path: Path) -> None:
        folder = gp.save(hugging_face, tmp_path / "saved")
        record = json.loads((folder / "program.json").read_text())
        record["passes"] = ["insert-maks"]
        (folder / "program.json").write_text(json.dumps(record))
        with pytest.raises(gp.RecipeError, match="did you mean 'insert-masks'"):
            gp.load(folder)
        (folder / "program.json").write_text("{")
        with pytest.raises(gp.GraphPruneError, match="cannot be read"):
            gp.load(folder)

    def test_weights_of_another_structure(self, hugging_face: gp.Program, tmp_path: Path) -> None:
        folder = gp.save(hugging_face, tmp_path / "saved")
        record = json.loads((folder / "program.json").read_text())
        record["passes"] = [PIPELINES["masked"]]
        (folder / "program.json").write_text(json.dumps(record))
        with pytest.raises(gp.RecipeError, match="does not fit the replayed passes"):
            gp.load(folder)

    def test_an_edited_mask(self, hugging_face: gp.Program, tmp_path: Path) -> None:
        folder = gp.save(gp.transform(hugging_face, PIPELINES["masked"]), tmp_path / "saved")
        state = safetensors.torch.load_file(folder / "model.safetensors")
        name = next(name for name in state if name.endswith("_mask"))
        state[name][0, 0] = ~state[name][0, 0]
        safetensors.torch.save_file(state, folder / "model.safetensors")
        with pytest.raises(
            gp.VerifyError, match=f"mask of {name.removesuffix('_mask')} does not follow its pattern 4x1"
        ):
            gp.load(folder)

    def test_failing_to_write_leaves_nothing(
        self, hugging_face: gp.Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*args: object, **kwargs: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(gp.GraphPruneError, match="No space left on device; nothing was left there"):
            gp.save(hugging_face, tmp_path / "saved")
        assert list(tmp_path.iterdir()) == []
