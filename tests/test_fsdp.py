"""Partitioned Programs under FSDP2: each block holds its share, and training is what it is in one process."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.sharded_training import CASES, STEPS, build, held, train

pytestmark = pytest.mark.slow  # test_distributed_glue.py shards too, by the Trainer
ROOT = Path(__file__).parent.parent
PROCESSES = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reports of a run in two processes, one thread each."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    command += ["-m", "tests.sharded_training", str(folder)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def reports(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(PROCESSES)]


@functools.cache
def alone(name: str) -> tuple[list[float], dict[str, torch.Tensor], int]:
    """Losses, parameters and their bytes of the flat Program, trained on the whole batch in this process."""
    program = build(name)
    return train(name, program, slice(None)), program.state_dict(), held(program)


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_one_process(folder: Path, name: str) -> None:
    parts = [report["losses"] for report in reports(folder, name)]
    mean = [sum(values) / PROCESSES for values in zip(*parts, strict=True)]
    assert len(mean) == STEPS
    assert mean == pytest.approx(alone(name)[0], rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_those_of_one_process(folder: Path, name: str) -> None:
    whole = safetensors.torch.load_file(folder / f"{name}.safetensors")
    want = alone(name)[1]
    assert whole.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(whole[key], value, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_each_process_holds_half(folder: Path, name: str) -> None:
    for report in reports(folder, name):
        assert report["held"] < 0.55 * alone(name)[2]
        assert report["copied"] == []
        assert report["keys"] == list(alone(name)[1])
        assert set(report["sharded"]) == {key for key, value in alone(name)[1].items() if value.is_floating_point()}
