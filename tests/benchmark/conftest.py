"""What tests of benchmarks share: artifacts to compare, and a process that takes the times that a test wants."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphprune.artifact import benchmark as module
from tests.benchmark.artifacts import LATENCY, FakeRemote, make_artifacts


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts to compare; tests that change one copy it."""
    return make_artifacts(tmp_path_factory.mktemp("made"))


@pytest.fixture
def mlp(made: Path) -> list[Path]:
    return [made / "mlp" / name for name in LATENCY]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeRemote]:
    FakeRemote.log, FakeRemote.answers = [], {}
    monkeypatch.setattr(module, "Remote", FakeRemote)
    monkeypatch.setattr(module, "_cores", lambda: 4)
    return FakeRemote
