"""The cost model of target sparse-cpu: measured once, remembered, and doubted where the file is damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import graphprune as gp
from graphprune.sparsity.packed import Packed
from graphprune.targets.sparse_cpu import SparseCpu, cost
from graphprune.targets.sparse_cpu.cost import Decision, decide
from tests.packed_programs import blocked, integers
from tests.test_sparse_kernels import needs_compiler
from tests.traced import traced


def _weight(rows: int = 32, features: int = 24, density: float = 0.2) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    kept = torch.rand(rows // 4, features, generator=generator) < density
    return torch.randn(rows, features, generator=generator) * kept.repeat_interleave(4, 0)


class _Clock:
    """Measurements that were asked for, and what they are said to give."""

    def __init__(self, gain: float) -> None:
        self.gain, self.asked = gain, 0

    def __call__(self, weight: Tensor, packed: Packed, tokens: int) -> float:
        self.asked += 1
        return self.gain


Set = Callable[..., _Clock]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Set:
    """``measured(2.0)``: nothing is known, and every measurement gives 2."""

    def prepare(gain: float, isa: str = "avx2") -> _Clock:
        clock = _Clock(gain)
        monkeypatch.setattr(cost, "_file", lambda: tmp_path / "costs" / "costs.json")
        monkeypatch.setattr(cost, "load_kernels", lambda: isa)
        monkeypatch.setattr(cost, "_measure_floats", clock)
        monkeypatch.setattr(cost, "_measure_integers", clock)
        return clock

    return prepare


def test_what_was_measured_is_not_measured_again(measured: Set) -> None:
    clock = measured(3.21)
    first = decide(_weight(), 128)
    assert first == decide(_weight(), 128)
    assert clock.asked == 1
    assert (first.sparse, first.gain, first.block) == (True, 3.21, 4)
    assert first.zeros == pytest.approx(float((_weight() == 0).float().mean()))


def test_another_shape_format_or_number_of_tokens_is_another_measurement(measured: Set) -> None:
    clock = measured(2.0)
    decide(_weight(), 128)
    decide(_weight(), 384)
    decide(_weight(), 128, quantized=True)
    decide(_weight(64), 128)
    decide(_weight(density=0.5), 128)
    assert clock.asked == 5


def test_a_layer_is_sparse_only_where_it_gains_for_sure(measured: Set) -> None:
    for gain, sparse in ((0.4, False), (1.0, False), (1.02, False), (1.2, True), (9.0, True)):
        measured(gain)
        assert decide(_weight(density=gain / 20), 128).sparse is sparse


def test_torch_alone_gains_nothing(measured: Set) -> None:
    measured(5.0, "torch")
    assert not decide(_weight(), 128).sparse


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"\xff\xfe\x00", b'{"a": "b"}', b'{"a": null}', b'{"a": [1]}', b'{"a": {}}'],
)
def test_a_damaged_file_of_costs_is_measured_anew(content: bytes, measured: Set, tmp_path: Path) -> None:
    clock = measured(2.0)
    (tmp_path / "costs").mkdir()
    (tmp_path / "costs" / "costs.json").write_bytes(content)
    assert decide(_weight(), 128).gain == 2.0
    assert decide(_weight(), 128).gain == 2.0
    assert clock.asked == 1
    assert 2.0 in json.loads((tmp_path / "costs" / "costs.json").read_text()).values()


def test_costs_that_are_no_number_are_measured_anew(measured: Set, tmp_path: Path) -> None:
    clock = measured(2.0)
    decide(_weight(), 128)
    path = tmp_path / "costs" / "costs.json"
    for value in ("NaN", "-1", '"fast"', "null"):
        path.write_text(path.read_text().replace("2.0", value))
        assert decide(_weight(), 128).gain == 2.0
    assert clock.asked == 5


@needs_compiler
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("shape", [(40, 24), (3, 7), (1, 1)])
def test_real_measurements_are_positive(quantized: bool, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape) * (torch.rand(shape) < 0.3)
    found = decide(weight, 20, quantized)
    assert 0 < found.gain < 1e4
    assert found == decide(weight, 20, quantized)


def test_decisions_read_as_words() -> None:
    assert str(Decision(True, 3.14, 0.8, 4)) == "sparse, 3.1x"
    assert str(Decision(False, 0.52, 0.8, 1)) == "dense (sparse 0.5x)"


def test_layers_without_zeros_and_convolutions_are_not_measured(measured: Set) -> None:
    clock = measured(2.0)
    assert SparseCpu().decisions(traced("mlp")) == {}
    assert set(SparseCpu().decisions(blocked("conv_bn"))) == set()
    assert clock.asked == 0
    assert set(SparseCpu().decisions(blocked("mlp"))) == {"first.weight", "second.weight"}


def test_weights_that_are_stored_transposed_are_measured_as_they_multiply(measured: Set, tmp_path: Path) -> None:
    measured(2.0)
    SparseCpu().decisions(blocked("gpt2_conv1d"))
    known = json.loads((tmp_path / "costs" / "costs.json").read_text())
    assert {key.split()[1] for key in known} == {"32x16", "16x32"}


def test_integers_are_measured_as_integers(measured: Set, tmp_path: Path) -> None:
    measured(2.0)
    SparseCpu().decisions(integers("mlp"))
    known = json.loads((tmp_path / "costs" / "costs.json").read_text())
    assert {key.split()[0] for key in known} == {"int8"}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("gain", "kernel"), [(0.5, "dense kernel"), (2.0, "sparse kernel")])
def test_the_cost_model_decides(gain: float, kernel: str, measured: Set, tmp_path: Path) -> None:
    measured(gain)
    manifest = gp.export(blocked("mlp"), "sparse-cpu", tmp_path / "out").manifest
    names = {"first.weight", "second.weight"}
    assert names <= set(manifest.coverage[kernel])
    decided = json.loads((tmp_path / "out" / "model.json").read_text())["decisions"]
    assert set(decided) == names
    assert all((item["sparse"], item["gain"], item["block"]) == (gain > 1, gain, 4) for item in decided.values())
    assert gp.verify(tmp_path / "out").passed
