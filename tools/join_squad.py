"""Join files of SQuAD's structure, plain or .gz, into one: training sets that come in parts.

python tools/join_squad.py out/squad-train.json train-v1.1-first44articles.json.gz train-v1.1-extra.json.gz
python tools/join_squad.py out/squad2-train.json dev-v2.0-first5articles.json.gz --articles 0:3
"""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer


def read(path: Path) -> dict[str, Any]:
    """One file."""
    content = path.read_bytes()
    found: Any = json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
    if not isinstance(found, dict) or not isinstance(found.get("data"), list):
        raise typer.BadParameter(f"{path} is not of SQuAD's structure: it has no list 'data'")
    return found


def main(
    out: Annotated[Path, typer.Argument(help="The file to write.")],
    files: Annotated[list[Path], typer.Argument(help="The files to join, in this order.", exists=True)],
    articles: Annotated[str, typer.Option(help="Which articles of all, from 0 on, the last one left out: 0:3.")] = ":",
) -> None:
    """Write the articles of all files, or some of them, into one."""
    bounds = re.fullmatch(r"(\d*):(\d*)", articles)
    if bounds is None:
        raise typer.BadParameter(f"--articles {articles!r} is not of the form FIRST:END, such as 0:3")
    first, end = (int(bound) if bound else None for bound in bounds.groups())
    parts = [read(path) for path in files]
    versions = {str(part.get("version", "1.1")) for part in parts}
    if len(versions) > 1:
        raise typer.BadParameter(f"the files are of the versions {', '.join(sorted(versions))}")
    chosen = [article for part in parts for article in part["data"]][first:end]
    if not chosen:
        raise typer.BadParameter(f"--articles {articles} leaves none of the articles")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"version": versions.pop(), "data": chosen}), encoding="utf-8")
    questions = sum(len(paragraph["qas"]) for article in chosen for paragraph in article["paragraphs"])
    typer.echo(f"{out}: {len(chosen)} articles, {questions} questions")


if __name__ == "__main__":
    typer.run(main)
