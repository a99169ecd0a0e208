"""Tasks under transformers' Trainer: a step of training, and its outputs scored and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import BertConfig, Trainer, TrainingArguments

import graphprune as gp
from graphprune.tasks import extra
from graphprune.tasks.data_settings import DataSettings
from graphprune.tasks.task import make_task
from tests.task_data import squad, tiny_tokenizer, write

for library in ("datasets", "torchmetrics", "seqeval", "accelerate"):
    pytest.importorskip(library, reason="tasks need the extra train")

LONG = "the red boat was near the small river in a city . " * 3 + "she was born in the blue city ."
FILES: dict[str, tuple[str, Any]] = {
    "qa": ("a.json", squad((LONG, [("where", ["blue city"])]), ("a red boat", [("what", ["boat"])]))),
    "glue": ("a.csv", "text,label\nred boat,1\nthe blue boat was long,0\nriver,1\n"),
    "ner": ("a.conll", "Ann B-PER\nwas O\n\nthe O\nlong O\nred O\nboat O\n"),
}


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_task_trains_and_scores(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, *FILES[name])
    settings = DataSettings(train_file=path, validation_file=path, max_seq_length=24, doc_stride=8)
    task = make_task(name, settings, tiny_tokenizer())
    sizes = {"vocab_size": len(tiny_tokenizer()), "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=8)
    for key, value in task.config_changes().items():
        setattr(config, key, value)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=1,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        label_names=list(task.label_columns),
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=getattr(transformers, task.auto_class).from_config(config),
        args=arguments,
        train_dataset=task.features("train"),
        eval_dataset=task.features("validation"),
        data_collator=task.collator(),
        compute_metrics=lambda given: task.score("validation", given.predictions),
    )
    trainer.train()
    scores = trainer.evaluate()
    assert scores["eval_loss"] > 0
    assert f"eval_{task.main_metric}" in scores
    outputs = trainer.predict(task.features("validation"))
    assert outputs.metrics is not None
    again = task.score("validation", outputs.predictions)
    assert again[task.main_metric] == pytest.approx(scores[f"eval_{task.main_metric}"])
    assert all(path.is_file() for path in task.write_predictions("validation", outputs.predictions, tmp_path))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extra, "find_spec", lambda name: None if name == "seqeval" else name)
    with pytest.raises(gp.GraphPruneError, match=r'needs seqeval; run: pip install "graphprune\[train\]"'):
        make_task("ner", DataSettings(train_file="a.conll"), tiny_tokenizer())


def test_a_tokenizer_without_padding(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    task = make_task("glue", DataSettings(train_file=write(tmp_path, *FILES["glue"])), tokenizer)
    with pytest.raises(gp.GraphPruneError, match=r"has no padding token; set tokenizer\.pad_token"):
        task.collator()


def test_only_glue_reads_data_by_its_task_name() -> None:
    with pytest.raises(gp.RecipeError, match="no data: give --dataset_name or --train_file"):
        make_task("ner", DataSettings(task_name="ner"), tiny_tokenizer())


def test_a_short_model_limits_the_length(tmp_path: Path) -> None:
    path = write(tmp_path, *FILES["glue"])
    config = BertConfig(max_position_embeddings=40)
    assert make_task("glue", DataSettings(train_file=path), tiny_tokenizer(), config).max_length == 40
    with pytest.raises(gp.RecipeError, match="max_seq_length is 64, but the model's max_position_embeddings is 40"):
        make_task("glue", DataSettings(train_file=path, max_seq_length=64), tiny_tokenizer(), config)
