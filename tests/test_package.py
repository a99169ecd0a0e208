"""The wheel holds every source file: a package that pyproject does not list is silently missing from it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_PACKED = (".py", "py.typed", ".j2", ".css", ".js")
MOVED = {"passes": "graphprune/passes", "targets": "graphprune/targets"}


def _tracked() -> set[str]:
    """Files of the package that git knows or would add, under the names that they have in the wheel."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "graphprune", *MOVED]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [Path(line) for line in listed.stdout.splitlines() if line.endswith(_PACKED)]
    return {
        str(Path(MOVED.get(path.parts[0], path.parts[0]), *path.parts[1:])) for path in paths if (ROOT / path).exists()
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("graphprune", *MOVED, "pyproject.toml", "README.md", "LICENSE"):  # so that no build/ is left behind
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_source_file(wheel: zipfile.ZipFile) -> None:
    packed = {name for name in wheel.namelist() if name.endswith(_PACKED)}
    assert packed == _tracked()


def test_the_wheel_holds_entry_points_and_license(wheel: zipfile.ZipFile) -> None:
    info = next(name.partition("/")[0] for name in wheel.namelist() if ".dist-info/" in name)
    points = wheel.read(f"{info}/entry_points.txt").decode()
    assert "[graphprune.passes]\ngraphprune = graphprune.passes" in points
    assert "[graphprune.targets]\ngraphprune = graphprune.targets" in points
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
