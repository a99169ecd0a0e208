"""Wheel and source distribution hold every source file: a package that pyproject does not list is silently missing from them."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_PACKED = (".py", "py.typed", ".j2", ".css", ".js", ".cpp", ".h", ".inl")
MOVED = {"passes": "graphprune/passes", "targets": "graphprune/targets"}


def _tracked() -> set[str]:
    """Files of the package that git knows or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "graphprune", *MOVED]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [Path(line) for line in listed.stdout.splitlines() if line.endswith(_PACKED)]
    return {str(path) for path in paths if (ROOT / path).exists()}


def _moved(path: str) -> str:
    """The name that a file has in the wheel."""
    top, _, rest = path.partition("/")
    return f"{MOVED.get(top, top)}/{rest}"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of both distributions."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    source.mkdir()
    for name in ("graphprune", *MOVED, "pyproject.toml", "README.md", "LICENSE"):  # so that no build/ is left behind
        (source / name).symlink_to(ROOT / name)
    command = [
        sys.executable,
        "-m",
        "build",
        "--sdist",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_source_file(wheel: zipfile.ZipFile) -> None:
    packed = {name for name in wheel.namelist() if name.endswith(_PACKED)}
    assert packed == {_moved(path) for path in _tracked()}
    assert "graphprune/targets/sparse_cpu/kernels/kernels.inl" in packed


def test_the_source_distribution_holds_every_source_file(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        packed = {item.name.partition("/")[2] for item in archive if item.isfile() or item.islnk() or item.issym()}
    assert _tracked() <= packed


def test_the_wheel_holds_entry_points_and_license(wheel: zipfile.ZipFile) -> None:
    info = next(name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" in name)
    points = wheel.read(f"{info}/entry_points.txt").decode()
    assert "[graphprune.passes]\ngraphprune = graphprune.passes" in points
    assert "[graphprune.targets]\ngraphprune = graphprune.targets" in points
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
