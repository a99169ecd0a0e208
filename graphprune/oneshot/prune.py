"""Prune a Program in memory once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from rich.progress import Progress

from graphprune.errors import PassError, SparsityError
from graphprune.ir import ops
from graphprune.ir.choosing import choose_without_data
from graphprune.ir.masking import MaskedSite, masked_sites, rules_of
from graphprune.ir.program import Program, device_of
from graphprune.ir.properties import Property
from graphprune.oneshot.batches import bind_batches
from graphprune.oneshot.gradients import Loss, prune_by_gradients
from graphprune.oneshot.plan import make_plan
from graphprune.oneshot.report import PrunedSite, PruneReport
from graphprune.oneshot.walk import Walker
from graphprune.oneshot.weights import InMemory, Meter
from graphprune.sparsity.schedules import OneShot

Show = Callable[[str, int], Callable[[], None]]
"""Announces a part of the work and its number of steps; returns what to call after each."""


def prune(
    program: Program, batches: Iterable[object] = (), *, loss: Loss | None = None, progress: bool = False
) -> PruneReport:
    """Bring the masks of a Program to their sparsity at once, without training.

    Rules without data (magnitude, random) come first, then those with gradients (snip, taylor, obs, ...), each with one forward and
    backward pass a batch, then those with activations (wanda, sparsegpt), in one walk through the graph: each layer is pruned
    with inputs that went through the pruned layers before it. A weight that is used several times is pruned at its first use
    with the inputs of all its uses (those of later uses computed with the weight as it was).

    Args:
        program: A flat Program with masks of one-shot schedules, in any mode; it is run in eval mode. Masks are mutated and pruned
            weights set to zero; kept weights change only where the criterion says so (sparsegpt, obs).
        batches: Calibration data: mappings of inputs by name, tuples of positional inputs, or single tensors. Inputs that no
            pruned layer needs (labels, for wanda and sparsegpt) may be left out. All rows count, those of padding too, so
            leave padding out.
        loss: For criteria with gradients: function of output and batch that returns a scalar; default: the output's ``loss``.
        progress: Show a progress bar.

    Returns:
        What was pruned, with the sparsity measured.

    Raises:
        SparsityError: There is no mask, a schedule is not one-shot, data is missing, empty or not finite, or a criterion cannot
            work on a site; names it.
        TraceError: A batch does not fit the Program.
        PassError: The Program is partitioned or holds fake-quantize operators.
    """
    sites = check_sites(program)
    needy = [site.decision.criterion for site in sites if site.criterion.needs_data]
    data = [] if not needy else bind_batches(program, batches, needy)
    with evaluating(program), steps_shown(progress) as show:
        tokens: dict[str, int] = {}
        zero_pruned([site for site in masked_sites(program) if site.decision.locked])
        for rule in rules_of([site for site in sites if not site.criterion.needs_data]).values():
            choose_without_data(rule)
            zero_pruned(rule)
        graded = [site for site in sites if site.criterion.needs_gradient or site.criterion.needs_samples]
        for rule in rules_of(graded).values():
            prune_by_gradients(program, rule, data, loss, show(str(rule[0].criterion), len(data)))
            zero_pruned(rule)
        walked = [site for site in sites if site.criterion.needs_activations]
        if walked:
            device = device_of(program)
            plan = make_plan(program, walked, list(data[0]))
            walker = Walker(program, plan, InMemory(program), data, device=device, meter=Meter())
            tick = show(f"{walked[0].criterion}", len(plan.stops))
            walker.run(lambda stop: tick())
            tokens = walker.tokens
    return PruneReport(tuple(measured(site, tokens.get(site.name, 0)) for site in sites), len(data))


def check_sites(program: Program) -> tuple[MaskedSite, ...]:
    """The masks of a Program that are to be chosen, locked ones left out; SparsityError or PassError where they cannot be now."""
    sites = tuple(site for site in masked_sites(program) if not site.decision.locked)
    if not sites:
        raise SparsityError(f"{program.name} has no masks to choose; run insert-masks with schedule=one-shot first")
    for flag, remedy in (
        (Property.PARTITIONED, "run inline-blocks first"),
        (Property.FAKE_QUANT, "prune before insert-fake-quant"),
    ):
        if flag in program.properties:
            raise PassError(f"{program.name} is {flag} and pruning once takes flat graphs without quantizers; {remedy}")
    for site in sites:
        if not isinstance(site.schedule, OneShot):
            raise SparsityError(
                f"{site.name}: schedule {site.decision.schedule} prunes step by step in training (graphprune.training.Session); to "
                f"prune once, insert its mask with schedule=one-shot"
            )
        if site.criterion.gated:
            raise SparsityError(
                f"{site.name}: criterion {site.criterion} learns in training; choose another to prune once"
            )
    return sites


@torch.no_grad()
def zero_pruned(sites: Sequence[MaskedSite]) -> None:
    """Set weights to zero where their mask is False."""
    for site in sites:
        site.weight.masked_fill_(~site.mask, 0.0)
        ops.mark_clean(site.weight, site.mask)


@torch.no_grad()
def measured(site: MaskedSite, tokens: int) -> PrunedSite:
    """What became of a site."""
    zeros = site.weight.numel() - int(torch.count_nonzero(site.weight * site.mask))
    decision = site.decision
    return PrunedSite(
        site.name, site.shape, decision.pattern, decision.criterion, zeros / max(1, site.weight.numel()), tokens
    )


@contextlib.contextmanager
def evaluating(program: Program) -> Iterator[None]:
    """Put a Program into eval mode while a block runs."""
    was_training = program.training
    program.eval()
    try:
        yield
    finally:
        program.train(was_training)


@contextlib.contextmanager
def steps_shown(wanted: bool) -> Iterator[Show]:
    """Offer a ``Show``: a progress bar where wanted, else nothing."""
    if not wanted:
        yield lambda title, total: lambda: None
        return
    with Progress(transient=True) as bar:

        def show(title: str, total: int) -> Callable[[], None]:
            task = bar.add_task(title, total=total)
            return lambda: bar.advance(task)

        yield show
