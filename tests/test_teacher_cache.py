"""A teacher's cache: the same bits as the teacher, its key, what is found damaged, what is resumed, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithPadding

import graphprune as gp
from graphprune.training import Distillation, TeacherCache
from graphprune.training.fingerprints import of_data
from graphprune.training.teacher_shards import OutputKind, padded, unpadded
from tests.taught import bert, collate, examples, saved, tokenizer

KINDS = ("sequence", "token", "qa")


def make(root: Path, teacher: Any, data: Any, **options: Any) -> TeacherCache:
    return TeacherCache.of(
        root, teacher, data, **{"collate": collate, "batch_size": 4, "shard_rows": 8, "show": False, **options}
    )


def refuse(name: str) -> Any:
    raise AssertionError(f"{name} was loaded")


@pytest.mark.parametrize("length", [0, 12], ids=["dynamic", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_as_the_teacher_in_any_order(kind: str, length: int, tmp_path: Path) -> None:
    data, teacher = examples(kind, 22, length=length), bert(kind)
    cache = make(tmp_path, teacher, data)
    assert cache.computed == 22
    rows = cache.add_rows(data)
    order = torch.randperm(22).tolist()[:20]
    for start in range(0, 20, 4):
        inputs = collate([rows[index] for index in order[start : start + 4]])
        (wanted,) = Distillation(teacher, logits=1.0).teach(inputs)
        found = cache(inputs)
        assert set(found) == ({"start_logits", "end_logits"} if kind == "qa" else {"logits"})
        real = inputs["attention_mask"] == 1
        for name, value in found.items():
            assert value.shape == wanted[name].shape
            by_token = kind != "sequence"
            assert torch.equal(value[real] if by_token else value, wanted[name][real] if by_token else wanted[name])
            assert not by_token or (value[~real] == 0).all()


def test_it_is_found_again_and_the_teacher_is_not_loaded(tmp_path: Path) -> None:
    folder, data = saved(bert(num_labels=3, id2label={0: "x", 1: "y", 2: "z"}), tmp_path / "teacher"), examples()
    options = {"tokenizer": tokenizer(), "max_length": 32}
    first = make(tmp_path / "caches", folder, data, **options)
    again = make(tmp_path / "caches", str(folder), data, load=refuse, **options)
    assert (first.computed, again.computed) == (16, 0)
    assert again.folder == first.folder
    inputs = collate(again.add_rows(data))
    assert torch.equal(first(inputs)["logits"], again(inputs)["logits"])
    assert list(again.config.id2label.values()) == ["x", "y", "z"]
    key = json.loads((first.folder / "key.json").read_text())
    assert (key["max_length"], key["rows"], key["shard_rows"]) == ("32", 16, 8)


def test_labels_of_a_cached_teacher_are_mapped(tmp_path: Path) -> None:
    teacher = bert(seed=1, id2label={0: "yes", 1: "no"})
    student, data = bert(id2label={0: "no", 1: "yes"}), examples()
    cache = make(tmp_path, teacher, data)
    inputs = collate(cache.add_rows(data)[:4])
    totals = []
    for item in (cache, teacher):
        distillation = Distillation(item, logits=1.0)
        distillation.prepare(student, inputs)
        output = student(**{name: value for name, value in inputs.items() if name != "teacher_row"})
        totals.append(distillation(output, distillation.teach(inputs), inputs).total)
    assert torch.equal(*totals)


def test_another_teacher_data_tokenizer_or_length_is_another_key(tmp_path: Path) -> None:
    teacher, data = bert(), examples()
    key = make(tmp_path, teacher, data).folder
    assert make(tmp_path, bert(), data).folder == key
    changed = bert()
    with torch.no_grad():
        next(iter(changed.parameters()))[0, 0] += 1e-6
    other = [dict(row) for row in data]
    other[3]["input_ids"] = [*other[3]["input_ids"][:-1], 9]
    relabeled = [{**row, "labels": 1 - row["labels"], "text": "any"} for row in data]
    assert make(tmp_path, teacher, relabeled).folder == key  # a teacher sees no labels
    folders = {
        make(tmp_path, changed, data).folder,
        make(tmp_path, bert(layer_norm_eps=1e-6), data).folder,
        make(tmp_path, teacher, other).folder,
        make(tmp_path, teacher, data[::-1]).folder,
        make(tmp_path, teacher, data, max_length=16).folder,
        make(tmp_path, teacher, data, tokenizer=tokenizer()).folder,
        make(tmp_path, teacher, data, precision="float16").folder,
        key,
    }
    assert len(folders) == 8


class TestDamage:
    @pytest.mark.parametrize("damage", ["cut", "flip", "gone", "renamed", "empty", "key"])
    def test_only_what_is_damaged_is_computed_again(self, damage: str, tmp_path: Path) -> None:
        teacher, data = bert(), examples(count=20)
        cache = make(tmp_path, teacher, data)
        wanted = cache(collate(cache.add_rows(data)))["logits"]
        before = {path.name: path.stat().st_mtime_ns for path in cache.folder.glob("*.arrow")}
        path = sorted(cache.folder.glob("00001-*.arrow"))[0]
        content = path.read_bytes()
        if damage == "cut":
            path.write_bytes(content[: len(content) // 2])
        elif damage == "flip":
            path.write_bytes(content[:-200] + bytes([content[-200] ^ 1]) + content[-199:])
        elif damage == "renamed":
            path.rename(cache.folder / "00001-0123456789abcdef.arrow")
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "gone":
            path.unlink()
        else:
            (cache.folder / "key.json").write_text("{")
        mended = make(tmp_path, teacher, data)
        assert mended.computed == (0 if damage == "key" else 8)
        after = {item.name: item.stat().st_mtime_ns for item in mended.folder.glob("*.arrow")}
        assert {name for name in after if after[name] != before.get(name)} <= {path.name}
        assert torch.equal(mended(collate(mended.add_rows(data)))["logits"], wanted)

    def test_an_interrupted_computation_goes_on_behind_the_last_file(self, tmp_path: Path) -> None:
        data, seen = examples(count=30), 0

        def stopping(rows: list[dict[str, Any]]) -> Any:
            nonlocal seen
            seen += 1
            if seen == 6:
                raise KeyboardInterrupt
            return collate(rows)

        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, bert(), data, collate=stopping)
        resumed = make(tmp_path, bert(), data)
        assert resumed.computed == 30 - 16  # two files of 8 were whole
        unbroken = make(tmp_path / "other", bert(), data)
        inputs = collate(resumed.add_rows(data))
        assert torch.equal(resumed(inputs)["logits"], unbroken(inputs)["logits"])
        assert {path.name for path in resumed.folder.glob("*.arrow")} == {
            path.name for path in unbroken.folder.glob("*.arrow")
        }


def test_data_sets_of_arrow(tmp_path: Path) -> None:
    rows = examples("token", 20)
    data = datasets.Dataset.from_list(rows)
    cache = make(tmp_path, bert("token"), data, collate=None, tokenizer=tokenizer())
    numbered = cache.add_rows(data).shuffle(seed=1).filter(lambda row: row["teacher_row"] % 3 == 0)
    names = ["input_ids", "attention_mask", "teacher_row"]
    inputs = dict(DataCollatorWithPadding(tokenizer())([{name: row[name] for name in names} for row in numbered]))
    (wanted,) = Distillation(bert("token"), logits=1.0).teach(inputs)
    real = inputs["attention_mask"] == 1
    torch.testing.assert_close(cache(inputs)["logits"][real], wanted["logits"][real])
    assert of_data(data, ["input_ids"]) == of_data(rows, ["input_ids"])


def test_half_precision_is_an_option(tmp_path: Path) -> None:
    teacher, data = bert(), examples()
    whole, half = make(tmp_path, teacher, data), make(tmp_path, teacher, data, precision="float16")
    inputs = collate(half.add_rows(data))
    found = half(inputs)["logits"]
    assert found.dtype == torch.float32
    assert torch.equal(found, whole(inputs)["logits"].half().float())


def test_a_progress_bar_on_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, bert(), examples(), show=True)
    captured = capsys.readouterr()
    assert "16/16" in captured.err
    assert not captured.out
    make(tmp_path, bert(), examples(), show=True)
    assert not capsys.readouterr().err


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    columns=st.integers(0, 4),
    left=st.booleans(),
    seed=st.integers(0, 9),
)
def test_padding_is_taken_off_and_put_back(lengths: list[int], columns: int, left: bool, seed: int) -> None:
    torch.manual_seed(seed)
    longest = max(lengths) + seed % 3
    mask = torch.zeros(len(lengths), longest, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, longest - length :] = True
        if not left:
            mask[row] = mask[row].flip(0)
    value = torch.randn(len(lengths), longest, *([columns] if columns else []))
    kind = OutputKind(True, columns)
    rows = unpadded(value, kind, mask)
    assert [len(row) for row in rows] == [length * max(columns, 1) for length in lengths]
    back = padded(rows, kind, mask, list(range(len(rows))), "logits")
    assert torch.equal(back[mask], value[mask])
    assert (back[~mask] == 0).all()


def test_refusals(tmp_path: Path) -> None:
    teacher, data = bert("token"), examples("token")
    cache = make(tmp_path, teacher, data)
    inputs = collate(cache.add_rows(data)[:2])
    with pytest.raises(gp.GraphPruneError, match="the batch has no column 'teacher_row'"):
        cache({name: value for name, value in inputs.items() if name != "teacher_row"})
    with pytest.raises(gp.GraphPruneError, match="row 99 is not in the teacher's cache, which has 16 rows"):
        cache({**inputs, "teacher_row": torch.tensor([0, 99])})
    with pytest.raises(
        gp.GraphPruneError, match=r"row 5: the teacher's cache holds logits of \d+ tokens, and the batch has \d+"
    ):
        cache({**inputs, "teacher_row": torch.tensor([5, 5])})
    with pytest.raises(gp.GraphPruneError, match="the data set has 15 rows, the teacher's cache 16"):
        cache.add_rows(data[1:])
    with pytest.raises(gp.GraphPruneError, match="the data set is empty"):
        make(tmp_path, teacher, [])
    with pytest.raises(gp.GraphPruneError, match="has columns text and none that a model takes; tokenize it first"):
        make(tmp_path, teacher, [{"text": "not tokenized"}])
    (tmp_path / "empty").mkdir()
    with pytest.raises(gp.GraphPruneError, match=r"it needs config\.json and weights"):
        make(tmp_path, tmp_path / "empty", data)
    with pytest.raises(gp.GraphPruneError, match="is no folder, and no model of the hub that is known here"):
        make(tmp_path, "nobody/nothing", data)
    with pytest.raises(gp.GraphPruneError, match="the teacher returns none of logits"):
        make(tmp_path, bert("token").bert, data)
