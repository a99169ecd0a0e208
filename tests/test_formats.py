"""Number formats of a Program, and targets that refuse one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import graphprune as gp
from graphprune.errors import LoweringError
from graphprune.ir.formats import formats_of
from graphprune.pipeline.target import Support
from graphprune.targets.onnx import Onnx
from tests.traced import run_passes, traced

WEIGHTS = 'annotate-quant{{activations=none,weights="{}"}},insert-fake-quant,freeze-quant'


@dataclass(frozen=True)
class Old(Onnx):
    """A runtime that knows neither four bits nor ranges at run time."""

    name = "old"

    @classmethod
    def capabilities(cls) -> Mapping[str, Support]:
        return {**super().capabilities(), "int4": Support.REFUSED, "dynamic uint8": Support.REFUSED}


def test_a_float_program_has_none() -> None:
    assert formats_of(traced("mlp")) == {}


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("dynamic-quant", {"int8", "dynamic uint8"}),
        (WEIGHTS.format("int4:symmetric:channel"), {"int4"}),
        (WEIGHTS.format("uint4:affine:channel:group8"), {"uint4 per group"}),
        (WEIGHTS.format("int8:symmetric:channel:group8"), {"int8 per group"}),
        ("annotate-quant,insert-fake-quant", {"int8", "uint8"}),
        ("cast-mixed", {"bf16"}),
        ("cast-mixed{dtype=float16}", {"fp16"}),
    ],
)
def test_rows_are_those_of_the_capability_table(text: str, rows: set[str]) -> None:
    found = formats_of(run_passes(traced("mlp"), text))
    assert set(found) == rows
    assert rows - {"uint4 per group"} <= set(Onnx.capabilities())
    assert all(names for names in found.values())


@pytest.mark.parametrize(
    ("text", "row"), [(WEIGHTS.format("int4:symmetric:channel"), "int4"), ("dynamic-quant", "dynamic uint8")]
)
def test_a_refused_format_is_refused_before_lowering(text: str, row: str, tmp_path: Path) -> None:
    program = run_passes(traced("mlp"), text)
    with pytest.raises(LoweringError, match=rf"target old cannot run {row}, which .*its table says '{row}': refused"):
        gp.export(program, Old(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bfloat16_has_a_tolerance_of_its_own(tmp_path: Path) -> None:
    parity = gp.export(run_passes(traced("mlp"), "cast-mixed"), "onnx", tmp_path / "out").manifest.parity
    plain = gp.export(traced("mlp"), "onnx", tmp_path / "plain").manifest.parity
    assert 0 < parity.max_abs <= parity.tolerance
    assert 100 < parity.tolerance / plain.tolerance < 400
