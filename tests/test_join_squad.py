"""``tools/join_squad.py``: all articles of all files, in their order."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.task_data import squad, write

TOOL = Path(__file__).parents[1] / "tools" / "join_squad.py"


def join(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *words], capture_output=True, text=True, check=False)


def test_articles_are_joined(tmp_path: Path) -> None:
    one = write(tmp_path, "one.json.gz", squad(("the red boat", [("what?", ["boat"])])))
    two = write(tmp_path, "two.json", squad(("a small city", [("what?", ["city"]), ("how?", ["small"])])))
    done = join(f"{tmp_path}/out.json", one, two)
    assert done.returncode == 0, done.stderr
    assert "2 articles, 3 questions" in done.stdout
    contexts = [item["paragraphs"][0]["context"] for item in json.loads((tmp_path / "out.json").read_text())["data"]]
    assert contexts == ["the red boat", "a small city"]


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    one = write(tmp_path, "one.json", squad(("the red boat", [("what?", ["boat"])])))
    two = write(tmp_path, "two.json", squad(("a small city", [("what?", [])]), version="v2.0"))
    rows = write(tmp_path, "rows.json", [1])
    assert "versions 1.1, v2.0" in join(f"{tmp_path}/out.json", one, two).stderr
    assert "has no list 'data'" in join(f"{tmp_path}/out.json", one, rows).stderr
    assert not (tmp_path / "out.json").exists()


def test_some_articles_are_taken(tmp_path: Path) -> None:
    files = [write(tmp_path, f"{at}.json", squad((f"context {at}", [("what?", [str(at)])]))) for at in range(3)]
    assert "2 articles, 2 questions" in join(f"{tmp_path}/out.json", *files, "--articles", "1:").stdout
    contexts = [item["paragraphs"][0]["context"] for item in json.loads((tmp_path / "out.json").read_text())["data"]]
    assert contexts == ["context 1", "context 2"]
    assert "leaves none" in join(f"{tmp_path}/out.json", *files, "--articles", "3:").stderr
    assert "form FIRST:END" in join(f"{tmp_path}/out.json", *files, "--articles", "a").stderr
