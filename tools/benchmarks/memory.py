"""What masks and scores keep in memory, and what a mask update takes beside that."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from benchmarks.measuring import Measure, Setting, at_most, random_batch
from benchmarks.training import Trained, masked
from graphprune.ir.choosing import update_masks


@dataclass(frozen=True)
class Allocations:
    """What torch's CPU allocator gave out during a run, in bytes.

    Attributes:
        largest: The largest single allocation.
        peak: The most that was held at a time beside what was held before.
        count: Number of allocations.
    """

    largest: int
    peak: int
    count: int


def allocations_of(run: Callable[[], object]) -> Allocations:
    """Run under torch's profiler and read every allocation and release off its trace."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted(
        ((float(event["ts"]), int(event["args"]["Bytes"])) for event in events if event.get("name") == "[memory]"),
        key=lambda change: change[0],
    )
    held = peak = 0
    for _, size in changes:
        held += size
        peak = max(peak, held)
    taken = [size for _, size in changes if size > 0]
    return Allocations(max(taken, default=0), peak, len(taken))


def bench_memory(setting: Setting) -> Iterator[Measure]:
    """Bytes that masks and scores keep for each masked weight, and temporaries of an update against the scores."""
    trained = Trained(masked(setting))
    trained.step(random_batch(setting))
    masks = sum(site.mask.numel() * site.mask.element_size() for site in trained.sites)
    stored = trained.scores
    scores = sum(item.numel() * item.element_size() for item in stored.values())
    yield at_most("mask bytes / weight", masks / trained.weights, 1.0, "bool buffers")
    yield at_most("4x1 score bytes / weight", scores / trained.weights, 1.0, "float32 a block")
    used = allocations_of(lambda: update_masks(trained.sites, 0.8, stored))
    yield at_most(
        "largest tensor made by an update / all scores", used.largest / scores, 0.5, f"{used.largest / 1e6:.1f} MB"
    )
    yield at_most(
        "peak extra memory of an update / all scores", used.peak / scores, 1.0,
        f"{used.peak / 1e6:.1f} MB in {used.count} allocations; scores {scores / 1e6:.1f} MB",
    )  # fmt: skip
