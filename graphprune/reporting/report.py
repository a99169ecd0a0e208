"""``report``: write one self-contained HTML page about an artifact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from graphprune.artifact.files import written
from graphprune.artifact.verification import Report
from graphprune.errors import GraphPruneError
from graphprune.reporting.collect import collect
from graphprune.reporting.page import render, verdict


@dataclass(frozen=True)
class ReportPage:
    """A page that was written.

    Attributes:
        path: Its file.
        verdict: ``verified``, ``NOT verified: ...`` or ``not checked``.
        verification: Every check, repeated; None where that was not wanted.
    """

    path: Path
    verdict: str
    verification: Report | None


def report(
    folder: Path | str,
    out: Path | str = "report.html",
    *,
    bench: Path | str | None = None,
    verify: bool = True,
    overwrite: bool = False,
) -> ReportPage:
    """Write one self-contained HTML page about an artifact: what was asked, and what was measured.

    The page needs no network and no other file, and it is the same for the same files. It has the recipe, the sparsity of each
    layer with a picture of its mask, the training log, stated metrics, sizes, latencies, coverage and every check.

    Args:
        folder: An artifact.
        out: The file to write.
        bench: What ``graphprune bench --out`` wrote of this artifact, perhaps among others.
        verify: Repeat every check. Where one fails, the page is written all the same and says so.
        overwrite: Replace ``out`` where there is such a file.

    Returns:
        Where the page is, and the verdict.

    Raises:
        VerifyError: There is no artifact, or its manifest is damaged or was edited; without ``verify`` also where its files cannot
            be read.
        LoweringError: The libraries of its target are not installed.
        GraphPruneError: ``out`` exists, lies in the artifact or cannot be written, or ``bench`` has not this artifact.
    """
    path = Path(out)
    _check_place(path, Path(folder), overwrite=overwrite)
    findings = collect(folder, bench=bench, verify=verify)
    text = render(findings)
    with written(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return ReportPage(path, verdict(findings.verification), findings.verification)


def _check_place(path: Path, folder: Path, *, overwrite: bool) -> None:
    if path.is_dir():
        raise GraphPruneError(f"{path} is a folder; name the file to write, such as {path / 'report.html'}")
    if path.exists() and not overwrite:
        raise GraphPruneError(f"{path} exists; choose another file, or replace it (--force, overwrite=True)")
    if path.resolve().is_relative_to(folder.resolve()):
        raise GraphPruneError(
            f"{path} lies in the artifact, which would then have a file that its manifest does not list; write it beside it"
        )
