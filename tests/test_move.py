"""Moving a Program: another dtype, the meta device, autocast, and a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from tests.models import MODELS
from tests.traced import assert_same, inputs_of, pair, run, tensors


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("name", MODELS)
def test_to_another_dtype_agrees_with_the_source(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model, program = pair(name)
    model.to(dtype)
    program.to(dtype)
    inputs = {
        key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs_of(name, model).items()
    }
    if name in (
        "llama",
        "t5",
    ):  # the source normalizes in float32 whatever its weights are; the trace in the weights' dtype
        tolerance = max(tolerance, 1e-6)
    want, have = run(model, inputs), run(program, inputs)
    assert [item.dtype for item in tensors(want)] == [item.dtype for item in tensors(have)]
    assert_same(want, have, tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_to_meta_and_run(name: str) -> None:
    model, program = pair(name)
    program.to("meta")
    inputs = {key: value.to("meta") for key, value in inputs_of(name, model).items()}
    output = tensors(run(program, inputs))
    assert output
    assert all(item.is_meta for item in output)


@pytest.mark.parametrize("name", ["mlp", "conv_bn", "bert_qa", "gpt2", "llama", "t5", "vit"])
def test_autocast_runs_and_agrees(name: str) -> None:
    model, program = pair(name)
    inputs = inputs_of(name, model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want, have = run(model, inputs), run(program, inputs)
    assert_same([item.float() for item in tensors(want)], [item.float() for item in tensors(have)], 5e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; the meta device stands in for it above")
@pytest.mark.parametrize("name", MODELS)
def test_to_cuda_agrees_with_the_source(name: str) -> None:
    model, program = pair(name)
    model.to("cuda")
    program.to("cuda")
    inputs = {key: value.to("cuda") for key, value in inputs_of(name, model).items()}
    assert_same(run(model, inputs), run(program, inputs), 1e-3)
