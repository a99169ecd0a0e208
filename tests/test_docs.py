"""The examples of the README and the docs run as they stand."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import graphprune as gp
from graphprune.ir.masking import masked_sites
from graphprune.pipeline import registry
from tests.models import MODELS, example

ROOT = Path(__file__).parent.parent


def blocks(path: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(encoding="utf-8"), re.DOTALL)


def test_the_pass_of_the_architecture_page_runs() -> None:
    (code,) = [block for block in blocks("docs/architecture.md") if "class ZeroBias" in block]
    assert len(code.splitlines()) <= 50
    model = gp.trace(MODELS["mlp"](), example("mlp"))
    scope = {"model": model, "__name__": __name__}  # dataclasses look their module up
    exec(compile(code, "docs/architecture.md", "exec"), scope)
    program = scope["program"]
    assert isinstance(program, gp.Program)
    masked = [
        node.args[2].target
        for node in program.calls(torch.ops.aten.linear.default)
        if "mask" in str(node.args[1].target)
    ]
    assert masked
    assert all((program.tensor(name) == 0).all() for name in masked)
    assert "zero-bias" in program.history[-1]


def test_the_target_of_its_page_is_found_exports_and_verifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed as a package is: a module and the entry point that the page shows."""
    page = (ROOT / "docs/adding-a-target.md").read_text(encoding="utf-8")
    (code,) = blocks("docs/adding-a-target.md")
    assert len([line for line in code.splitlines() if line.strip()]) <= 45
    (toml,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    ((name, module),) = tomllib.loads(toml)["project"]["entry-points"]["graphprune.targets"].items()
    (tmp_path / f"{module}.py").write_text(code, encoding="utf-8")
    info = tmp_path / "numpy_target-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy-target\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[graphprune.targets]\n{name} = {module}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._load.cache_clear()
    try:
        masks = "insert-masks{pattern=4x1,sparsity=0.5,criterion=magnitude,schedule=one-shot}"
        program = gp.transform(gp.trace(MODELS["mlp"](), example("mlp")), masks)
        artifact = gp.export(program, "numpy", tmp_path / "out")
        assert gp.verify(artifact.folder).manifest.sparsity() == pytest.approx(0.5, abs=0.02)
        with pytest.raises(gp.LoweringError, match=r"aten\.gelu.* \(models\.py, line \d+\) has no form in NumPy"):
            gp.export(gp.trace(MODELS["residual"](), example("residual")), "numpy", tmp_path / "residual")
        with pytest.raises(gp.LoweringError, match=r"cannot run (dynamic u)?int8"):
            gp.export(gp.transform(program, "dynamic-quant"), "numpy", tmp_path / "int8")
    finally:
        monkeypatch.undo()
        registry._load.cache_clear()
        sys.modules.pop(module, None)


def test_the_loop_of_the_readme_runs(tmp_path: Path) -> None:
    (code,) = [block for block in blocks("README.md") if "gp.training.Session" in block]
    assert len(code.splitlines()) <= 24
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 99, (4, 8)), "labels": torch.randint(0, 2, (4,))} for _ in range(12)]
    code = code.replace('"out/"', repr(str(tmp_path / "out")))
    scope = {"model": MODELS["bert_sequence"](), "batches": batches, "__name__": "example"}
    exec(compile(code, "README.md", "exec"), scope)
    assert gp.verify(tmp_path / "out").manifest.sparsity() > 0.79


def test_the_recipe_of_the_readme_runs() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    recipe = gp.Recipe.parse(text, sparsity=0.5)
    assert recipe.target is not None
    program = gp.transform(MODELS["bert_sequence"](), recipe)
    assert {site.decision.sparsity for site in masked_sites(program)} == {0.5}
    assert not any("pooler" in site.name for site in masked_sites(program))


def test_every_public_name_is_documented() -> None:
    for name in gp.__all__:
        assert getattr(gp, name).__doc__ or name == "__version__", name


def test_pages_name_only_files_that_exist() -> None:
    for page in ("README.md", "docs/architecture.md", "docs/adding-a-target.md", "docs/benchmarks.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for path in re.findall(r"`((?:graphprune|passes|targets|tools|tests|docs)/[\w./]+\.\w+)`", text):
            assert (ROOT / path).exists(), f"{page} names {path}"


def test_every_public_name_is_on_the_page_of_names() -> None:
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    for name in (*gp.__all__, *gp.training.__all__):
        assert name in page, name
