"""The examples of the README and the docs run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import graphprune as gp
from graphprune.ir.masking import masked_sites
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
    for page in ("README.md", "docs/architecture.md", "docs/benchmarks.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for path in re.findall(r"`((?:graphprune|passes|targets|tools|tests|docs)/[\w./]+\.\w+)`", text):
            assert (ROOT / path).exists(), f"{page} names {path}"


def test_every_public_name_is_on_the_page_of_names() -> None:
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    for name in (*gp.__all__, *gp.training.__all__):
        assert name in page, name
