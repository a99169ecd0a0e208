"""The report: its numbers are the manifest's, its pictures the file's zeros, and no text of an artifact becomes markup."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import graphprune as gp
from graphprune import cli
from graphprune.artifact.manifest import Manifest
from graphprune.commands.arguments import numbers
from graphprune.pipeline.registry import make_target
from graphprune.reporting.collect import collect
from graphprune.reporting.page import format_size
from tests.models import MODELS, example
from tests.report_pages import LEVELS, Page, make_artifact, make_benchmark
from tests.traced import traced

pytest.importorskip("onnx", reason="the ONNX target needs the extra onnx")
_HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("report") / "artifact")


@pytest.fixture(scope="module")
def html(made: Path) -> str:
    out = made.parent / "report.html"
    assert gp.report(made, out).verdict == "verified"
    return out.read_text(encoding="utf-8")


@pytest.fixture
def artifact(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "artifact"))


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["report", *map(str, arguments)])


def change(folder: Path, **fields: object) -> None:
    """Write other fields into a manifest, as one that says so of itself would have them."""
    Manifest.read(folder).model_copy(update=fields).write(folder)


def figures(page: str) -> dict[str, tuple[str, str]]:
    return Page(page).figures


# -- what it says -----------------------------------------------------------------------------------------------------


def test_every_number_is_the_manifests(html: str, made: Path) -> None:
    manifest, shown = Manifest.read(made), figures(html)
    assert shown["sparsity"] == (str(manifest.sparsity()), f"{manifest.sparsity():.4f}")
    for site in manifest.sites:
        assert shown[f"sites.{site.name}.sparsity"] == (str(site.sparsity), f"{site.sparsity:.4f}")
        assert shown[f"sites.{site.name}.zeros"] == (str(site.zeros), f"{site.zeros:,}")
    for item in manifest.files:
        assert shown[f"files.{item.name}"] == (str(item.bytes), format_size(item.bytes))
    assert shown["metrics.accuracy"] == ("0.8712345", "0.8712")
    assert float(shown["parity.max_abs"][0]) == manifest.parity.max_abs
    assert float(shown["parity.tolerance"][0]) == manifest.parity.tolerance
    for kind, names in manifest.coverage.items():
        assert shown[f"coverage.{kind}"] == (str(len(names)), str(len(names)))
    for name, count in manifest.passes.items():
        assert shown[f"passes.{name}"] == (str(count), str(count))
    dense = 4 * sum(site.weights for site in manifest.sites)
    kept = 4 * sum(site.weights - site.zeros for site in manifest.sites)
    assert float(shown["weights.float32"][0]) == dense
    assert float(shown["weights.kept"][0]) == kept


def test_it_says_what_was_asked_and_what_was_measured(html: str, made: Path) -> None:
    page = Page(html)
    assert page.figures["patterns.4x1"][1] == "0.5000"
    text = re.sub(r"\s+", " ", page.text)
    assert "insert-masks" in text
    assert "cool_down0.4" in text.replace(" ", "")
    assert "stored only" in text  # what the target does with 4x1
    for check in collect(made).verification.checks:  # type: ignore[union-attr]
        assert check.detail in text


def test_pictures_are_the_zeros_in_the_file(html: str, made: Path) -> None:
    manifest = Manifest.read(made)
    stored = make_target("onnx").weights(made, {site.name: site.layout for site in manifest.sites})
    drawn = [item for item in Page(html).all("canvas") if "thumb" in str(item["class"])]
    assert len(drawn) == len(manifest.sites)
    for site, canvas in zip(manifest.sites, drawn, strict=True):
        zeros = stored[site.name].zeros
        assert (canvas["height"], canvas["width"]) == tuple(map(str, zeros.shape))
        cells = [LEVELS.index(symbol) for symbol in str(canvas["data-cells"])]
        assert np.array_equal(np.array(cells).reshape(zeros.shape) == 0, zeros)
        assert site.name in str(canvas["aria-label"])


def test_the_training_log_is_drawn(html: str) -> None:
    readings = json.loads(
        next(item["data-readings"] for item in Page(html).all("div") if "data-readings" in item) or ""
    )
    assert [entry[1] for entry in readings] == list(range(20))
    assert readings[-1][3] == pytest.approx(0.5)
    assert "series-sparsity" in html
    assert "20 optimizer steps." in html


def test_the_page_is_whole_and_asks_nobody(html: str) -> None:
    page = Page(html)
    assert not re.findall(r"""(?:src|href|action)\s*=\s*["'](?!#|data:,)""", html)
    assert "://" not in html.replace("http://www.w3.org/2000/svg", "")
    assert "url(" not in html
    assert "@import" not in html
    (policy,) = [item["content"] for item in page.all("meta") if item.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert not any("style" in found or any(name.startswith("on") for name in found) for _, found in page.tags)


def test_the_page_can_be_read_without_eyes(html: str) -> None:
    page = Page(html)
    assert page.all("html")[0]["lang"] == "en"
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    for svg in page.all("svg"):
        assert "aria-label" in svg or "aria-hidden" in svg or "preserveaspectratio" in svg
    assert all("aria-label" in item or "ramp" in str(item["class"]) for item in page.all("canvas"))
    targets = {item["id"] for _, item in page.tags if "id" in item}
    assert {str(item["href"])[1:] for item in page.all("a")} <= targets


def test_the_same_artifact_gives_the_same_page(made: Path, html: str, tmp_path: Path) -> None:
    gp.report(made, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == html


# -- texts of others --------------------------------------------------------------------------------------------------


def test_no_text_of_an_artifact_becomes_markup(artifact: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(artifact)
    sites = [site.model_copy(update={"name": f"{_HOSTILE}.{site.name}"}) for site in manifest.sites]
    change(
        artifact,
        model=f"package:{_HOSTILE}", sites=sites, coverage={_HOSTILE: [_HOSTILE, '"><img src=x onerror=alert(1)>']},
        metrics={_HOSTILE: 1.0}, versions={_HOSTILE: _HOSTILE}, passes={_HOSTILE: 3}, outputs=[_HOSTILE],
        recipe=f'insert-masks{{select=["{_HOSTILE}"]}}',
        parity=manifest.parity.model_copy(update={"worst_node": _HOSTILE}),
        inputs=[manifest.inputs[0].model_copy(update={"name": _HOSTILE, "shape": ['"b<i>"', 16]})],
    )  # fmt: skip
    assert gp.report(artifact, tmp_path / "page.html").verdict.startswith("NOT verified")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.all("script")) == 1
    assert not page.all("img")
    assert not page.all("i") or all("class" in item for item in page.all("i"))
    assert f"metrics.{_HOSTILE}" in page.figures
    assert unescape(_HOSTILE) in page.text


def test_a_recipe_of_another_grammar_is_shown_as_it_is(artifact: Path, tmp_path: Path) -> None:
    change(artifact, recipe="passes: <yaml>")
    gp.report(artifact, tmp_path / "page.html")
    assert "passes: <yaml>" in Page((tmp_path / "page.html").read_text(encoding="utf-8")).text


# -- what is not there ------------------------------------------------------------------------------------------------


def test_an_artifact_without_training_metrics_and_masks(tmp_path: Path) -> None:
    gp.export(traced("mlp"), "onnx", tmp_path / "plain")
    gp.report(tmp_path / "plain", tmp_path / "page.html")
    text = Page((tmp_path / "page.html").read_text(encoding="utf-8")).text
    for sentence in ("no training log", "No metric was stated", "No latency was given", "No layer was pruned"):
        assert sentence in text


def test_a_failed_check_is_written_and_ends_with_code_2(artifact: Path, tmp_path: Path) -> None:
    (artifact / "model.onnx").write_bytes((artifact / "model.onnx").read_bytes()[:-40])
    result = run(artifact, "-o", tmp_path / "page.html")
    assert result.exit_code == 2
    assert "NOT verified: 3 of 3 checks failed" in result.stdout
    assert result.stderr.startswith("error: ")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert [item["data-verdict"] for item in page.all("p") if "data-verdict" in item] == ["bad"]
    assert {item["data-passed"] for item in page.all("li") if "data-passed" in item} == {"no"}
    assert "The masks cannot be read" in page.text
    assert "Do not use these files." in page.text


def test_zeros_at_other_places_are_marked(artifact: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(artifact)
    first = manifest.sites[0].model_copy(update={"zeros_sha256": "0" * 64})
    change(artifact, sites=[first, *manifest.sites[1:]])
    assert gp.report(artifact, tmp_path / "page.html", verify=False).verdict == "not checked"
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.text.count("differs from the manifest") == 2
    assert "Not checked" in page.text


def test_without_verify_a_damaged_file_is_an_error(artifact: Path, tmp_path: Path) -> None:
    (artifact / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(gp.VerifyError, match="cannot be read"):
        gp.report(artifact, tmp_path / "page.html", verify=False)
    assert not (tmp_path / "page.html").exists()


def test_a_damaged_training_log_is_found(artifact: Path, tmp_path: Path) -> None:
    (artifact / "training.jsonl").write_text("{}\n")
    assert gp.report(artifact, tmp_path / "page.html").verdict == "NOT verified: 1 of 3 checks failed"
    with pytest.raises(gp.VerifyError, match=r"training\.jsonl cannot be read: line 1"):
        gp.report(artifact, tmp_path / "other.html", verify=False)


# -- latency ----------------------------------------------------------------------------------------------------------


def test_latencies_come_from_the_benchmark(artifact: Path, tmp_path: Path) -> None:
    benchmark = make_benchmark(tmp_path / "bench.json", artifact)
    result = run(artifact, "--bench", tmp_path / "bench.json", "-o", tmp_path / "page.html")
    assert result.exit_code == 0, result.stderr
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    case = benchmark.cases[0]
    for name in ("ours", "dense"):
        assert page.figures[f"latency.batch 2, length 16.{name}"][0] == str(case.latency(name).median)
    assert page.figures["latency.batch 2, length 16.ours"][1] == "1.00 ms"
    assert page.figures["throughput_ratio"][1] == "4.00"
    assert page.figures["models.ours"][0] == str(benchmark.artifact("ours").model_bytes)
    assert "a <machine>; 2 threads" in page.text
    assert "a note & more" in page.text


def test_a_benchmark_of_other_artifacts_is_refused(artifact: Path, tmp_path: Path) -> None:
    make_benchmark(tmp_path / "bench.json", artifact)
    gp.export(traced("residual"), "onnx", tmp_path / "other")
    with pytest.raises(gp.GraphPruneError, match=r"measured dense, ours, and none of them is .*other as it is now"):
        gp.report(tmp_path / "other", tmp_path / "page.html", bench=tmp_path / "bench.json")
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(gp.GraphPruneError, match="is no benchmark file"):
        gp.report(artifact, tmp_path / "page.html", bench=tmp_path / "bench.json")
    with pytest.raises(gp.GraphPruneError, match="cannot be read"):
        gp.report(artifact, tmp_path / "page.html", bench=tmp_path / "missing.json")
    assert not (tmp_path / "page.html").exists()


# -- bad input --------------------------------------------------------------------------------------------------------


def test_what_is_no_artifact_is_refused(tmp_path: Path, artifact: Path) -> None:
    with pytest.raises(gp.VerifyError, match="is no folder"):
        gp.report(tmp_path / "missing", tmp_path / "page.html")
    (tmp_path / "empty").mkdir()
    with pytest.raises(gp.VerifyError, match="is no artifact"):
        gp.report(tmp_path / "empty", tmp_path / "page.html")
    text = (artifact / "manifest.json").read_text()
    (artifact / "manifest.json").write_text(text.replace("0.8712345", "0.9712345"))
    result = run(artifact, "-o", tmp_path / "page.html")
    assert result.exit_code == 2
    assert "it was edited after it was written" in result.stderr
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_exists_is_replaced_only_by_force(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("mine")
    result = run(artifact, "-o", tmp_path / "page.html")
    assert result.exit_code == 2
    assert "page.html exists" in result.stderr
    assert (tmp_path / "page.html").read_text() == "mine"
    assert run(artifact, "-o", tmp_path / "page.html", "--force").exit_code == 0
    assert "<!DOCTYPE html>" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_places_where_no_page_can_be(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(gp.GraphPruneError, match="lies in the artifact"):
        gp.report(artifact, artifact / "report.html")
    with pytest.raises(gp.GraphPruneError, match="is a folder"):
        gp.report(artifact, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(gp.GraphPruneError, match="cannot write"):
        gp.report(artifact, tmp_path / "file" / "page.html")
    gp.verify(artifact)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "high"])
def test_metrics_are_finite_numbers(value: object, tmp_path: Path) -> None:
    with pytest.raises(gp.GraphPruneError, match="metric 'accuracy' is"):
        gp.export(traced("mlp"), "onnx", tmp_path / "out", metrics={"accuracy": value})  # type: ignore[dict-item]
    assert not (tmp_path / "out").exists()


def test_the_command_line_states_metrics(tmp_path: Path) -> None:
    gp.save(gp.trace(MODELS["mlp"](), example("mlp"), factory="tests.models:mlp"), tmp_path / "saved")
    command = ["export", str(tmp_path / "saved"), "-o", str(tmp_path / "out"), "--metric"]
    result = CliRunner().invoke(cli.app, [*command, "accuracy=0.871"])
    assert result.exit_code == 0, result.stderr
    assert Manifest.read(tmp_path / "out").metrics == {"accuracy": 0.871}
    assert numbers(["f1=0.5", "loss=2"], "--metric") == {"f1": 0.5, "loss": 2.0}
    with pytest.raises(gp.RecipeError, match="--metric f1: 'high' is no number"):
        numbers(["f1=high"], "--metric")


def test_metrics_can_be_added_to_an_artifact(tmp_path: Path) -> None:
    artifact = gp.export(traced("mlp"), "onnx", tmp_path / "out", metrics={"accuracy": 0.5, "f1": 0.4})
    artifact.with_metrics({"accuracy": 0.75})
    assert gp.verify(tmp_path / "out").manifest.metrics == {"accuracy": 0.75, "f1": 0.4}


def test_the_log_reaches_the_artifact_through_a_saved_program(made: Path) -> None:
    assert [json.loads(line)["step"] for line in (made / "training.jsonl").read_text().splitlines()] == list(range(20))
    assert "training.jsonl" in {item.name for item in Manifest.read(made).files}
    assert torch.isfinite(torch.tensor([point.loss for point in collect(made).training])).all()
