"""Join files of SQuAD's structure, plain or .gz, into one: training sets that come in parts.

python tools/join_squad.py out/squad-train.json train-v1.1-first44articles.json.gz train-v1.1-extra.json.gz
"""

from __future__ import annotations

import gzip
import json
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
) -> None:
    """Write the articles of all files into one."""
    parts = [read(path) for path in files]
    versions = {str(part.get("version", "1.1")) for part in parts}
    if len(versions) > 1:
        raise typer.BadParameter(f"the files are of the versions {', '.join(sorted(versions))}")
    articles = [article for part in parts for article in part["data"]]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"version": versions.pop(), "data": articles}), encoding="utf-8")
    questions = sum(len(paragraph["qas"]) for article in articles for paragraph in article["paragraphs"])
    typer.echo(f"{out}: {len(articles)} articles, {questions} questions")


if __name__ == "__main__":
    typer.run(main)
