"""Check an artifact from its files alone: they are whole, sparse as stated, and compute what the Program computed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console, Group
from rich.table import Table

from graphprune.artifact.files import MANIFEST, sha256
from graphprune.artifact.manifest import Manifest, Parity, SiteEntry, digest_of_zeros
from graphprune.artifact.node_report import NodeReport, absolute_difference, compare_nodes, step_of
from graphprune.artifact.nodes import NODES
from graphprune.artifact.samples import Arrays, read_samples
from graphprune.errors import VerifyError
from graphprune.ir.sites import Site
from graphprune.pipeline.registry import make_target
from graphprune.pipeline.remote import opened, stored_weights
from graphprune.pipeline.target import StoredWeight, Target
from graphprune.sparsity.grouped import NM
from graphprune.sparsity.pattern_base import Pattern
from graphprune.sparsity.patterns import parse_pattern


@dataclass(frozen=True)
class Check:
    """One thing that was checked."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """Outcome of a verification; ``str`` and rich print it as a table."""

    folder: Path
    manifest: Manifest
    checks: tuple[Check, ...]
    nodes: NodeReport | None = None

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def raise_failures(self) -> None:
        """Raise a VerifyError that lists every failure; nothing where all checks passed."""
        failures = [f"{check.name}: {check.detail}" for check in self.checks if not check.passed]
        if failures:
            raise VerifyError(f"{self.folder} does not hold what its manifest says: " + "; ".join(failures))

    def to_dict(self) -> dict[str, object]:
        """What ``--json`` prints."""
        return {
            "folder": str(self.folder),
            "target": self.manifest.target,
            "passed": self.passed,
            "checks": [asdict(check) for check in self.checks],
            "nodes": None if self.nodes is None else self.nodes.to_dict(),
        }

    def __rich__(self) -> Table | Group:
        table = Table(title=f"{self.folder} ({self.manifest.target})", title_justify="left")
        for column in ("check", "result", "detail"):
            table.add_column(column)
        for check in self.checks:
            table.add_row(check.name, "[green]passed" if check.passed else "[red]FAILED", check.detail)
        return table if self.nodes is None else Group(table, self.nodes)

    def __str__(self) -> str:
        console = Console(width=140, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def verify(folder: Path | str, *, per_node: bool = False) -> Report:
    """Repeat every check of an artifact from its files alone.

    Checked are: each file's size and SHA-256 and that no file is missing; for each site the measured sparsity, the pattern and the
    bitmap of zeros; and that the lowered model gives the stored outputs for the stored inputs.

    Args:
        folder: An artifact.
        per_node: Compare each node too: every quantizer, and every result of a weight's operator that stays in float, computed
            by the target from the Program's own values before it. Allowed are one quantization step, and 1e-4 of the largest
            value of a float result (2e-3 in float16, 2e-2 where weights have four bits or groups).

    Returns:
        The report, where all checks passed.

    Raises:
        VerifyError: A check failed; the message lists every failure, with the names of sites and of the worst node.
    """
    report = examine(folder, per_node=per_node)
    report.raise_failures()
    return report


def verify_afresh(folder: Path | str) -> None:
    """Verify an artifact in a new process, which knows nothing of what lowered it.

    Raises:
        VerifyError: A check failed there.
    """
    code = "import sys; from graphprune.artifact.verification import verify; verify(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise VerifyError(f"in a new process: {last.removeprefix('graphprune.errors.VerifyError: ')}")


def examine(folder: Path | str, *, per_node: bool = False, rows: int = 20) -> Report:
    """What ``verify`` does, up to its verdict.

    Args:
        folder: An artifact.
        per_node: As for ``verify``.
        rows: How many nodes the report's table shows.

    Returns:
        The report, whether checks passed or not.

    Raises:
        VerifyError: There is no artifact, or its manifest is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise VerifyError(f"{folder} is no folder; give the folder that graphprune export wrote")
    manifest = Manifest.read(folder)
    target = make_target(manifest.target, manifest.options)
    files, missing = _check_files(folder, manifest)
    checks = [files]
    if not missing:
        checks.append(_check_sites(target, folder, manifest))
        checks.append(_check_parity(target, folder, manifest))
    nodes = None
    if per_node and not missing and f"{NODES} was changed" not in files.detail:
        try:
            nodes = compare_nodes(target, folder, rows)
            checks.append(Check("nodes", not nodes.faulty, nodes.summary))
        except VerifyError as error:
            checks.append(Check("nodes", False, str(error)))
    return Report(folder, manifest, tuple(checks), nodes)


def _check_files(folder: Path, manifest: Manifest) -> tuple[Check, list[str]]:
    missing = [entry.name for entry in manifest.files if not (folder / entry.name).is_file()]
    linked = [
        entry.name for entry in manifest.files if not (folder / entry.name).resolve().is_relative_to(folder.resolve())
    ]
    changed = [
        entry.name
        for entry in manifest.files
        if entry.name not in missing and sha256(folder / entry.name) != entry.sha256
    ]
    known = {entry.name for entry in manifest.files} | {MANIFEST}
    extra = sorted(
        path.name for path in folder.rglob("*") if path.is_file() and str(path.relative_to(folder)) not in known
    )
    problems = [f"{name} is missing" for name in missing] + [f"{name} was changed" for name in changed]
    problems += [f"{name} is not in the manifest, perhaps a file of another artifact" for name in extra]
    problems += [f"{name} is a link to a place outside of the artifact" for name in linked]
    detail = "; ".join(problems) or f"{len(manifest.files)} files as listed"
    return Check("files", not problems, detail), missing


def _check_sites(target: Target, folder: Path, manifest: Manifest) -> Check:
    try:
        stored = stored_weights(target, folder, {site.name: site.layout for site in manifest.sites})
    except VerifyError:
        raise
    except Exception as error:  # a damaged file makes its reader fail in any way
        return Check("sparsity", False, f"the model file cannot be read: {error}")
    problems = []
    for site in manifest.sites:
        if site.name not in stored:
            problems.append(f"{site.name} is not in the file")
            continue
        zeros = stored[site.name].zeros
        measured = measure(zeros, site.bound_pattern)
        if abs(measured - site.sparsity) > 1e-12 or int(zeros.sum()) != site.zeros:
            problems.append(f"{site.name}: measured sparsity {measured:.6f}, stated {site.sparsity:.6f}")
        elif digest_of_zeros(zeros) != site.zeros_sha256:
            problems.append(f"{site.name}: zeros lie at other places than stated")
        if site.pattern is not None and not site.pattern_holds:
            problems.append(f"{site.name}: pattern {site.pattern} does not hold")
        if not site.zeros_at_zero_point:
            problems.append(f"{site.name}: a pruned weight is stored as something else than zero")
    overall = manifest.sparsity()
    detail = f"{len(manifest.sites)} sites measured" + (f", {overall:.4f} over the pruned ones" if overall else "")
    return Check("sparsity", not problems, "; ".join(problems) or detail)


def _check_parity(target: Target, folder: Path, manifest: Manifest) -> Check:
    try:
        measured = measure_parity(target, folder, manifest.parity.tolerance, manifest.parity.steps is not None)
    except VerifyError as error:
        return Check("parity", False, str(error))
    except Exception as error:  # a damaged file makes its runtime fail in any way
        return Check("parity", False, f"the model does not run: {error}")
    detail = f"largest difference {measured.max_abs:.3g} at {measured.worst_node}, tolerance {measured.tolerance:.3g}"
    if measured.steps is not None:
        detail += f", {measured.steps:.3g} steps of the outputs' range / 255"
    return Check("parity", measured.max_abs <= manifest.parity.tolerance, detail)


def measure(zeros: np.ndarray, pattern: Pattern | None) -> float:
    """Fraction of weights in fully pruned units of a pattern; of zeros, where there is none."""
    if pattern is None:
        return float(zeros.mean())
    return pattern.pattern_sparsity(torch.from_numpy(zeros))


def measure_site(site: Site, pattern: str | None, weight: StoredWeight, pruned: np.ndarray) -> SiteEntry:
    """Describe one stored weight.

    Args:
        site: The site.
        pattern: Text of its sparsity pattern, if it was pruned.
        weight: As read from the lowered file.
        pruned: Bool ``[out, in * kernel]``: where the Program's weight is zero.
    """
    zeros = weight.zeros
    kept = bool((zeros | ~pruned).all()) if zeros.shape == pruned.shape else False
    holds = None
    rule = None if pattern is None else parse_pattern(pattern).bound(kernel=site.kernel, groups=site.groups)
    if rule is not None:
        holds = measure(zeros, rule) >= rule.pattern_sparsity(torch.from_numpy(pruned)) - 1e-12
        if isinstance(rule, NM):
            holds = holds and rule.holds(torch.from_numpy(~zeros | ~pruned))
    return SiteEntry(
        name=site.name,
        layout=site.layout.value,
        kernel=site.kernel,
        groups=site.groups,
        weights=int(zeros.size),
        pattern=pattern,
        sparsity=measure(zeros, rule),
        zeros=int(zeros.sum()),
        zeros_sha256=digest_of_zeros(zeros),
        pattern_holds=holds,
        zeros_at_zero_point=kept,
        stored=str(weight.values.dtype),
    )


def measure_parity(target: Target, folder: Path, tolerance: float, in_steps: bool = False) -> Parity:
    """Run the lowered model on the stored samples.

    Args:
        target: What the artifact was lowered to.
        folder: An artifact.
        tolerance: Largest allowed difference, for the record.
        in_steps: Measure in quantization steps too.

    Returns:
        The largest absolute difference over all samples and outputs, and the output where it is.

    Raises:
        VerifyError: An output is missing or has another shape.
    """
    worst, where, steps = 0.0, "", 0.0
    with opened(target, folder) as run:
        answers = [(run(inputs), expected) for inputs, expected in read_samples(folder)]
    for actual, expected in answers:
        difference, name = largest_difference(actual, expected)
        if difference >= worst:
            worst, where = difference, name
        for name, want in expected.items():
            steps = max(steps, float(absolute_difference(actual[name], want).max(initial=0.0)) / step_of(want))
    return Parity(max_abs=worst, tolerance=tolerance, worst_node=where, steps=steps if in_steps else None)


def largest_difference(actual: Mapping[str, np.ndarray], expected: Arrays) -> tuple[float, str]:
    """The largest absolute difference and the output where it is; infinite where only one side is finite."""
    worst, where = -1.0, ""
    for name, want in expected.items():
        have = actual.get(name)
        if have is None or have.shape != want.shape:
            raise VerifyError(
                f"output {name} is {'missing' if have is None else f'of shape {have.shape}, not {want.shape}'}"
            )
        largest = float(absolute_difference(have, want).max(initial=0.0))
        if largest > worst:
            worst, where = largest, name
    return max(worst, 0.0), where
