"""The cost of masks in training: a step, and a mask update."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

import graphprune as gp
from benchmarks.measuring import (
    BETWEEN,
    LAST_UPDATE,
    MASKS,
    TOTAL_STEPS,
    Measure,
    Setting,
    at_most,
    bert,
    medians,
    random_batch,
    timed,
)
from graphprune.ir.choosing import update_masks
from graphprune.ir.masking import MaskedSite, masked_sites, rules_of


class Trained:
    """A Program with masks, its optimizer, and a session whose own seconds are taken at every step.

    Attributes:
        program: The Program.
        session: Its session.
        gathering: Seconds of the last step that the session took before the optimizer: the scores.
        choosing: Seconds that it took after it: masks, and weights and moments set to zero, where the step is an update.
    """

    def __init__(self, program: gp.Program, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.program = program.train()
        self.optimizer = optimizer or adamw(program)
        self._start = self.gathering = self.choosing = 0.0
        self.optimizer.register_step_pre_hook(self._before)  # hooks run in the order in which they are registered
        self.optimizer.register_step_post_hook(self._before)
        self.session = gp.training.Session(program, self.optimizer, total_steps=TOTAL_STEPS)
        self.optimizer.register_step_pre_hook(self._gathered)
        self.optimizer.register_step_post_hook(self._chosen)

    def step(self, batch: Mapping[str, Tensor], at: int = BETWEEN) -> None:
        """Make a training step as if it were number ``at`` of the run."""
        self.session.step = at
        train(self.program, self.optimizer, batch)

    def update(self, batch: Mapping[str, Tensor]) -> float:
        """Make a step with a mask update, and return the session's seconds for the update."""
        self.step(batch, LAST_UPDATE)
        return self.choosing

    @property
    def scores(self) -> dict[str, Tensor]:
        """A copy of the stored scores, by weight."""
        rules = self.session.state_dict()["rules"].values()
        return {name: score for rule in rules for name, score in rule["scores"].items()}

    @property
    def sites(self) -> tuple[MaskedSite, ...]:
        """The masks of the only rule."""
        ((_, sites),) = rules_of(masked_sites(self.program)).items()
        return sites

    @property
    def weights(self) -> int:
        """Weights under masks."""
        return sum(site.weight.numel() for site in self.sites)

    def _before(self, *_: object) -> None:
        self._start = time.perf_counter()

    def _gathered(self, *_: object) -> None:
        self.gathering = time.perf_counter() - self._start

    def _chosen(self, *_: object) -> None:
        self.choosing = time.perf_counter() - self._start


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of all measurements."""
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Mapping[str, Tensor]) -> None:
    """Make a training step."""
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def masked(setting: Setting, masks: str = MASKS) -> gp.Program:
    """A traced BERT with masks."""
    return gp.transform(gp.trace(bert(setting), labels=True, check=False), masks, in_place=True)


def bench_step(setting: Setting) -> Iterator[Measure]:
    """A training step with masks, and one with scores and mask updates, against the plain model's step."""
    plain = bert(setting)
    optimizer = adamw(plain)
    magnitude = Trained(masked(setting, MASKS.replace("4x1", "4x1,criterion=magnitude")))
    momentum = Trained(masked(setting))
    batch = random_batch(setting)
    times = medians(  # no update falls into the measured steps; its cost is added by its frequency
        {
            "plain": timed(lambda: train(plain, optimizer, batch)),
            "mask": timed(lambda: magnitude.step(batch)),
            "snip": timed(lambda: momentum.step(batch)),
        },
        setting.repeats,
    )
    update = medians({"update": lambda: momentum.update(batch)}, min(3, setting.repeats))["update"]
    yield at_most("masked step / plain step", times["mask"] / times["plain"], 1.05, str(setting))
    every = (times["snip"] + update / 100) / times["plain"]
    yield at_most("snip_momentum step, update every 100 / plain step", every, 1.15, str(setting))


def bench_update(setting: Setting) -> Iterator[Measure]:
    """One global 4x1 mask update of all sites against a forward and backward pass."""
    trained = Trained(masked(setting))
    batch = random_batch(setting)
    trained.step(batch)
    sites, scores = trained.sites, trained.scores

    def forward_backward() -> None:
        trained.program(**batch).loss.backward()
        trained.program.zero_grad()

    times = medians(
        {"pass": timed(forward_backward), "update": timed(lambda: update_masks(sites, 0.8, scores))}, setting.repeats
    )
    yield at_most(
        "mask update / forward-backward",
        times["update"] / times["pass"],
        0.1,
        f"{trained.weights:,} weights, global 4x1",
    )


def bench_large(setting: Setting) -> Iterator[Measure]:
    """A mask update of a BERT twice as deep and a third wider against one of the BERT: BERT-large against BERT-base."""
    hidden = setting.hidden * 4 // 3 // 64 * 64
    large = dataclasses.replace(setting, layers=2 * setting.layers, hidden=max(64, hidden))
    sides = {"base": _scored(setting), "large": _scored(large)}
    runs = {
        name: timed(lambda sites=sites, scores=scores: update_masks(sites, 0.8, scores))
        for name, (sites, scores) in sides.items()
    }
    times = medians(runs, setting.repeats)
    counts = {name: sum(site.weight.numel() for site in sites) for name, (sites, _) in sides.items()}
    yield at_most(
        "mask update of BERT-large / of BERT-base",
        times["large"] / times["base"],
        3.5,
        f"{counts['large']:,} and {counts['base']:,} weights ({counts['large'] / counts['base']:.3f}), global 4x1; "
        f"{times['large']:.3f} and {times['base']:.3f} s",
    )


def _scored(setting: Setting) -> tuple[tuple[MaskedSite, ...], dict[str, Tensor]]:
    """Sites with real scores, from one step on a few tokens that moves no weight."""
    program = masked(setting)
    trained = Trained(program, torch.optim.SGD(program.parameters(), lr=0.0))
    trained.step(random_batch(dataclasses.replace(setting, batch=1, length=8)))
    scores = trained.scores
    trained.session.close()
    for item in program.parameters():
        item.grad = None
    return trained.sites, scores
