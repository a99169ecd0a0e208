"""The training session: one object that drives the masks of a Program while the user's own loop trains it."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.artifact.files import written
from graphprune.errors import SparsityError
from graphprune.ir import ops
from graphprune.ir.masking import MaskedSite, masked_sites, reached, rules_of, sparsity_of, update_masks
from graphprune.ir.program import Program
from graphprune.sparsity.layout import to_logical
from graphprune.sparsity.schedules import OneShot, Window, window
from graphprune.training.randomness import random_state, set_random_state

_VERSION = 1
_ENTRYWISE = (
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax,
    torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.RMSprop,
)  # fmt: skip
"""Optimizers whose update of an entry is zero where the entry, its gradient and its moments are zero."""


@dataclass(frozen=True)
class _Rule:
    """One insert-masks pass in training: its sites, when they are updated and where they started."""

    sites: tuple[MaskedSite, ...]
    window: Window
    initial: float
    locked: bool


class Session:
    """Drives masks through the optimizer's own step hooks; there is no further call to make.

    Before each optimizer step the criterion sees weights and gradients; after it, at the steps of the schedule's window, masks
    are chosen anew, and pruned weights and their optimizer moments become exactly zero. Steps that a gradient scaler skips
    and evaluation forwards do not count; with gradient accumulation a step is an optimizer step. A rule whose masks are
    at their target when the session starts is left as it is.

    Args:
        program: A Program with masks; it may be wrapped (DistributedDataParallel, ``torch.compile``).
        optimizer: Made from ``program.parameters()``.
        total_steps: Optimizer steps of the whole run; fractions of training in the schedule count from it.
        log: File for one JSON object a step (``step``, ``sparsity``, ``loss``), appended to. ``loss`` is that of the
            Program's own output (not under ``torch.compile``), or what ``record`` was given.

    Attributes:
        step: Optimizer steps taken.
        skipped: Steps left out of the scores because a gradient was NaN or infinite.

    Raises:
        SparsityError: The Program has no masks, the optimizer does not hold a masked weight, or the schedule does not fit
            into ``total_steps``.
    """

    def __init__(
        self, program: nn.Module, optimizer: torch.optim.Optimizer, *, total_steps: int, log: Path | str | None = None
    ) -> None:
        self.program = _unwrap(program)
        self.optimizer: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self.total_steps = total_steps
        self.step = 0
        self.skipped = 0
        self.log = Path(log) if log is not None else None
        self._loss: float | Tensor | None = None
        self._sparsity: float | None = None
        self._entrywise = type(self.optimizer) in _ENTRYWISE
        sites = masked_sites(self.program)
        if not sites:
            raise SparsityError("the Program has no masks for a session to drive; run insert-masks first")
        self._check_ownership(sites)
        self._rules = {rule: self._make_rule(members) for rule, members in rules_of(sites).items()}
        self._scores: dict[str, Tensor | None] = {
            site.name: site.criterion.initial(site.pattern, site.shape, device=site.weight.device)
            for rule in self._rules.values()
            for site in rule.sites
            if not rule.locked
        }
        self._zero()
        self._hooks = [
            self.optimizer.register_step_pre_hook(_weak(self, Session._before_step)),
            self.optimizer.register_step_post_hook(_weak(self, Session._after_step)),
            self.program.register_forward_hook(_weak(self, Session._after_forward)),
        ]

    # -- what the user sees -------------------------------------------------------------------------------------------

    @property
    def sparsity(self) -> float:
        """Fraction of masked weights over all sites, now."""
        if self._sparsity is None:  # counting millions of mask entries every step would cost
            self._sparsity = sparsity_of(self._sites)
        return self._sparsity

    @property
    def done(self) -> bool:
        """Whether every rule has reached its sparsity."""
        return all(reached(rule.sites)[0] for rule in self._rules.values())

    def record(self, *, loss: float | Tensor) -> None:
        """Give the log a loss of your own for the step that comes next."""
        self._loss = loss.detach() if isinstance(loss, Tensor) else loss

    def close(self) -> None:
        """Take the session's hooks off the optimizer and the Program; masks stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if kind is None:
            self._check_reached()

    def __repr__(self) -> str:
        return f"Session(step {self.step} of {self.total_steps}, sparsity {self.sparsity:.4f}, {self.skipped} skipped)"

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs: step, scores, masks, schedule position and random generators.

        Holds tensors, numbers and text only, so ``torch.load(weights_only=True)`` reads it.
        """
        return {
            "version": _VERSION,
            "step": self.step,
            "skipped": self.skipped,
            "total_steps": self.total_steps,
            "scores": {name: score.clone() for name, score in self._scores.items() if score is not None},
            "masks": {site.name: site.mask.clone() for site in self._sites},
            "rules": {rule: [item.initial, item.locked] for rule, item in self._rules.items()},
            "random": random_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, random: bool = True) -> None:
        """Go on where ``state_dict`` was taken; weights and optimizer are restored by the user, as always.

        Args:
            state: What ``state_dict`` returned.
            random: Restore the random generators too.

        Raises:
            SparsityError: The state is of another Program: sites, shapes or the length of the run differ.
        """
        if state.get("version") != _VERSION:
            raise SparsityError(f"session state has version {state.get('version')!r}, this is version {_VERSION}")
        if state["total_steps"] != self.total_steps:
            raise SparsityError(
                f"the state is of a run of {state['total_steps']} steps, this session has total_steps={self.total_steps}; "
                f"give the same number, or the schedule would jump"
            )
        self._check_masks(state["masks"])
        for site in self._sites:
            site.mask.copy_(state["masks"][site.name])
        self._sparsity = None
        self._rules = {
            rule: replace(item, initial=state["rules"][rule][0], locked=state["rules"][rule][1])
            for rule, item in self._rules.items()
        }
        device = {site.name: site.weight.device for site in self._sites}
        self._scores = {site.name: None for rule in self._rules.values() for site in rule.sites if not rule.locked}
        for name, score in state["scores"].items():
            self._scores[name] = score.clone().to(device[name])
        self.step, self.skipped = int(state["step"]), int(state["skipped"])
        self._trim_log()
        self._zero()
        if random:
            set_random_state(state["random"])

    def _check_masks(self, masks: Mapping[str, Tensor]) -> None:
        names = {site.name for site in self._sites}
        if names != set(masks):
            odd = sorted(names ^ set(masks))
            raise SparsityError(
                f"the state has masks of other sites, for example {odd[0]}; load it into the same recipe"
            )
        for site in self._sites:
            if masks[site.name].shape != site.mask.shape:
                raise SparsityError(
                    f"the state's mask of {site.name} has shape {tuple(masks[site.name].shape)}, "
                    f"the weight {tuple(site.mask.shape)}"
                )

    # -- construction -------------------------------------------------------------------------------------------------

    @property
    def _sites(self) -> tuple[MaskedSite, ...]:
        return tuple(site for rule in self._rules.values() for site in rule.sites)

    def _check_ownership(self, sites: tuple[MaskedSite, ...]) -> None:
        held = {id(item) for group in self.optimizer.param_groups for item in group["params"]}
        for site in sites:
            if id(site.weight) not in held and site.weight.requires_grad:
                raise SparsityError(
                    f"the optimizer does not hold {site.name} of this Program; make it from program.parameters() after "
                    f"transform (or freeze the weight with requires_grad_(False))"
                )

    def _make_rule(self, sites: tuple[MaskedSite, ...]) -> _Rule:
        decision = sites[0].decision
        span = window(
            self.total_steps,
            warm_up=decision.warm_up,
            cool_down=decision.cool_down,
            frequency=decision.frequency,
        )
        if isinstance(sites[0].schedule, OneShot):
            span = Window(span.start, span.start, 1)
        initial = sparsity_of(sites)
        return _Rule(sites, span, min(initial, decision.sparsity), locked=initial > 0 and reached(sites)[0])

    # -- hooks --------------------------------------------------------------------------------------------------------

    def _after_forward(self, module: nn.Module, arguments: object, output: object) -> None:
        if torch.compiler.is_compiling():
            return  # a compiled forward keeps no loss aside; record gives one to the log
        if module.training and torch.is_grad_enabled():
            loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
            if isinstance(loss, Tensor) and loss.numel() == 1:
                self._loss = loss.detach()

    @torch.no_grad()
    def _before_step(self, optimizer: object, args: object, kwargs: object) -> None:
        self._watch_gradient()
        sites = [site for rule in self._rules.values() if not rule.locked for site in rule.sites]
        sites = [site for site in sites if site.criterion.needs_gradient and site.weight.requires_grad]
        if not sites:
            return
        for site in sites:
            if site.weight.grad is None:
                raise SparsityError(
                    f"no gradient reached {site.name}; its criterion {site.decision.criterion} needs one: the loss does not "
                    f"depend on this weight, so exclude the site"
                )
        sums = torch.stack([site.weight.grad.sum().float() for site in sites if site.weight.grad is not None])
        if not bool(torch.isfinite(sums).all()):
            self.skipped += 1
            return
        for site in sites:
            assert site.weight.grad is not None
            grad = to_logical(site.weight.grad, site.decision.layout)
            self._scores[site.name] = site.criterion.accumulate(
                self._scores[site.name], site.logical_weight, grad, site.pattern
            )

    def _watch_gradient(self) -> None:
        """Notice gradients that somebody changed after the backward pass, one site a step, in turn.

        A zero weight with a zero gradient and zero moments stays zero under an optimizer that works entry by entry. Where
        that does not hold, pruned weights are set to zero after every step.
        """
        site = self._sites[self.step % len(self._sites)]
        grad = site.weight.grad
        if self._entrywise and grad is not None and not site.criterion.dense_gradient:
            self._entrywise = not bool(grad.masked_select(~site.mask).any())

    @torch.no_grad()
    def _after_step(self, optimizer: object, args: object, kwargs: object) -> None:
        for rule in self._rules.values():
            if not rule.locked and rule.window.is_update(self.step):
                progress = rule.window.progress(self.step)
                target = rule.sites[0].decision.sparsity
                update_masks(rule.sites, rule.sites[0].schedule.sparsity(progress, rule.initial, target), self._scores)
                self._zero(rule.sites)
                self._sparsity = None
            elif rule.sites[0].criterion.dense_gradient or not self._entrywise:
                self._zero(rule.sites)
        for site in self._sites:
            ops.mark_clean(site.weight, site.mask)
        self._write_log()
        self.step += 1
        if self.step == self.total_steps:
            self._check_reached()

    @torch.no_grad()
    def _zero(self, sites: tuple[MaskedSite, ...] | None = None) -> None:
        """Make pruned weights and their optimizer moments exactly zero."""
        for site in sites if sites is not None else self._sites:
            kept = site.mask.view(torch.uint8)
            site.weight.mul_(kept)
            ops.mark_clean(site.weight, site.mask)
            for value in self.optimizer.state.get(site.weight, {}).values():
                if isinstance(value, Tensor) and value.shape == site.weight.shape:
                    value.mul_(kept)

    def _write_log(self) -> None:
        if self.log is None:
            return
        loss = None if self._loss is None else float(self._loss)
        entry = {
            "step": self.step,
            "sparsity": round(self.sparsity, 6),
            "loss": loss if loss is None or math.isfinite(loss) else None,
        }
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _trim_log(self) -> None:
        """Take out of the log what a killed run wrote after the state that is resumed now."""
        if self.log is None or not self.log.is_file():
            return
        lines = self.log.read_text(encoding="utf-8").splitlines(keepends=True)
        with written(self.log) as path:
            path.write_text("".join(lines[: self.step]), encoding="utf-8")

    def _check_reached(self) -> None:
        for rule in self._rules.values():
            done, now, target = reached(rule.sites)
            if not done:
                raise SparsityError(
                    f"training ended at step {self.step} of {self.total_steps} with sparsity {now:.4f} of {target} "
                    f"({rule.sites[0].decision.pattern}); train to the end of the schedule (last update at step {rule.window.end})"
                )


def _unwrap(module: nn.Module) -> Program:
    while not isinstance(module, Program):
        inner = getattr(module, "module", None) or getattr(module, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            raise SparsityError(f"a session drives a Program, not {type(module).__name__}; use graphprune.transform")
        module = inner
    return module


def _weak(session: Session, method: Any) -> Any:
    """A hook that does not keep the session alive through the optimizer."""
    reference = weakref.ref(session)

    def hook(*args: object) -> None:
        alive = reference()
        if alive is None:
            raise SparsityError(
                "the training session was garbage-collected while its optimizer still steps; keep it in a variable"
            )
        method(alive, *args)

    return hook
