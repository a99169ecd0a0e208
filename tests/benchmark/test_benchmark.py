"""What a benchmark measures and writes. Times are made up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import graphprune as gp
from graphprune.artifact.benchmark import benchmark
from graphprune.artifact.common_inputs import common_sizes, fill
from graphprune.artifact.comparison import Benchmark, Spread
from graphprune.artifact.contenders import read_entries
from graphprune.artifact.samples import make_inputs, read_samples
from graphprune.errors import GraphPruneError, VerifyError
from graphprune.targets.onnx import Onnx
from tests.benchmark.artifacts import LATENCY, FakeRemote, edited, run
from tests.traced import traced

pytest.importorskip("onnxruntime", reason="the ONNX target needs the extra onnx")


# what is measured


def test_ratios_are_taken_in_each_round(mlp: list[Path], fake: type[FakeRemote]) -> None:
    found = benchmark(mlp, batch=2, threads=3, rounds=6, warmup=2)
    (case,) = found.cases
    assert (case.batch, case.length, case.inputs) == (2, None, {"x": (2, 16)})
    assert [item.artifact for item in case.timed] == list(LATENCY)
    assert {len(item.seconds) for item in case.timed} == {6}
    latency = case.latency("dense")
    assert latency.median == pytest.approx(0.16)
    assert latency.low < latency.median < latency.high  # but the noise is not in the ratios
    assert case.latency_ratio("sparse-int8", "dense") == Spread(*[pytest.approx(0.125)] * 3)
    assert case.throughput_ratio("sparse-int8", "dense") == Spread(*[pytest.approx(8.0)] * 3)
    assert case.throughput("dense").median == pytest.approx(2 / 0.16, rel=0.4)
    assert case.of("dense").difference == 0.0
    assert case.of("sparse").difference == pytest.approx(0.5)  # 0.04 and 0.08
    assert case.of("sparse").peak_bytes == 123_000_000
    assert (found.settings.threads, found.settings.baseline) == (3, "dense")


def test_turns_are_shuffled_and_begin_with_a_call_that_does_not_count(mlp: list[Path], fake: type[FakeRemote]) -> None:
    benchmark(mlp, threads=3, rounds=8, warmup=2)
    checks, rest = fake.log[:8], fake.log[8:]
    assert checks == [f"{verb} {name}{more}" for name in LATENCY for verb, more in (("open", " 3"), ("close", ""))]
    assert rest[:8] == [text for name in LATENCY for text in (f"open {name} 3", f"time {name} 2")]  # warm-up
    turns = [text.split()[1] for text in rest[8:-4]]
    rounds = [tuple(turns[start : start + 4]) for start in range(0, 32, 4)]
    assert all(set(order) == set(LATENCY) for order in rounds)
    assert len(set(rounds)) > 3
    calls = {text.split()[1]: int(text.split()[2]) for text in rest[8:-4]}
    assert calls == {"dense": 2, "sparse": 2, "dense-int8": 2, "sparse-int8": 2}
    assert sorted(rest[-4:]) == sorted(f"close {name}" for name in LATENCY)
    before = list(fake.log)
    fake.log.clear()
    benchmark(mlp, threads=3, rounds=8, warmup=2)
    assert fake.log == before  # one seed, one order


def test_short_calls_are_measured_several_times(
    mlp: list[Path], fake: type[FakeRemote], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LATENCY, "dense", 0.002)
    monkeypatch.setitem(LATENCY, "sparse", 1e-7)
    benchmark(mlp[:2], rounds=1, warmup=2)
    assert [text for text in fake.log if text.startswith("time")][2:] in (
        ["time dense 6", "time sparse 51"],
        ["time sparse 51", "time dense 6"],
    )


def test_several_sizes_and_another_baseline(mlp: list[Path], fake: type[FakeRemote]) -> None:
    told: list[tuple[int, int, str]] = []
    found = benchmark(
        mlp[:2],
        batch=[1, 16],
        rounds=2,
        baseline=mlp[1],
        watch=lambda done, total, what: told.append((done, total, what)),
    )
    assert [(case.batch, case.inputs["x"]) for case in found.cases] == [(1, (1, 16)), (16, (16, 16))]
    assert found.settings.baseline == "sparse"
    assert [item.artifact for item in found.cases[0].timed] == ["dense", "sparse"]
    assert found.cases[0].throughput_ratio("dense", "sparse").median == pytest.approx(0.5)
    assert [done for done, _, _ in told] == list(range(11))
    assert {total for _, total, _ in told} == {10}
    assert "checking dense" in told[0][2]
    assert benchmark(mlp[:2], rounds=1, baseline="sparse").settings.baseline == "sparse"  # by its name in the table too


def test_artifacts_are_described_by_their_manifests(made: Path) -> None:
    entries = [item.contender for item in read_entries([made / "mlp" / name for name in LATENCY])]
    assert [item.corner for item in entries] == ["dense fp32", "sparse fp32", "dense int8", "sparse int8"]
    assert [item.weights for item in entries] == ["dense", "sparse 4x1 50.0 %"] * 2
    assert [item.numbers for item in entries] == ["fp32", "fp32", "int8", "int8"]
    for item in entries:
        folder = Path(item.folder)
        assert item.model_bytes == (folder / "model.onnx").stat().st_size
        assert item.folder_bytes == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert entries[3].model_bytes < entries[0].model_bytes


def test_names_are_as_long_as_they_must_be(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "mlp" / "dense", tmp_path / "dense")
    names = [item.contender.name for item in read_entries([made / "mlp" / "dense", tmp_path / "dense"])]
    assert names == ["mlp/dense", f"{tmp_path.name}/dense"]


def test_a_quantized_model_in_floats_is_no_int8(tmp_path: Path) -> None:
    program = traced("mlp")
    batches = make_inputs(program)
    recipe = "annotate-quant,insert-observers,calibrate{progress=false},insert-fake-quant,freeze-quant"
    quantized = gp.transform(program, recipe, data=batches)
    gp.export(quantized, Onnx(form="float"), tmp_path / "simulated", per_node=False)
    (entry,) = read_entries([tmp_path / "simulated"])
    assert entry.contender.corner == "dense quantized fp32"


# inputs


def test_inputs_have_the_sizes_that_were_asked_for(made: Path) -> None:
    entries = read_entries([made / "bert"])
    sizes = common_sizes(entries, 3, 40)
    assert (sizes.batch, sizes.length) == (3, 40)
    sample = read_samples(entries[0].folder)[0][0]
    arrays = fill(sizes.shapes, sample)
    assert {name: value.shape for name, value in arrays.items()} == dict.fromkeys(sample, (3, 40))
    assert {name: value.dtype for name, value in arrays.items()} == {n: v.dtype for n, v in sample.items()}
    assert arrays["attention_mask"].min() == 1
    assert set(np.unique(arrays["input_ids"])) == set(np.unique(sample["input_ids"]))
    assert common_sizes(entries).length == 64  # as many as the model has positions, if fewer than 128


def test_floats_are_normal_and_the_same_for_one_seed() -> None:
    sample = {"x": np.zeros((2, 4), np.float32), "keep": np.array([True, False])}
    first, again, other = (fill({"x": (50, 4), "keep": (5,)}, sample, seed) for seed in (0, 0, 1))
    assert np.array_equal(first["x"], again["x"])
    assert not np.array_equal(first["x"], other["x"])
    assert first["x"].dtype == np.float32
    assert abs(float(first["x"].std()) - 1) < 0.2
    assert first["keep"].tolist() == [True, False, True, False, True]
    with pytest.raises(VerifyError, match="no input ids"):
        fill({"ids": (1,)}, sample)


def test_fixed_sizes(made: Path) -> None:
    fixed = read_entries([made / "fixed"])
    assert common_sizes(fixed).shapes == {"x": (4, 16)}
    assert common_sizes(fixed, None, 16).batch == 4
    both = read_entries([made / "mlp" / "dense", made / "fixed"])
    assert common_sizes(both).shapes == {"x": (4, 16)}
    with pytest.raises(GraphPruneError, match=r"input x is fixed to batch 4, so it does not run with batch 2"):
        common_sizes(both, 2)
    with pytest.raises(GraphPruneError, match=r"does not run with length 20: besides the batch .*x \['b', 16\]"):
        common_sizes(both, 4, 20)
    with pytest.raises(GraphPruneError, match="has 64 positions, so it does not run with length 65"):
        common_sizes(read_entries([made / "bert"]), 1, 65)


def test_artifacts_with_other_inputs_are_not_compared(made: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(made / "mlp" / "dense", other)
    edited(other, lambda content: content["inputs"][0].update(shape=["b", 8]))
    with pytest.raises(GraphPruneError, match=r"dense takes x float32\[1, 16\] and .*other takes x float32\[1, 8\]"):
        common_sizes(read_entries([made / "mlp" / "dense", other]))


# output


def test_the_table(mlp: list[Path], fake: type[FakeRemote]) -> None:
    found = benchmark(mlp[:3], rounds=2, threads=1)
    lines = str(found).splitlines()
    assert lines[0] == "batch 1, 1 thread"
    assert lines[1].split()[:4] == ["engine", "artifact", "weights", "numbers"]
    assert [line.split()[1] for line in lines[2:5]] == ["dense", "dense-int8", "sparse"]  # in the order of the corners
    assert "4.00 [4.00-4.00]" in lines[3]
    assert "0.25 [0.25-0.25]" in lines[3]
    assert "7.5e-01" in lines[3]
    steps = next(index for index, line in enumerate(lines) if line.startswith("throughput ratios on one engine"))
    assert lines[steps + 2].split() == [
        "onnx", "4.00", "[4.00-4.00]", "-", "2.00", "[2.00-2.00]", "-", "-",
    ]  # fmt: skip
    assert "note: onnx: sparse int8 not measured;" in str(found)
    assert "note: onnx does not exploit 4x1" in str(found)


def test_no_note_where_all_corners_are_there(mlp: list[Path], fake: type[FakeRemote]) -> None:
    found = benchmark(mlp, rounds=1)
    assert not any("not measured" in text for text in found.notes)
    assert "8.00 [8.00-8.00]" in str(found).splitlines()[9]  # both over neither


def test_the_file_is_read_back(mlp: list[Path], fake: type[FakeRemote], tmp_path: Path) -> None:
    found = benchmark(mlp, batch=[1, 4], rounds=3)
    path = found.save(tmp_path / "bench.json")
    assert Benchmark.load(path) == found
    content = json.loads(path.read_text())
    assert list(content) == ["format", "settings", "artifacts", "cases", "notes"]
    result = content["cases"][1]["results"][3]
    assert result["artifact"] == "sparse-int8"
    assert result["throughput_ratio"] == {key: pytest.approx(8.0) for key in ("median", "low", "high")}
    assert len(result["seconds"]) == 3
    assert content["artifacts"][3]["corner"] == "sparse int8"


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content["cases"][0]["results"].pop(),
        lambda content: content["cases"][0]["results"][0]["seconds"].pop(),
        lambda content: content["cases"][0]["results"][0].update(seconds=[0.0, 1.0]),
        lambda content: content["settings"].update(baseline="other"),
        lambda content: content["artifacts"][0].pop("target"),
        lambda content: content.pop("notes"),
    ],
)
def test_a_damaged_file_is_refused(
    mlp: list[Path], fake: type[FakeRemote], tmp_path: Path, damage: Callable[[Any], object]
) -> None:
    path = benchmark(mlp[:2], rounds=2).save(tmp_path / "bench.json")
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(GraphPruneError, match="is no benchmark file"):
        Benchmark.load(path)


def test_help() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "taking turns" in result.stdout
