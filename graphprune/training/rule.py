"""One rule of a recipe in training: the sites of one insert-masks pass, their scores, and when their masks change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graphprune.errors import SparsityError
from graphprune.ir import ops
from graphprune.ir.choosing import choose_masks, initial_scores, part_way, update_masks, write_mask
from graphprune.ir.gates import gated_sites
from graphprune.ir.masking import MaskedSite, reached, sparsity_of, target_of
from graphprune.ir.program import Program
from graphprune.ir.sharding import sharded_like, whole
from graphprune.sparsity.criterion import Criterion
from graphprune.sparsity.layout import from_logical, to_logical
from graphprune.sparsity.schedules import OneShot
from graphprune.sparsity.windows import Window, steps, window
from graphprune.training.sampler import GradientSampler


class Rule:
    """The masks of one rule: scores are gathered before each optimizer step, masks chosen after it.

    Args:
        program: The Program of the sites.
        sites: All sites of the rule.
        optimizer: The optimizer that trains them.
        total_steps: Optimizer steps of the run.
        steps_per_epoch: Optimizer steps of an epoch, where that is known.

    Attributes:
        sites: The sites.
        window: When masks are chosen.
        locked: Masks are final: they were at their target when training began.
        updates: Mask updates so far.
    """

    def __init__(
        self,
        program: Program,
        sites: tuple[MaskedSite, ...],
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        steps_per_epoch: int | None,
    ) -> None:
        decision = sites[0].decision
        self.sites = sites
        self.optimizer = optimizer
        self.criterion: Criterion = sites[0].criterion
        self.schedule = sites[0].schedule
        self.regularizer = sites[0].regularizer
        self.window = window(
            total_steps,
            warm_up=decision.warm_up,
            cool_down=decision.cool_down,
            end=decision.end,
            frequency=decision.frequency,
            steps_per_epoch=steps_per_epoch,
        )
        if isinstance(self.schedule, OneShot):
            self.window = Window(self.window.start, self.window.start, 1)
        self.locked = decision.locked or (sparsity_of(sites) > 0 and reached(sites)[0])
        self.initial = [min(sparsity_of([site]), site.decision.share or 0.0) for site in sites]
        self.initial_total = min(sparsity_of(sites), target_of(sites))
        self.updates = 0
        self.scores: dict[str, Tensor | None] = {} if self.locked else self._fresh_scores()
        self._part_steps = self._check_progressive(steps("frequency", decision.frequency, total_steps, steps_per_epoch))
        self._gates = tuple(gate for gate in gated_sites(program) if gate.name in {site.name for site in sites})
        self._before: list[Tensor] = []
        self._goals: list[Tensor] = []
        self._chosen_at = 0
        self._trainable: dict[str, Tensor] = {}
        self._holds = self.criterion.keeps_weights and not self.locked
        if self.criterion.needs_activations and not self.locked:
            raise SparsityError(
                f"criterion {self.criterion} prunes once and without training: call graphprune.oneshot.prune(program, batches) "
                f"before the session"
            )

    # -- what it is like ----------------------------------------------------------------------------------------------

    @property
    def holds_weights(self) -> bool:
        """Whether pruned weights still keep their values under the mask."""
        return self._holds

    @property
    def description(self) -> str:
        """Pattern and criterion, for messages."""
        return f"{self.sites[0].decision.pattern} by {self.criterion}"

    def scoring(self, step: int) -> bool:
        """Whether gradients of a step count."""
        return not self.locked and self.criterion.needs_gradient and step <= self.window.end

    def _fresh_scores(self) -> dict[str, Tensor | None]:
        if self.criterion.needs_samples:
            return {}  # made for each update
        return initial_scores(self.sites)

    def _check_progressive(self, frequency: int) -> int:
        """Steps from one part of a progressive update to the next; 0 where updates are made at once."""
        parts = self.sites[0].decision.progressive
        if parts and not self.locked and frequency < parts:
            raise SparsityError(
                f"progressive={parts} parts do not fit into {frequency} steps between updates; lower progressive, raise "
                f"frequency, or train longer"
            )
        return frequency // parts if parts else 0

    # -- before the optimizer steps ------------------------------------------------------------------------------------

    def accumulate(self) -> None:
        """Add the gradients that the weights hold to the scores."""
        for site in self.sites:
            if site.weight.grad is not None:
                grad = to_logical(whole(site.weight.grad), site.decision.layout)
                self.scores[site.name] = self.criterion.accumulate(
                    self.scores.get(site.name), site.logical_weight, grad, site.pattern
                )

    def shape_gradients(self, step: int) -> None:
        """Add the regularizer's gradient and take away what must not reach the optimizer."""
        active = not self.locked and step <= self.window.end
        if active:
            for gate in self._gates:
                if gate.log_alpha.grad is not None:
                    penalty = gate.penalty_gradient() * self.criterion.strength
                    gate.log_alpha.grad.add_(sharded_like(penalty, gate.log_alpha.grad))
        for site in self.sites:
            grad = site.weight.grad
            if grad is None:
                continue
            if active and self.criterion.freezes_weights:
                site.weight.grad = None
                continue
            extra = self.regularizer.gradient(site.logical_weight, site.pattern) if active else None
            if extra is not None:
                stored = from_logical(extra, site.decision.layout, tuple(site.mask.shape))
                grad.add_(sharded_like(stored.to(grad.dtype), grad))
            if self.criterion.dense_gradient:
                allowed = self._trainable.get(site.name, site.mask)
                grad.mul_(sharded_like(allowed.view(torch.uint8), grad))

    # -- after the optimizer stepped -----------------------------------------------------------------------------------

    def update(self, step: int, program: Program, sampler: GradientSampler | None) -> bool:
        """Choose masks anew where the step asks for it; say whether any changed."""
        if self.locked:
            return False
        if self.window.is_update(step):
            self._choose(step, program, sampler)
        elif self._goals and (step - self._chosen_at) % self._part_steps == 0:
            self._go_on((step - self._chosen_at) // self._part_steps)
        else:
            return False
        self._holds = self.criterion.keeps_weights and step < self.window.end
        self._find_trainable(step)
        if not self._holds:
            self.zero()
        return True

    def _choose(self, step: int, program: Program, sampler: GradientSampler | None) -> None:
        progress = self.window.progress(step)
        self._finish_parts()
        before = sparsity_of(self.sites) if self.schedule.resets_moments else 0.0  # counting costs
        wanted = self._wanted(progress)
        self.updates += 1
        self.scores.update({gate.name: whole(gate.log_alpha.detach()) for gate in self._gates})
        if self.criterion.needs_samples:
            self._choose_by_samples(wanted, program, sampler)
        elif self._part_steps and step < self.window.end:
            self._before = [site.logical_mask.clone() for site in self.sites]
            self._goals = choose_masks(self.sites, wanted, self.scores, progress=progress)
            self._chosen_at = step
            self._go_on(0)
        else:
            update_masks(self.sites, wanted, self.scores, progress=progress)
        if self.schedule.resets_moments and sparsity_of(self.sites) < before:
            self._reset_moments()

    def _wanted(self, progress: float) -> float | list[float]:
        decision = self.sites[0].decision
        if decision.share is None:
            return self.schedule.sparsity(progress, self.initial_total, target_of(self.sites))
        return [
            self.schedule.sparsity(progress, start, site.decision.share or 0.0)
            for site, start in zip(self.sites, self.initial, strict=True)
        ]

    def _go_on(self, index: int) -> None:
        """Make part ``index`` of a progressive update, counted from 0; the last one completes it."""
        parts = self.sites[0].decision.progressive
        if index >= parts - 1:
            self._finish_parts()
            return
        masks = part_way(self.sites, self._before, self._goals, self.scores, (index + 1) / parts)
        for site, mask in zip(self.sites, masks, strict=True):
            write_mask(site, mask)

    def _finish_parts(self) -> None:
        if self._goals:
            for site, goal in zip(self.sites, self._goals, strict=True):
                write_mask(site, goal)
        self._before, self._goals = [], []

    def _choose_by_samples(
        self, wanted: float | list[float], program: Program, sampler: GradientSampler | None
    ) -> None:
        assert sampler is not None  # the session has checked it
        rounds, samples = self.criterion.recomputations, self.criterion.samples
        before = [sparsity_of([site]) for site in self.sites]
        total = sparsity_of(self.sites)
        if wanted in (total, before):
            return  # as at the first update of a schedule: samples are dear, and there is nothing to choose
        for index in range(rounds):
            part = (index + 1) / rounds
            goal = (
                total + (wanted - total) * part
                if isinstance(wanted, float)
                else [start + (end - start) * part for start, end in zip(before, wanted, strict=True)]
            )
            self.scores = {}
            for _ in sampler.sample(program, samples):
                self.accumulate()
            self._share_scores()
            update_masks(self.sites, goal, self.scores)
            self.zero()
        self.scores = {}

    def _share_scores(self) -> None:
        """Let all processes decide by the mean of what their samples gave."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for site in self.sites:
                score = self.scores.get(site.name)
                if score is not None:
                    torch.distributed.all_reduce(score)
                    score /= torch.distributed.get_world_size()

    def _find_trainable(self, step: int) -> None:
        self._trainable = {}
        if self._holds and type(self.criterion).gradient_mask is not Criterion.gradient_mask:
            for site in self.sites:
                allowed = self.criterion.gradient_mask(site.logical_weight, site.pattern, site.logical_mask)
                self._trainable[site.name] = from_logical(allowed, site.decision.layout, tuple(site.mask.shape))

    @torch.no_grad()
    def zero(self) -> None:
        """Make pruned weights and their optimizer moments exactly zero."""
        if self._holds:
            return
        for site in self.sites:
            kept = site.mask.view(torch.uint8)
            site.weight.mul_(sharded_like(kept, site.weight))
            ops.mark_clean(site.weight, site.mask)
            for value in self._moments(site):
                value.mul_(sharded_like(kept, value))

    def mark_clean(self) -> None:
        """Vouch for the zeros, where there are some."""
        if not self._holds:
            for site in self.sites:
                ops.mark_clean(site.weight, site.mask)

    def _reset_moments(self) -> None:
        for site in self.sites:
            for value in self._moments(site):
                value.zero_()

    def _moments(self, site: MaskedSite) -> list[Tensor]:
        state = self.optimizer.state.get(site.weight, {})
        return [value for value in state.values() if isinstance(value, Tensor) and value.shape == site.mask.shape]

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything but the masks that decides how the rule goes on; tensors, numbers and text only."""
        return {
            "initial": list(self.initial),
            "initial_total": self.initial_total,
            "locked": self.locked,
            "updates": self.updates,
            "holds": self._holds,
            "chosen_at": self._chosen_at,
            "scores": {name: score.clone() for name, score in self.scores.items() if score is not None},
            "before": [mask.clone() for mask in self._before],
            "goals": [mask.clone() for mask in self._goals],
            "trainable": {name: mask.clone() for name, mask in self._trainable.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        device = self.sites[0].mask.device
        self.initial, self.initial_total = list(state["initial"]), float(state["initial_total"])
        self.locked, self.updates = bool(state["locked"]), int(state["updates"])
        self._holds, self._chosen_at = bool(state["holds"]), int(state["chosen_at"])
        self.scores = {} if self.locked else self._fresh_scores()
        self.scores.update({name: score.clone().to(device) for name, score in state["scores"].items()})
        self._before = [mask.clone().to(device) for mask in state["before"]]
        self._goals = [mask.clone().to(device) for mask in state["goals"]]
        self._trainable = {name: mask.clone().to(device) for name, mask in state["trainable"].items()}
