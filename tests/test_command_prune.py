"""The command ``graphprune prune``: results, errors in one message, and which texts are drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import graphprune as gp
from graphprune import cli
from graphprune.oneshot.texts import read_texts
from tests.models import MODELS
from tests.test_oneshot_checkpoint import recipe, small_llama


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a tokenizer of whole words."""
    from transformers import BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    MODELS["bert_qa"]().save_pretrained(folder / "model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "sat", "on", "the", "mat"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder / "model")
    (folder / "texts.txt").write_text("the cat sat on the mat\n\na cat\n" * 5 + "on the mat sat a cat the cat\n")
    return folder


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, ["prune", *(str(item) for item in arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_with_data(bert: Path, tmp_path: Path) -> None:
    code, out, err = run(
        bert / "model",
        "-p",
        recipe("sparsegpt"),
        "-o",
        tmp_path / "out",
        "--data",
        bert / "texts.txt",
        "--samples",
        6,
        "--json",
    )
    assert code == 0, err
    found = json.loads(out)
    assert found["totals"]["sparsity"] == 0.5
    assert all(site["tokens"] > 6 for site in found["sites"])
    assert "6 texts" in err
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_without_data_as_a_table(bert: Path, tmp_path: Path) -> None:
    code, out, err = run(bert / "model", "-p", recipe("magnitude", "4x1"), "-o", tmp_path / "out")
    assert code == 0, err
    assert "sparsity 0.5000" in out
    assert "bert.encoder.layer.0.attention.self.query.weight" in out


def test_errors_are_one_message(bert: Path, tmp_path: Path) -> None:
    small_llama().save_pretrained(tmp_path / "llama")
    place = ("-o", tmp_path / "out")
    for arguments, message in (
        ((bert / "model", "-p", recipe("wanda"), *place), "needs calibration data"),
        ((bert / "model", "-p", recipe("wanda"), *place, "--data", tmp_path / "no.txt"), "cannot be read as text"),
        ((bert / "model", "-p", recipe("wnda"), *place), "did you mean 'wanda'"),
        ((bert / "model", "-p", recipe("wanda"), *place, "--dtype", "float31"), "did you mean 'float32'"),
        ((bert / "model", "-p", recipe("wanda"), *place, "--device", "nowhere"), "--device nowhere"),
        ((tmp_path / "llama", "-p", recipe("wanda"), *place, "--data", bert / "texts.txt"), "no tokenizer"),
        (("./nowhere", "-p", recipe("wanda"), *place), "no such checkpoint"),
        (("no-such-model/at-all", "-p", recipe("wanda"), *place), "neither a folder nor a model"),
    ):
        code, out, err = run(*arguments)
        assert code == 2, err
        assert out == ""
        assert err.splitlines()[-1].startswith("error: ")
        assert message in err
        assert "Traceback" not in err


def test_texts_are_drawn_by_the_seed(bert: Path) -> None:
    path = bert / "many.txt"
    path.write_text("\n".join(f"line {number}" for number in range(50)))
    assert read_texts(path, 5, 1) == read_texts(path, 5, 1) != read_texts(path, 5, 2)
    assert len(set(read_texts(path, 5, 1))) == 5
    assert len(read_texts(path, 500)) == 50
    (bert / "empty.txt").write_text("\n \n")
    with pytest.raises(gp.GraphPruneError, match="one text a line"):
        read_texts(bert / "empty.txt", 5)
    with pytest.raises(gp.GraphPruneError, match="samples=0"):
        read_texts(path, 0)
