"""Files of examples: every format, and the errors that name the first bad row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import graphprune as gp
from graphprune.tasks.files import read_table
from graphprune.tasks.tables import Table
from tests.task_data import shared, squad, write

pytest.importorskip("datasets", reason="tasks need the extra train")

ROWS = [{"text": "red boat", "label": "good"}, {"text": 'a "blue", long\nboat', "label": "bad"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = 'text,label\nred boat,good\n\n"a ""blue"", long\nboat",bad\n'


def as_rows(table: Table) -> list[dict[str, Any]]:
    return [{name: values[row] for name, values in table.columns.items()} for row in range(len(table))]


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.json", ROWS, ["example 1", "example 2"]),
        ("a.json", {"version": "1", "data": ROWS}, ["example 1", "example 2"]),
        ("a.json", LINES, ["line 1", "line 2"]),
        ("a.jsonl", "\n" + LINES, ["line 2", "line 3"]),
        ("a.ndjson", LINES, ["line 1", "line 2"]),
        ("a.csv", CSV, ["line 2", "line 4"]),
        ("a.csv", "\ufeff" + CSV.replace("\n", "\r\n").replace("long\r\n", "long\n"), ["line 2", "line 4"]),
    ],
)
@pytest.mark.parametrize("packed", ["", ".gz"])
def test_formats_give_the_same_rows(tmp_path: Path, name: str, content: Any, places: list[str], packed: str) -> None:
    table = read_table(write(tmp_path, name + packed, content))
    assert as_rows(table) == ROWS
    assert list(table.places) == places


def test_one_object_is_one_example(tmp_path: Path) -> None:
    assert as_rows(read_table(write(tmp_path, "a.json", ROWS[0]))) == ROWS[:1]


def test_tsv_has_no_quoting(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "a.tsv", 'text\tlabel\r\n" he said\t0\r\nx "y"\t\r\n'))
    assert as_rows(table) == [{"text": '" he said', "label": "0"}, {"text": 'x "y"', "label": ""}]


def test_cola_has_no_header(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "a.tsv", "gj04\t1\t\tthe boat .\ngj04\t0\t*\tboat the .\n"))
    assert table.columns["sentence"] == ["the boat .", "boat the ."]
    assert table.columns["label"] == ["1", "0"]
    assert table.where(1).endswith("a.tsv, line 2")


CONLL = "-DOCSTART- -X- -X- O\n\nShe PRP B-NP B-PER\nlives VBZ B-VP O\n\nred JJ O O\n"


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("She\tB-PER\nlives\tO\n\t\nred\tO\n", ("tokens", "ner_tags")),
        ("\nShe B-PER\r\nlives O\r\n\r\n\r\nred O", ("tokens", "ner_tags")),
        ("She  X   B-PER\nlives  X O\n-DOCSTART-\nred  X O\n", ("tokens", "pos_tags", "ner_tags")),
        (CONLL, ("tokens", "pos_tags", "chunk_tags", "ner_tags")),
        ("She 1 2 3 B-PER\nlives 1 2 3 O\n\nred 1 2 3 O\n", ("tokens", "column_2", "column_3", "column_4", "ner_tags")),
    ],
)
@pytest.mark.parametrize("name", ["a.conll", "a.txt.gz", "a.annotated", "a.tsv"])
def test_conll_columns(tmp_path: Path, text: str, columns: tuple[str, ...], name: str) -> None:
    table = read_table(write(tmp_path, name, text), columns=True)
    assert tuple(table.columns) == columns
    assert table.columns["tokens"] == [["She", "lives"], ["red"]]
    assert table.columns["ner_tags"] == [["B-PER", "O"], ["O"]]


def test_tokens_may_hold_spaces_between_tabs(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "a.conll", "New York\tB-LOC\n"), columns=True)
    assert table.columns["tokens"] == [["New York"]]


def test_squad_structure(tmp_path: Path) -> None:
    content = squad(("the red boat", [("what", ["red boat", "boat"]), ("who", [])]), version="v2.0")
    content["data"][0]["paragraphs"][0]["qas"][1]["answers"] = [{"text": "made up", "answer_start": 3}]
    table = read_table(write(tmp_path, "a.json", content))
    assert table.columns["answers"] == [
        {"text": ["red boat", "boat"], "answer_start": [4, 8]},
        {"text": [], "answer_start": []},
    ]
    assert table.columns["id"] == ["0.0", "0.1"]
    assert table.where(1).endswith("data[0].paragraphs[0].qas[1]")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", r"a\.json is empty"),
        ("a.jsonl", " \n\n", "is empty"),
        ("a.json", [], "holds no examples"),
        ("a.json", {"data": [{"paragraphs": []}]}, "holds no questions"),
        ("a.json", '[{"text": "x"},\n {"text": }]', r"a\.json, line 2, column 11: no JSON: Expecting value"),
        ("a.jsonl", LINES + "{'text': 1}\n", r"a\.jsonl, line 3, column 2: no JSON"),
        ("a.jsonl", LINES + "[1]\n", r"line 3: \[1\] is no object"),
        ("a.jsonl", LINES + '{"text": "x"}\n', r"line 3: 'label' is missing, which the first example has"),
        ("a.json", [ROWS[0], 3], "example 2: 3 is no object"),
        ("a.json", "7", "holds a int; it must hold a list"),
        ("a.csv", CSV + "x,y,z\n", r"a\.csv, line 6: 3 values where the header names 2 columns \(text, label\)"),
        ("a.csv", CSV + '"x,y\n', r"a\.csv, line 6: unexpected end of data; check the quotes"),
        ("a.csv", "text,text\nx,y\n", "column 'text' is named twice"),
        ("a.tsv", "text\tlabel\n", "holds a header and no examples"),
        ("a.tsv", "text\tlabel\nx\t1\n\ny\n", r"line 4: 1 values"),
        ("a.xlsx", "x", r"unknown ending '\.xlsx'; examples are read from \.json"),
        ("a.gz", "x", "unknown ending ''"),
        (
            "a.json",
            {"data": [{"paragraphs": [{"context": "x", "qas": [{"answers": []}]}]}]},
            r"data\[0\]\.paragraphs\[0\]\.qas\[0\]: 'question' must be a text",
        ),
        ("a.json", {"data": [{"paragraphs": [{"context": "x"}]}]}, r"data\[0\]\.paragraphs\[0\]: 'qas' must be a list"),
    ],
)
def test_bad_files_say_where(tmp_path: Path, name: str, content: Any, message: str) -> None:
    with pytest.raises(gp.GraphPruneError, match=message):
        read_table(write(tmp_path, name, content))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("She B-PER\nlives\n", r"a\.conll, line 2: 1 columns where the first token's line has 2"),
        ("She\n", "line 1: 'She' has no tag"),
        ("She\tO\n\nlives\t \n", "line 3: 'lives' has no tag|line 3: 1 columns"),
        ("She\tX\tO\nlives\tX\t\n", "line 2: 'lives' has an empty tag"),
        ("-DOCSTART-\n", "holds no sentences"),
    ],
)
def test_bad_columns_say_where(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(gp.GraphPruneError, match=message):
        read_table(write(tmp_path, "a.conll", text), columns=True)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(gp.GraphPruneError, match=r"none\.csv cannot be read: No such file"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes(b"text,label\nx,y\n\xe9,y\n")
    with pytest.raises(gp.GraphPruneError, match=r"latin\.csv, line 3: no UTF-8"):
        read_table(tmp_path / "latin.csv")
    path = Path(write(tmp_path, "a.csv.gz", CSV * 50))
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(gp.GraphPruneError, match="is no whole gzip file"):
        read_table(path)


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "a.csv", "sentense,label\nx,1\n"))
    with pytest.raises(
        gp.GraphPruneError,
        match=r"no column 'sentence'; did you mean 'sentense'\?; its columns are 'sentense', 'label' \(--text_column_name",
    ):
        table.texts("sentence", "text_column_name")
    with pytest.raises(gp.GraphPruneError, match=r"a\.json, example 2: 'text' is null; it must be a text"):
        read_table(write(tmp_path, "a.json", [{"text": "x"}, {"text": None}])).texts("text")


def test_parts_of_a_table_are_disjoint_and_repeat() -> None:
    table = Table("numbers", {"n": list(range(100))}, [str(row) for row in range(100)])
    kept, held = table.parted(10)
    assert len(held) == 10
    assert sorted([*kept.columns["n"], *held.columns["n"]]) == list(range(100))
    assert held.columns["n"] == table.parted(10)[1].columns["n"] != list(range(10))
    assert table.first(3).columns["n"] == [0, 1, 2]
    assert table.first(None) is table.first(500) is table
    with pytest.raises(gp.GraphPruneError, match="leave one part empty"):
        table.first(3).parted(1)


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        ("glue/MRPC/train.tsv.gz", 3668, ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")),
        ("glue/MRPC/test.tsv.gz", 1725, ("index", "#1 ID", "#2 ID", "#1 String", "#2 String")),
        ("glue/SST-2/dev.tsv.gz", 872, ("sentence", "label")),
        ("wnut17/wnut17train.conll.gz", 3394, ("tokens", "ner_tags")),
        ("wnut17/emerging.dev.conll.gz", 1009, ("tokens", "ner_tags")),
        ("wnut17/emerging.test.annotated.gz", 1287, ("tokens", "ner_tags")),
        ("squad/dev-v2.0-first5articles.json.gz", 1407, ("id", "title", "question", "context", "answers")),
    ],
)
def test_real_files_are_read_whole(name: str, rows: int, columns: tuple[str, ...]) -> None:
    table = read_table(shared(name), columns="wnut" in name)
    assert (len(table), tuple(table.columns)) == (rows, columns)
