"""Advice: what a target will not make faster, and what would, from capability tables alone."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner

import graphprune as gp
from graphprune import cli
from graphprune.artifact import advice
from graphprune.artifact.advice import advise, pattern_row
from graphprune.artifact.manifest import Manifest
from graphprune.errors import RecipeError
from graphprune.pipeline.target import FORMATS, PATTERNS, Support, Target
from tests.models import MODELS, example
from tests.traced import run_passes, traced

ROOT = Path(__file__).parent.parent


def made_up(title: str, remark: str = "", **rows: Support) -> type[Target]:
    """A target of a table alone."""
    table = dict.fromkeys((*PATTERNS, *FORMATS), Support.STORED) | {
        "fp32": Support.EXPLOITED,
        **{key.replace("_", ":"): value for key, value in rows.items()},
    }

    class MadeUp(Target):
        name = title
        remarks = {"N:M": remark} if remark else {}

        @classmethod
        def capabilities(cls) -> Mapping[str, Support]:
            return table

    return MadeUp


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, type[Target]]:
    """Three targets, in place of those that are installed."""
    found = {
        "plain": made_up("plain"),
        "sparse": made_up("sparse", unstructured=Support.EXPLOITED, int8=Support.EXPLOITED, NxM=Support.IGNORED),
        "pairs": made_up("pairs", "on a GPU", N_M=Support.EXPLOITED, bf16=Support.REFUSED),
    }
    monkeypatch.setattr(advice, "known_targets", lambda: found)
    monkeypatch.setattr(advice, "find_target", found.__getitem__)
    return found


def masked(pattern: str, sparsity: float = 0.5) -> gp.Program:
    rule = f"pattern={pattern},sparsity={sparsity},criterion=magnitude,schedule=one-shot"
    return run_passes(traced("mlp"), f"insert-masks{{{rule}}}")


def test_what_would_be_faster_is_named(known: Mapping[str, type[Target]]) -> None:
    program = masked("unstructured", 0.8)
    assert advise(program, "sparse") == ()
    (text,) = advise(program, "plain")
    assert text == (
        "2 weights of pattern unstructured at sparsity 0.8001: target plain will not run faster for it, since its table says stored "
        "only; it exploits no sparsity pattern. unstructured is exploited by sparse"
    )
    (text,) = advise(program, "pairs")
    assert "it exploits N:M (on a GPU). unstructured is exploited by sparse" in text
    assert advise(run_passes(program, "fold-masks"), "plain") == advise(masked("unstructured", 0.8), "plain")


def test_where_nothing_exploits_a_pattern_others_are_named(known: Mapping[str, type[Target]]) -> None:
    (text,) = advise(masked("4x1"), "sparse")
    assert "target sparse leaves it out, since its table says ignored; it exploits unstructured" in text
    assert text.endswith("No installed target exploits NxM; N:M is exploited by pairs (on a GPU)")


def test_a_condition_is_said(known: Mapping[str, type[Target]]) -> None:
    assert advise(masked("2:4"), "pairs") == (
        "2 weights of pattern 2:4 at sparsity 0.5000: target pairs exploits N:M under a condition: on a GPU",
    )


def test_number_formats(known: Mapping[str, type[Target]]) -> None:
    program = run_passes(traced("mlp"), "dynamic-quant")
    texts = advise(program, "plain")
    assert [text.partition(":")[0] for text in texts] == ["3 tensors in int8", "3 tensors in dynamic uint8"]
    assert texts[0].endswith("stored only. int8 is exploited by sparse")
    assert texts[1].endswith("No installed target exploits dynamic uint8")
    assert len(advise(program, "sparse")) == 1
    (text,) = advise(run_passes(traced("mlp"), "cast-mixed"), "pairs")
    assert "target pairs refuses it" in text


def test_nothing_to_say(known: Mapping[str, type[Target]]) -> None:
    assert advise(traced("mlp"), "plain") == ()
    assert advise(masked("unstructured", 0.0), "plain") == ()


def test_a_manifest_is_enough(known: Mapping[str, type[Target]], tmp_path: Path) -> None:
    program = run_passes(masked("4x1"), "fold-masks")
    from graphprune.targets.reference import Reference

    manifest = gp.export(program, Reference(), tmp_path / "out").manifest
    assert advise(manifest, "plain") == advise(program, "plain")
    sites = [site.model_copy(update={"stored": "float16", "pattern": None}) for site in manifest.sites]
    (text,) = advise(manifest.model_copy(update={"sites": sites}), "plain")
    assert text.startswith("3 weights in fp16: target plain will not run faster")
    assert isinstance(manifest, Manifest)


@pytest.mark.parametrize(
    ("pattern", "row"),
    [
        *(("unstructured", "unstructured"), ("1x1", "unstructured"), ("4x1", "NxM"), ("2:4", "N:M")),
        *(("channelx1", "channel"), ("8xchannel", "channel")),
    ],
)
def test_rows_of_patterns(pattern: str, row: str) -> None:
    assert pattern_row(pattern) == row


def test_installed_targets() -> None:
    """80 percent unstructured for onnxruntime."""
    (text,) = advise(masked("unstructured", 0.8), "onnx")
    assert "target onnx will not run faster for it" in text
    assert "it exploits no sparsity pattern" in text
    assert "N:M is exploited by torch" in text or "unstructured is exploited by" in text
    assert advise(run_passes(traced("mlp"), "dynamic-quant"), "onnx") == ()
    with pytest.raises(RecipeError, match="did you mean 'onnx'"):
        advise(traced("mlp"), "onxn")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rule = "pattern=unstructured,sparsity=0.8,criterion=magnitude,schedule=one-shot"
    program = gp.trace(MODELS["mlp"](), example("mlp"), factory="tests.models:mlp")
    return gp.save(gp.transform(program, f"insert-masks{{{rule}}}"), tmp_path_factory.mktemp("advice") / "saved")


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify once, which test_artifact does in a new process too."""
    monkeypatch.setattr("graphprune.artifact.export.verify_afresh", lambda folder: None)


@pytest.mark.usefixtures("in_this_process")
def test_export_says_it_on_standard_error(saved: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["export", str(saved), "--target", "reference", "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.stderr
    assert "note: 2 weights of pattern unstructured at sparsity 0.8001: target reference will not run" in result.stderr
    assert result.stdout.count("\n") == 1


@pytest.mark.usefixtures("in_this_process")
def test_the_export_tool_is_the_same_command(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    arguments = ["export.py", str(saved), "--target", "reference", "--out", str(tmp_path / "out")]

    def run(*more: str) -> int:
        monkeypatch.setattr(sys, "argv", [*arguments, *more])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "tools/export.py"), run_name="__main__")
        return int(ended.value.code or 0)

    assert run() == 2
    assert "--force" in capsys.readouterr().err
    assert run("--force", "--metric", "accuracy=0.5") == 0
    output = capsys.readouterr()
    assert "will not run faster" in output.err
    assert "verified" in output.out
    assert Manifest.read(tmp_path / "out").metrics == {"accuracy": 0.5}
