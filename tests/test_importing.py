"""Recipes and configurations of other tools: everything quoted of them imports, means what it said, and loses nothing silently."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import graphprune as gp
from graphprune.errors import RecipeError
from graphprune.importing import Imported, import_recipe
from graphprune.ir.masking import masked_sites, sparsity_of
from graphprune.ir.program import Program
from graphprune.ir.quant_plan import planned
from graphprune.pipeline.durations import check_durations
from graphprune.pipeline.recipe import Recipe
from tests.models import MODELS
from tests.sparse_programs import sparse_program

FOLDER = Path(__file__).parent / "recipes_of_others"
FILES = sorted(path for path in FOLDER.glob("*/*") if path.is_file())
HEADS = {"transfer_squad.yaml": "bert_qa", "transfer_conll.yaml": "bert_token"}
WHOLE = {
    "inc": {
        "prune_pattern_lock.yml",
        "prune.yml",
        "weight_compression_v2.yml",
        "weight_pruning_config.py.txt",
        "all_defaults.py.txt",
        "pattern_lock.py.txt",
        "run_qa_pruning.py.txt",
        "squad_bert_mini_4x1.py.txt",
        "squad_bert_mini_2in4.json",
        "mrpc_mixed.py.txt",
        "per_channel_progressive.json",
        "auto_slim.json",
        "sparse_gpt.json",
        "whisper_local.json",
        "one_in_four.json",
        "dynamic.py.txt",
        "mixed_precision.py.txt",
        "prune_then_quantize.yml",
        "distill_and_train_aware.yml",
    },
    "sparseml": {
        "transfer_squad.yaml",
        "transfer_qqp.yaml",
        "transfer_mnli.yaml",
        "transfer_sst2.yaml",
        "transfer_conll.yaml",
        "obert_transfer.yaml",
        "dense_teacher_sst2.yaml",
        "gmp.md",
        "gmp_by_layer.json",
        "staged.yaml",
        "alternating.yaml",
        "list_of_modifiers.yaml",
    },
}
"""Files of which everything is carried."""


def read(name: str) -> Imported:
    (path,) = [path for path in FILES if path.name == name]
    return import_recipe(path)


def reasons(imported: Imported) -> dict[str, str]:
    return {entry.key: entry.reason for entry in imported.not_carried}


def batches(program: Program) -> list[Mapping[str, object]]:
    ids = torch.arange(16).view(2, 8) % 99
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_imports(path: Path) -> None:
    imported = import_recipe(path)
    assert imported.kind == path.parent.name
    assert imported.yaml.splitlines()[0].startswith(f"# Imported from {path.name} (")
    assert Recipe.parse(imported.yaml) == imported.recipe
    assert Recipe.parse(imported.recipe.to_yaml()).stages == imported.recipe.stages
    check_durations(imported.recipe)
    lines = len(path.read_text().splitlines())
    for entry in imported.not_carried:
        assert 1 <= entry.line <= lines
        assert f"# Not carried: {entry}" in imported.yaml
    assert list(imported.not_carried) == sorted(imported.not_carried, key=lambda entry: entry.line)
    assert bool(imported.not_carried) == (path.name not in WHOLE[imported.kind]), reasons(imported)
    assert import_recipe(path.read_text()).recipe == imported.recipe  # recognized by its content alone
    assert import_recipe(path.read_text(), kind=imported.kind).recipe == imported.recipe


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_stage_transforms_a_tiny_bert(path: Path) -> None:
    imported = import_recipe(path)
    program = sparse_program(HEADS.get(path.name, "bert_sequence"))
    for stage in imported.recipe.stages:
        done = gp.transform(program, stage.passes, data=batches(program))
        names = {step.name for step in stage.passes}
        assert bool(masked_sites(done)) == bool(names & {"insert-masks", "lock-masks"})
        assert any(planned(done)) == bool(names & {"annotate-quant", "insert-fake-quant", "dynamic-quant"})
        if names & {"lock-masks"} and not names & {"insert-masks"}:
            assert sparsity_of(masked_sites(done)) == pytest.approx(0.9, abs=0.01)


# -- what they say -----------------------------------------------------------------------------------------------------


def test_pattern_lock_keeps_every_zero() -> None:
    (lock,) = read("prune_pattern_lock.yml").recipe.passes
    assert str(lock) == "lock-masks"
    (bare,) = read("pattern_lock.py.txt").recipe.passes
    assert bare == lock  # not the default 4x1, which lost zeros
    (tiled,) = import_recipe("WeightPruningConfig(pruning_type='pattern_lock', pattern='2:4')").recipe.passes
    assert str(tiled) == "lock-masks{pattern=2:4}"


def test_steps_are_shifted_by_one_and_curves_renamed() -> None:
    (masks,) = read("squad_bert_mini_4x1.py.txt").recipe.passes
    options = vars(masks)
    assert (options["warm_up"], options["end"], options["frequency"]) == (999, 26999, 1000)
    assert (options["pattern"], options["sparsity"], options["schedule"]) == ("4x1", 0.8, "exponential")
    assert options["exclude"] == ("re:pooler",)
    assert options["ops"] == ("linear",)


def test_n_in_m_counts_the_pruned_in_neural_compressor() -> None:
    model = MODELS["mlp"]()
    (masks,) = import_recipe(
        '{"pruning_type": "magnitude", "pattern": "1:4", "start_step": 1, "end_step": 1}'
    ).recipe.passes
    assert vars(masks)["pattern"] == "3:4"
    program = gp.transform(model, [masks], torch.randn(2, 16))
    sites = masked_sites(program)
    assert sparsity_of(sites) == 0.25
    for site in sites:
        assert (site.logical_mask.view(-1, 4).sum(1) == 3).all()


def test_one_shot_reaches_its_pattern_and_sparsity() -> None:
    imported = import_recipe(
        '{"pruning_type": "magnitude", "pattern": "4x1", "target_sparsity": 0.75, "start_step": 5, "end_step": 5, "pruning_scope": "local"}'
    )
    assert imported.not_carried == ()
    program = gp.transform(sparse_program("bert_sequence"), imported.recipe)
    assert len(masked_sites(program)) == 13
    for site in masked_sites(program):
        blocks = site.logical_mask.view(-1, 4, site.logical_mask.shape[1])
        assert (blocks.all(1) | ~blocks.any(1)).all()
        assert 1 - site.logical_mask.float().mean() == 0.75


def test_local_configurations_win_over_the_global_one() -> None:
    first, second = read("weight_compression_v2.yml").recipe.passes
    assert vars(first)["select"] == (r"re:layer\.0",)
    assert (vars(first)["pattern"], vars(first)["sparsity"], vars(first)["schedule"]) == ("4x1", 0.8, "exponential")
    assert (vars(second)["pattern"], vars(second)["sparsity"], vars(second)["schedule"]) == ("2:4", 0.5, "cube")
    assert vars(second)["warm_up"] == 9
    ignored = import_recipe('{"op_names": ["a"], "pruning_configs": [{"op_names": ["b"]}, {"op_names": ["c"]}]}')
    assert list(reasons(ignored)) == ["op_names"]


def test_progressive_is_what_it_really_was() -> None:
    (masks,) = read("per_channel_progressive.json").recipe.passes
    assert vars(masks)["progressive"] == 4
    imported = read("progressive_every_step.json")
    assert vars(imported.recipe.passes[0])["progressive"] == 0
    assert "cannot be divided" in reasons(imported)["pruning_type"]


def test_keys_without_equivalent_are_listed_by_line() -> None:
    imported = read("extra_keys.json")
    lines = (FOLDER / "inc" / "extra_keys.json").read_text().splitlines()
    for entry in imported.not_carried:
        assert f'"{entry.key.rpartition(".")[2]}"' in lines[entry.line - 1]
    assert set(reasons(imported)) == {
        "criterion_reduce_type",
        "resume_from_pruned_checkpoint",
        "lock_init_sparsity",
        "pruning_op_types",
        "target_sparsty",
    }
    assert "did you mean 'target_sparsity'" in reasons(imported)["target_sparsty"]


def test_distillation_of_neural_compressor() -> None:
    stage = read("distillation.yml").recipe.stages[0]
    assert stage.distillation is not None
    assert (stage.distillation.task, stage.distillation.logits, stage.distillation.loss) == (0, 1, "kl")
    assert stage.training.said() == {"learning_rate": 0.001, "weight_decay": 0.001, "optim": "sgd"}
    layers = read("intermediate_layers.py.txt").recipe.stages[0].distillation
    assert layers is not None
    assert layers.layers[0] == ("bert.encoder.layer.0.output", "bert.encoder.layer.2.output")
    assert (layers.teacher, layers.task, layers.logits, layers.hidden) == ("teachers/bert", 1.0, 0.0, 1.0)


def test_times_of_neural_compressor_1_are_epochs() -> None:
    passes = read("pruners_1x.yml").recipe.passes
    assert [vars(step)["warm_up"] for step in passes] == ["1 epoch", "1 epoch", "1 epoch", "2 epochs"]
    assert [vars(step)["pattern"] for step in passes] == ["4x1", "head", "2x2", "unstructured"]
    assert vars(passes[0])["schedule"] == "linear(initial=0.1)"
    assert vars(passes[2])["regularizer"] == "group_lasso(strength=0.006)"


def test_variables_stay_variables() -> None:
    imported = read("transfer_squad.yaml")
    recipe = Recipe.parse(imported.yaml, num_epochs=20, qat_start_epoch=15, observer_epoch=18, init_lr=1e-4)
    first, second = recipe.stages
    assert (first.training.num_train_epochs, second.training.num_train_epochs) == (15, 5)
    assert second.training.learning_rate == pytest.approx(1e-4 * 5 / 20)
    assert first.training.lr_scheduler_kwargs == {"lr_end": pytest.approx(1e-4 * 5 / 20), "power": 1.0}
    assert vars(second.passes[-1])["freeze_observers"] == "3 epochs"
    with pytest.raises(RecipeError, match="did you mean 'num_epochs'"):
        Recipe.parse(imported.yaml, num_epoch=3)


def test_sparse_transfer_is_two_stages() -> None:
    recipe = read("transfer_mnli.yaml").recipe
    keep, quantize = recipe.stages
    assert [step.name for step in keep.passes] == ["lock-masks"]
    assert [step.name for step in quantize.passes] == [
        "lock-masks",
        "fold-conv-bn",
        "expand-attention",
        "annotate-quant",
        "insert-fake-quant",
    ]
    assert keep.distillation == quantize.distillation
    assert keep.distillation is not None
    assert (keep.distillation.temperature, keep.distillation.logits, keep.distillation.task) == (3.0, 1.0, 0.0)
    assert (keep.training.num_train_epochs, quantize.training.num_train_epochs) == (8, 5)
    assert vars(quantize.passes[-1])["freeze_observers"] == "4.0 epochs"


def test_markdown_gmp_becomes_one_rule() -> None:
    imported = read("gmp.md")
    (masks,) = imported.recipe.passes
    options = vars(masks)
    assert options["schedule"] == "cubic(initial=0.05)"
    assert (options["pattern"], options["ragged"]) == ("1x4", "pad")
    assert (options["warm_up"], options["end"], options["frequency"]) == ("2.0 epochs", "14.0 epochs", "0.5 epochs")
    assert any("constant mask" in note for note in imported.notes)


def test_sparsities_by_weight_are_rules_of_their_own() -> None:
    first, second = read("gmp_by_layer.json").recipe.passes
    assert (vars(first)["sparsity"], vars(second)["sparsity"]) == (0.6, 0.9)
    assert vars(first)["schedule"] == "inverse-cubic"
    assert vars(second)["select"] == ("re:^bert.encoder.layer.1.*dense.weight",)


def test_every_pruning_modifier() -> None:
    steps = read("every_pruning.yaml").recipe.passes
    assert [vars(step)["criterion"] for step in steps] == [
        "magnitude",
        "magnitude",
        "movement",
        "magnitude",
        "top_kast(backward_sparsity=0.5)",
        "rigl(fraction=0.25)",
        "magnitude",
        "magnitude",
    ]
    assert [vars(step)["scope"] for step in steps[:3]] == ["local", "global", "local"]
    assert vars(steps[3])["schedule"] == "acdc(cycles=4)"
    assert [vars(step)["pattern"] for step in steps[6:]] == ["1xchannel", "channelx1"]


def test_modifiers_without_equivalent_say_what_to_do() -> None:
    imported = read("without_equivalent.yaml")
    assert len(imported.not_carried) == 10
    assert imported.recipe.passes == ()
    assert "criterion=obs" in reasons(imported)["modifiers.MFACPruningModifier"]
    assert "did you mean 'GMPruningModifier'" in reasons(imported)["modifiers.GPMruningModifier"]


def test_quantization_while_masks_are_driven_is_listed() -> None:
    imported = import_recipe(
        "m_modifiers:\n"
        "  - !EpochRangeModifier {end_epoch: 10}\n"
        "  - !GMPruningModifier {init_sparsity: 0.0, final_sparsity: 0.5, start_epoch: 0, end_epoch: 8, params: __ALL__}\n"
        "  - !QuantizationModifier {start_epoch: 5, submodules: [a]}\n"
    )
    assert len(imported.recipe.stages) == 1
    (entry,) = imported.not_carried
    assert (entry.line, entry.key) == (4, "m_modifiers.QuantizationModifier.start_epoch")
    assert "line 3" in entry.reason


def test_stages_of_the_second_generation() -> None:
    recipe = read("llama_2in4_w4a16.yaml").recipe
    assert [stage.name for stage in recipe.stages] == ["sparsity_stage", "finetuning_stage", "quantization_stage"]
    assert vars(recipe.stages[0].passes[0])["pattern"] == "2:4"
    assert vars(recipe.stage("quantization_stage").passes[2])["weights"] == "int4:symmetric:channel"
