"""The text form: deterministic, without addresses or values."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch

from graphprune.ir.printer import print_program
from graphprune.ir.trace import trace
from tests.models import MODELS, example
from tests.traced import run_passes, traced

Golden = Callable[[str, str], None]


@pytest.mark.parametrize("name", ["mlp", "conv_bn", "attention", "tied_embedding", "gpt2_conv1d", "grouped_conv"])
def test_golden(name: str, golden: Golden) -> None:
    golden(f"printer_{name}", print_program(traced(name)))


def test_golden_of_a_whole_pipeline(golden: Golden) -> None:
    text = (
        "find-prunable,insert-masks{pattern=2:4,sparsity=0.5,schedule=one-shot,criterion=magnitude},insert-fake-quant"
    )
    golden("printer_pipeline", str(run_passes(traced("mlp"), text)))


@pytest.mark.parametrize("name", ["mlp", "bert_qa", "t5"])
def test_two_traces_print_the_same(name: str) -> None:
    again = trace(MODELS[name](), example(name), check=False)
    assert str(again) == str(traced(name))


@pytest.mark.parametrize("name", MODELS)
def test_no_addresses_and_no_names_of_torchs_own(name: str) -> None:
    text = str(traced(name))
    assert not re.search(r"0x[0-9a-f]{4,}|<built-in|<function|\bs\d{2,}\b|torch\.|FakeTensor|other\[", text)
    assert text == str(copy.deepcopy(traced(name)))


def test_inputs_properties_and_sizes() -> None:
    first = str(traced("bert_qa")).splitlines()[0]
    assert first == (
        "graph @bert_for_question_answering(%input_ids: i64[b,s], %attention_mask: i64[b,s], %token_type_ids: i64[b,s]) "
        "[functional] {"
    )


def test_masks_show_how_much_they_keep_and_weights_show_no_values() -> None:
    program = run_passes(traced("mlp"), "insert-masks")
    before = str(program)
    assert "first.weight_mask: bool[32,16] = buffer {nnz=512/512, pattern=4x1, sparsity=0.8}" in before
    with torch.no_grad():
        program.tensor("first.weight").mul_(2)
    assert str(program) == before
    program.tensor("first.weight_mask")[:4] = False
    assert "nnz=448/512" in str(program)


def test_a_program_on_meta_prints_too() -> None:
    assert "first.weight_mask: bool[32,16] = buffer {pattern" in str(
        run_passes(traced("mlp").to("meta"), "insert-masks")
    )
