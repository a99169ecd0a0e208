"""``graphprune bench``: artifacts side by side. Times are made up wherever they matter; real processes run tiny models."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import graphprune as gp
from graphprune import cli
from graphprune.artifact import benchmark as module
from graphprune.artifact.benchmark import benchmark
from graphprune.artifact.common_inputs import common_sizes, fill
from graphprune.artifact.comparison import Benchmark, Spread
from graphprune.artifact.contenders import read_entries
from graphprune.artifact.manifest import Manifest
from graphprune.artifact.samples import make_inputs, read_samples
from graphprune.errors import GraphPruneError, LoweringError, VerifyError
from graphprune.pipeline.target import Target
from graphprune.targets.onnx import Onnx
from tests.traced import traced

pytest.importorskip("onnxruntime", reason="the ONNX target needs the extra onnx")

SPARSE = "insert-masks{pattern=4x1,sparsity=0.5,criterion=magnitude,schedule=one-shot,scope=local}"
LATENCY = {"dense": 0.08, "sparse": 0.04, "dense-int8": 0.02, "sparse-int8": 0.01}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four corners of an mlp, one of them with fixed sizes, and a tiny BERT, lowered to ONNX."""
    root = tmp_path_factory.mktemp("made")
    dense = traced("mlp")
    programs = {"dense": dense, "sparse": gp.transform(dense, SPARSE)}
    programs |= {f"{key}-int8": gp.transform(value, "dynamic-quant") for key, value in programs.items()}
    for key, program in programs.items():
        gp.export(program, "onnx", root / "mlp" / key, per_node=False)
    gp.export(traced("bert_qa"), "onnx", root / "bert", per_node=False)
    shutil.copytree(root / "mlp" / "dense", root / "fixed")
    edited(root / "fixed", lambda content: content["inputs"][0].update(shape=[4, 16]))
    return root


@pytest.fixture
def mlp(made: Path) -> list[Path]:
    return [made / "mlp" / name for name in LATENCY]


class FakeRemote:
    """Stands for a process: computes the sample's outputs, takes the times of ``LATENCY``, and writes down what was asked."""

    log: list[str]
    answers: Mapping[str, Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]]

    def __init__(self, target: Target, folder: Path, *, threads: int | None = None):
        self.folder, self.threads, self.round = folder, threads, 0
        self.log.append(f"open {folder.name} {threads}")

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        for given, expected in read_samples(self.folder):
            if all(np.array_equal(inputs[name], given[name]) for name in given):
                found = expected
                break
        else:
            batch = len(next(iter(inputs.values())))
            found = {"output": np.full((batch, 4), LATENCY[self.folder.name], dtype=np.float32)}
        change = self.answers.get(self.folder.name)
        return change(found) if change is not None else found

    def time(self, inputs: Mapping[str, np.ndarray], calls: int = 1) -> list[float]:
        self.log.append(f"time {self.folder.name} {calls}")
        self.round += 1
        latency = LATENCY[self.folder.name] * (1 + self.round % 3)  # machines are noisy, for all artifacts alike
        return [9.0, *[latency] * (calls - 1)]

    def peak_memory(self) -> int:
        return 123_000_000

    def __enter__(self) -> FakeRemote:
        return self

    def __exit__(self, *_: object) -> None:
        self.log.append(f"close {self.folder.name}")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeRemote]:
    FakeRemote.log, FakeRemote.answers = [], {}
    monkeypatch.setattr(module, "Remote", FakeRemote)
    monkeypatch.setattr(module, "_cores", lambda: 4)
    return FakeRemote


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["bench", *map(str, arguments)])


def refused(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return result.stderr


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


# real processes


def test_the_command(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    result = run(
        made / "bert", "--rounds", "2", "--warmup", "1", "--threads", "1", "--length", "8", "-o", out, "--json"
    )
    assert result.exit_code == 0, result.stderr
    found = Benchmark.load(out)
    assert json.loads(result.stdout) == json.loads(out.read_text())
    (case,) = found.cases
    assert (case.batch, case.length) == (1, 8)
    (timed,) = case.timed
    assert (timed.artifact, timed.difference) == ("bert", 0.0)
    assert all(value > 0 for value in timed.seconds)
    assert timed.peak_bytes > 10_000_000
    assert any("onnx: dense int8, sparse fp32, sparse int8 not measured" in text for text in found.notes)
    assert f"note: written to {out}" in result.stderr


def test_the_runtime_of_another_environment(mlp: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The process is that of ``GRAPHPRUNE_ONNX_PYTHON``; where the runtime is missing there, the line that installs it is shown."""
    link = tmp_path / "python"
    link.write_text(f'#!/bin/sh\necho started >> "{tmp_path}/log"\nexec "{sys.executable}" "$@"\n')
    link.chmod(0o755)
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('none here')\n")
    monkeypatch.setenv("GRAPHPRUNE_ONNX_PYTHON", str(link))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert 'run: pip install "graphprune[onnx]"' in refused(mlp[0])
    assert (tmp_path / "log").read_text() == "started\n"


def test_the_memory_of_a_process_is_its_own() -> None:
    ballast = np.ones(100_000_000)  # 800 MB, which a child process has for a moment too
    code = "from graphprune.pipeline.remote import _Server; print(_Server().memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 10e6 < int(done.stdout) < ballast.nbytes


UNCHECKED = """
from graphprune.artifact import benchmark
from graphprune.cli import main
benchmark._check_sample = lambda *_: None  # two processes less
main()
"""


def test_an_interrupt_ends_all_processes(mlp: list[Path]) -> None:
    arguments = [*map(str, mlp[:2]), "--rounds", "100000", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", UNCHECKED, "bench", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    while len(workers := children(process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(workers) == 2
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    while (left := [pid for pid in workers if alive(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)  # one that was only just starting ends when it finds its standard input closed
    assert not left


def alive(pid: int) -> bool:
    """Whether it runs; a process that nobody has waited for yet has no command line any more."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    return False


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    if not path.exists():
        pytest.skip("this system does not list children of a process")
    return [int(text) for text in path.read_text().split()]


# bad input


def edited(folder: Path, change: Callable[[Any], object]) -> None:
    """Change a manifest and make it whole again."""
    content = Manifest.read(folder).model_dump()
    change(content)
    Manifest.model_validate(content).write(folder)


def test_what_is_no_artifact_is_refused(made: Path, tmp_path: Path) -> None:
    assert "nothing is no folder; give folders that graphprune export wrote" in refused(tmp_path / "nothing")
    assert "is no artifact: it has no manifest.json" in refused(made)
    damaged = tmp_path / "damaged"
    shutil.copytree(made / "mlp" / "dense", damaged)
    manifest = damaged / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"onnx"', '"openvino"', 1))
    assert "it was edited after it was written" in refused(damaged)
    with pytest.raises(GraphPruneError, match="no artifact is given"):
        benchmark([])


def test_files_that_are_not_those_of_the_manifest_are_refused(made: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(made / "mlp" / "dense", mixed)
    shutil.copy(made / "mlp" / "dense-int8" / "model.onnx", mixed)
    assert "bytes, not" in refused(mixed)
    (mixed / "model.onnx").unlink()
    assert "model.onnx is missing; see graphprune verify" in refused(mixed)


def test_the_same_artifact_twice_is_refused(made: Path, tmp_path: Path) -> None:
    dense = made / "mlp" / "dense"
    assert "dense is given twice\n" in refused(dense, dense)
    (tmp_path / "link").symlink_to(dense)
    assert f"link is given twice, also as {dense}" in refused(dense, tmp_path / "link")


def test_artifacts_of_different_models_are_refused(made: Path, tmp_path: Path) -> None:
    message = refused(made / "mlp" / "dense", made / "bert")
    assert "are of different models: the first is of tests.models:Mlp, the second of transformers." in message
    other = tmp_path / "other"
    shutil.copytree(made / "mlp" / "dense", other)
    edited(other, lambda content: content["sites"][0].update(name="third.weight"))
    assert "only" in refused(made / "mlp" / "dense", other)
    shutil.rmtree(other)
    shutil.copytree(made / "mlp" / "dense", other)
    edited(other, lambda content: content.update(outputs=["logits"]))
    assert "the first has the outputs output, the second logits" in refused(made / "mlp" / "dense", other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--threads", "0"), "threads=0 is too small"),
        (("--threads", "5"), "threads=5 is more than the 4 cores"),
        (("--rounds", "0"), "rounds=0 is too small"),
        (("--warmup", "0"), "warmup=0 is too small"),
        (("--batch", "0"), "batch=0 is too small"),
        (("--batch", "2", "--batch", "2"), "batch is given twice with the same number"),
        (("--length", "8"), "does not run with length 8"),
        (("--baseline", "dens"), "baseline dens is not among the artifacts"),
    ],
)
def test_bad_numbers(mlp: list[Path], fake: type[FakeRemote], options: tuple[str, ...], message: str) -> None:
    assert message in refused(*mlp[:2], *options)
    assert fake.log == []


def test_a_wrong_model_is_not_timed(mlp: list[Path], fake: type[FakeRemote]) -> None:
    fake.answers = {"sparse": lambda found: {"output": found["output"] + 1}}
    with pytest.raises(VerifyError, match="sparse does not compute its own sample outputs: output differs by 1"):
        benchmark(mlp, rounds=1)
    assert not any(text.startswith("time") for text in fake.log)
    fake.answers = {"sparse": lambda found: found if len(found["output"]) > 1 else {"output": found["output"][:, :2]}}
    with pytest.raises(
        VerifyError, match=r"sparse cannot be compared with .*dense: output output is of shape \(1, 2\)"
    ):
        benchmark(mlp, rounds=1)
    fake.answers = {"sparse": lambda found: found if len(found["output"]) > 1 else {"output": found["output"] * np.nan}}
    with pytest.raises(VerifyError, match="output is not finite"):
        benchmark(mlp, rounds=1)


def test_a_model_that_does_not_run_says_with_what(
    mlp: list[Path], fake: type[FakeRemote], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: FakeRemote, inputs: Mapping[str, np.ndarray], calls: int = 1) -> list[float]:
        raise LoweringError("RuntimeError: out of memory")

    monkeypatch.setattr(fake, "time", fails)
    message = r"dense \(onnx\) does not run with x \[512, 16\]: RuntimeError: out of memory"
    with pytest.raises(LoweringError, match=message):
        benchmark(mlp, batch=512, rounds=1)


def test_threads_are_those_of_torch(mlp: list[Path], fake: type[FakeRemote]) -> None:
    assert benchmark(mlp[0], rounds=1).settings.threads == min(4, torch.get_num_threads())


def test_the_interface_is_public() -> None:
    assert gp.benchmark is benchmark
    assert gp.Benchmark is Benchmark
