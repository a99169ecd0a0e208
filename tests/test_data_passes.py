"""Passes that need calibration data: who gives it, when it is missing, and what the command line reads."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import Tensor

import graphprune as gp
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.oneshot.calibration_data import array_batches, read_batches
from graphprune.passes import FindPrunable
from graphprune.pipeline.base import DataPass, PassResult
from graphprune.pipeline.manager import PassManager, Pipeline
from tests.test_cli import refused
from tests.test_cli import run as run_cli
from tests.test_command_prune import bert as bert
from tests.traced import traced


@dataclass(frozen=True)
class Count(DataPass):
    """Counts the batches that it gets."""

    name = "count"

    def run_on(self, program: Program, batches: Iterable[object]) -> PassResult:
        return PassResult(program, changed=False, stats={"batches": len(list(batches))})


def counts(manager: PassManager, program: Program) -> list[float]:
    return [result.stats["batches"] for result in manager.run(program).results if "batches" in result.stats]


X = torch.zeros(2, 16)


def test_the_manager_hands_data_on_to_each_pass_that_needs_it() -> None:
    passes = (Count(), Pipeline((FindPrunable(), Pipeline((Count(),)))))
    assert counts(PassManager(passes, data=[X, X]), traced("mlp")) == [2, 2]
    loader = torch.utils.data.DataLoader(torch.zeros(7, 16), batch_size=2)  # type: ignore[arg-type]
    assert counts(PassManager(passes, data=loader), traced("mlp")) == [4, 4]
    assert counts(PassManager((Count(),), data=iter([X])), traced("mlp")) == [1]


def test_missing_data_is_refused_before_anything_runs() -> None:
    program = traced("mlp")
    manager = PassManager((FindPrunable(), Count()))
    with pytest.raises(gp.PassError, match=r"pipeline\[1\].count needs calibration data.*transform --data FILE"):
        manager.run(program, in_place=True)
    assert not program.history
    with pytest.raises(gp.PassError, match="needs calibration data"):
        manager.check_order(Property.FUNCTIONAL)
    with pytest.raises(gp.PassError, match="count needs calibration data"):
        Count().run(program)
    with pytest.raises(gp.PassError, match="count needs calibration data"):
        Pipeline((Count(),)).run(program)


def test_an_iterator_does_for_one_pass_only() -> None:
    batches = (item for item in [X, X])
    with pytest.raises(gp.PassError, match=r"pipeline\[0\].count and pipeline\[1\].count .*generator.*give a list"):
        PassManager((Count(), Count()), data=batches).run(traced("mlp"))
    assert len(list(batches)) == 2


def test_a_program_without_values_needs_no_data() -> None:
    program = copy.deepcopy(traced("mlp")).to("meta")
    assert counts(PassManager((Count(), Count())), program) == [0, 0]
    assert counts(PassManager((Count(),), data=[X]), program) == [0]


def test_managers_with_other_data_are_equal() -> None:
    assert PassManager((Count(),), data=[X]) == PassManager((Count(),), data=[X, X])
    hash(PassManager((Count(),), data=[X]))


def test_arrays_are_drawn_and_cut() -> None:
    ids = torch.arange(10)
    batches = array_batches({"a": ids, "b": ids.view(10, 1) * 2}, samples=7, batch=3)
    assert [len(batch["a"]) for batch in batches] == [3, 3, 1]
    drawn = torch.cat([batch["a"] for batch in batches])
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    assert torch.equal(torch.cat([batch["b"] for batch in batches]).view(-1), drawn * 2)
    (whole,) = array_batches({"a": ids}, samples=99, batch=99)
    assert torch.equal(whole["a"], ids)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "has no array"),
        ({"a": torch.zeros(())}, "has no examples"),
        ({"a": torch.zeros(0, 3)}, "has no examples"),
        ({"a": torch.zeros(3), "b": torch.zeros(4)}, "different numbers of examples in dimension 0: a 3, b 4"),
    ],
)
def test_arrays_that_do_not_fit(arrays: dict[str, Tensor], message: str) -> None:
    with pytest.raises(gp.GraphPruneError, match=message):
        array_batches(arrays, samples=4, batch=2)


def test_reading_refuses_numbers_below_one(tmp_path: Path) -> None:
    with pytest.raises(gp.GraphPruneError, match="samples=0, batch=16"):
        read_batches(tmp_path / "x.npz", "m:f", samples=0)


_MLP = ("tests.models:mlp", "--input", "x=4x16", "-p", "smooth-quant")


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_transform_reads_arrays(suffix: str, tmp_path: Path) -> None:
    arrays = {"x": np.random.default_rng(0).normal(size=(20, 16))}
    path = tmp_path / f"data.{suffix}"
    if suffix == "npz":
        np.savez(path, **arrays)
    else:
        safetensors.numpy.save_file(arrays, path)
    result = run_cli("transform", *_MLP, "--data", path, "--samples", "18", "--batch", "8", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "18 examples in 3 batches" in result.stderr
    assert "input_smoothing" in result.stdout
    assert str(gp.load(tmp_path / "out")) == result.stdout


def test_transform_reads_texts(bert: Path, tmp_path: Path) -> None:
    data = ("--data", bert / "texts.txt", "--samples", "6", "--length", "5", "--batch", "4")
    result = run_cli("transform", bert / "model", "-p", "smooth-quant{alpha=auto}", *data)
    assert result.exit_code == 0, result.stderr
    assert "6 examples in " in result.stderr
    assert "weights-smoothed 13" in result.stderr


def test_transform_says_where_data_is_not_used(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.zeros((4, 16), np.float32))
    result = run_cli("transform", *_MLP[:3], "-p", "remove-dead", "--data", tmp_path / "data.npz")
    assert result.exit_code == 0, result.stderr
    assert "no pass of this pipeline needs data" in result.stderr


def test_transform_refusals(bert: Path, tmp_path: Path) -> None:
    assert "smooth-quant needs calibration data" in refused("transform", *_MLP)
    (tmp_path / "texts.txt").write_text("a cat\n")
    assert "is no folder that could have one" in refused("transform", *_MLP, "--data", tmp_path / "texts.txt")
    (tmp_path / "bad.npz").write_bytes(b"no zip")
    assert "cannot be read as arrays" in refused("transform", *_MLP, "--data", tmp_path / "bad.npz")
    assert "cannot be read as arrays" in refused("transform", *_MLP, "--data", tmp_path / "none.safetensors")
    np.savez(tmp_path / "pickled.npz", x=np.array([object()]))
    assert "cannot be read as arrays" in refused("transform", *_MLP, "--data", tmp_path / "pickled.npz")
    np.savez(tmp_path / "other.npz", y=np.zeros((4, 16), np.float32))
    result = run_cli("transform", *_MLP, "--data", tmp_path / "other.npz")
    assert result.exit_code == 2
    assert "batch 0: unknown input 'y'" in result.stderr
