"""Settings for every test: offline, one thread, and golden files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
# No time limits: machines are busy.  The same examples at every run in CI, new ones on a developer's machine.
settings.register_profile(
    "graphprune",
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
)
settings.load_profile("graphprune")

_GOLDEN = Path(__file__).parent / "golden"
_AGAIN = {"bert_sequence", "bert_token", "distilbert_qa", "roberta"}
"""Models with the layers of `bert_qa`: where a test runs on that too, they are left to the slow tests."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark a test slow that repeats what the same test checks on another model of the family."""

    def models(item: pytest.Item) -> set[str]:
        values = getattr(getattr(item, "callspec", None), "params", {}).values()
        return {value for value in values if isinstance(value, str)}

    on_bert = {item.nodeid.partition("[")[0] for item in items if "bert_qa" in models(item)}
    for item in items:
        if models(item) & _AGAIN and item.nodeid.partition("[")[0] in on_bert:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _vnni() -> Iterator[None]:
    """Let presets take this CPU for one with VNNI, so that goldens are the same everywhere."""
    with pytest.MonkeyPatch.context() as patch:
        found = {"architecture": "x86_64", "avx512_vnni": True}
        patch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)  # torch 2.8 has it not
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="rewrite tests/golden/ with what the tests produce")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with ``tests/golden/<name>.txt``: ``golden("mlp", text)``; ``--update-goldens`` rewrites it."""
    update = bool(request.config.getoption("--update-goldens"))

    def compare(name: str, text: str) -> None:
        path = _GOLDEN / f"{name}.txt"
        text = text.rstrip("\n") + "\n"
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        command = f"pytest '{request.node.nodeid}' --update-goldens"
        if not path.exists():
            pytest.fail(f"tests/golden/{name}.txt does not exist; write it with: {command}", pytrace=False)
        assert text == path.read_text(encoding="utf-8"), f"differs from tests/golden/{name}.txt; if wanted: {command}"

    return compare
