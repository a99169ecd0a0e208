"""``graphprune bench`` as a user runs it: real processes, interruptions and bad input."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

import graphprune as gp
from graphprune.artifact.benchmark import benchmark
from graphprune.artifact.comparison import Benchmark
from graphprune.errors import GraphPruneError, LoweringError, VerifyError
from tests.benchmark.artifacts import FakeRemote, edited, refused, run

pytest.importorskip("onnxruntime", reason="the ONNX target needs the extra onnx")


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


@pytest.mark.slow
def test_the_memory_of_a_process_is_its_own() -> None:
    ballast = np.ones(100_000_000)  # 800 MB, which a child process has for a moment too
    code = "from graphprune.pipeline.remote import _Server; print(_Server().memory())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 10e6 < int(done.stdout) < ballast.nbytes


UNCHECKED = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs, such as a test run, without it
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
    try:
        deadline = time.monotonic() + 300
        while len(workers := children(process.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(workers) == 2
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
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
