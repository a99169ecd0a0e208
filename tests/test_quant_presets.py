"""Presets of runtimes."""

from __future__ import annotations

import pytest
import torch

from graphprune.errors import RecipeError
from graphprune.quant import ACTIVATION_UINT8, OPERATORS, PRESETS, WEIGHT_INT8, has_vnni, parse_observer, preset


def test_every_preset_can_be_used():
    assert set(PRESETS) == {"onnxruntime", "deepsparse", "tensorrt", "ipex", "openvino"}
    for name, found in PRESETS.items():
        assert found.name == name
        assert found.operators <= OPERATORS
        assert ("embedding" in found.operators) == (found.embeddings is not None)
        assert found.weights.symmetric  # pruned weights stay zero, and matrix products need no correction
        assert found.activations.axis is None
        parse_observer(found.observer)
        parse_observer(found.weight_observer, axis=found.weights.axis)
        hash(found)


def test_what_the_runtimes_need():
    assert str(PRESETS["tensorrt"].activations) == "int8:symmetric:tensor"
    assert str(PRESETS["deepsparse"].weights) == "int8:symmetric:tensor"
    assert PRESETS["deepsparse"].embeddings == ACTIVATION_UINT8
    assert [name for name, found in PRESETS.items() if found.outputs] == ["onnxruntime"]
    assert {name for name, found in PRESETS.items() if "matmul" in found.operators} == {"deepsparse", "openvino"}
    assert [name for name, found in PRESETS.items() if found.products is not None] == ["openvino"]
    assert str(PRESETS["openvino"].products) == "int8:symmetric:tensor"


def test_weights_are_reduced_where_vnni_is_missing():
    assert preset("onnxruntime", vnni=True) == PRESETS["onnxruntime"]
    assert preset("onnxruntime", vnni=True).weights == WEIGHT_INT8
    assert str(preset("onnxruntime", vnni=False).weights) == "int8:symmetric:channel:reduced"
    assert preset("tensorrt", vnni=False) == PRESETS["tensorrt"]
    assert preset("onnxruntime") == preset("onnxruntime", vnni=has_vnni())


def test_unknown_preset():
    with pytest.raises(RecipeError, match="did you mean 'openvino'"):
        preset("openvin")


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"architecture": "x86_64", "avx512_vnni": True}, True),
        ({"architecture": "x86_64", "avx512_vnni": False, "avx_vnni": True}, True),
        ({"architecture": "x86_64", "avx2": True}, False),
        ({"architecture": "arm64"}, True),
        ({}, False),
    ],
)
def test_has_vnni(monkeypatch, found, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    assert has_vnni() is expected


def test_has_vnni_never_raises(monkeypatch):
    def broken():
        raise RuntimeError("cannot ask")

    monkeypatch.setattr(torch.cpu, "get_capabilities", broken, raising=False)
    assert has_vnni() is False
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", broken, raising=False)
    assert has_vnni() is False


def test_has_vnni_asks_an_older_torch_by_another_name(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True, raising=False)
    assert has_vnni() is True
