"""The training session: one object that drives masks and quantizers of a Program while the user's own loop trains it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.errors import SparsityError
from graphprune.ir.masking import MaskedSite, masked_sites, reached, rules_of, sparsity_of
from graphprune.ir.quantizing import quantizers
from graphprune.ir.sharding import differing, first_process, whole
from graphprune.ir.training_log import format_log, parse_log
from graphprune.training.attaching import refuse_second, unwrap, weak_hook, with_gradients
from graphprune.training.freezing_times import FreezingTimes
from graphprune.training.randomness import random_state, set_random_state
from graphprune.training.report import RuleReport, SessionReport
from graphprune.training.rule import Rule
from graphprune.training.sampler import GradientSampler
from graphprune.training.step_log import StepLog

_VERSION = 3
_ENTRYWISE = (
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax,
    torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.RMSprop,
)  # fmt: skip
"""Optimizers whose update of an entry is zero where the entry, its gradient and its moments are zero."""
_STRAY_STEPS = 3
"""Training forwards in a row with changed weights and no optimizer step that are no accident, such as a loaded state."""


class Session:
    """Drives masks and quantizers through the optimizer's own step hooks; there is no further call to make.

    Before each optimizer step the criterion sees weights and gradients; after it, at the steps of the schedule's window, masks
    are chosen anew, and pruned weights and their optimizer moments become exactly zero (criteria such as ``movement`` keep the
    values under the mask until the last update). Steps that a gradient scaler skips and evaluation forwards do not count; with
    gradient accumulation a step is an optimizer step. A rule whose masks are at their target when the session starts is left
    as it is. Observers and batch normalization are frozen when their time comes (``freeze_observers`` and
    ``freeze_batch_norm`` of ``insert-fake-quant``); a Program with quantizers needs no masks. Under DistributedDataParallel
    and ``fully_shard`` every process makes a session; all choose the same masks, which is checked at every update.

    Args:
        program: A Program with masks or quantizers; it may be wrapped (DistributedDataParallel, ``torch.compile``).
        optimizer: Made from ``program.parameters()``.
        total_steps: Optimizer steps of the whole run; fractions of training count from it.
        steps_per_epoch: Optimizer steps of an epoch, where some time is in epochs.
        sampler: Where criteria such as ``obs`` draw their gradients from.
        log: File for one JSON object a step (``step``, ``sparsity``, ``loss``), appended to by the first process. ``loss`` is that
            of the Program's own output (not under ``torch.compile``), or what ``record`` was given. The Program keeps them too,
            thinned, as ``training_log``, which is saved and exported with it.

    Attributes:
        step: Optimizer steps taken.
        skipped: Steps left out of the scores because a gradient was NaN or infinite.

    Raises:
        SparsityError: The Program has neither masks nor quantizers or is driven by another session, the optimizer does not hold
            a masked weight, or the schedule or a time of freezing does not fit into ``total_steps``.
    """

    def __init__(
        self,
        program: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        total_steps: int,
        steps_per_epoch: int | None = None,
        sampler: GradientSampler | None = None,
        log: Path | str | None = None,
    ) -> None:
        self.program = unwrap(program)
        self.optimizer: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self.total_steps = total_steps
        self.sampler = sampler
        self.step = 0
        self.skipped = 0
        self.log = StepLog(Path(log)) if log is not None and first_process() else None
        self._loss: float | Tensor | None = None
        self._sparsity: float | None = None
        self._entrywise = type(self.optimizer) in _ENTRYWISE
        self._strays = 0
        sites = masked_sites(self.program)
        if not sites and not any(True for _ in quantizers(self.program)):
            raise SparsityError(
                "the Program has no masks for a session to drive, and no quantizers; run insert-masks or insert-fake-quant first"
            )
        refuse_second(self.program)
        self.program.training_log.begin()
        self._watched = self._check_ownership(sites)
        self._rules = {
            rule: Rule(self.program, members, self.optimizer, total_steps, steps_per_epoch)
            for rule, members in rules_of(sites).items()
        }
        self._check_sampler()
        self._freezing = FreezingTimes(self.program, total_steps, steps_per_epoch)
        self._freezing.act(self.step)
        self._zero()
        self._version = self._weight_version()
        self._hooks = [
            self.optimizer.register_step_pre_hook(weak_hook(self, Session._before_step)),
            self.optimizer.register_step_post_hook(weak_hook(self, Session._after_step)),
            self.program.register_forward_hook(weak_hook(self, Session._after_forward)),
        ]
        self.program.__dict__["_session"] = weakref.ref(self)

    # -- what the user sees -------------------------------------------------------------------------------------------

    @property
    def sparsity(self) -> float:
        """Fraction of masked weights over all sites, now."""
        if self._sparsity is None:  # counting millions of mask entries every step would cost
            self._sparsity = sparsity_of(self._sites)
        return self._sparsity

    @property
    def done(self) -> bool:
        """Whether every rule has reached its sparsity; so always without masks."""
        return all(reached(rule.sites)[0] for rule in self._rules.values())

    def report(self) -> SessionReport:
        """How far every rule is, and what did not count; prints as text."""
        rules = []
        for number, rule in self._rules.items():
            done, now, target = reached(rule.sites)
            decision = rule.sites[0].decision
            rules.append(
                RuleReport(
                    rule=number,
                    pattern=decision.pattern,
                    criterion="locked" if decision.locked else str(rule.criterion),
                    sites=len(rule.sites),
                    sparsity=now,
                    target=now if decision.locked else target,
                    reached=done,
                    updates=rule.updates,
                    first=rule.window.start,
                    last=rule.window.end,
                )
            )
        left_out = self.sampler.skipped if self.sampler is not None else 0
        return SessionReport(
            step=self.step,
            total_steps=self.total_steps,
            sparsity=self.sparsity,
            skipped=self.skipped,
            samples_left_out=left_out,
            rules=tuple(rules),
            warnings=self._warnings(left_out),
            freezing=str(self._freezing),
        )

    def _warnings(self, left_out: int) -> tuple[str, ...]:
        found = []
        if self.skipped:
            found.append(f"{self.skipped} steps had NaN or infinite gradients and did not count for the scores")
        if left_out:
            found.append(f"{left_out} sampled gradients were NaN or infinite and did not count")
        frozen = [site.name for site in self._sites if not site.weight.requires_grad]
        if frozen:
            found.append(
                f"{len(frozen)} masked weights are frozen, for example {frozen[0]}; their scores take no gradient"
            )
        return tuple(found)

    def record(self, *, loss: float | Tensor) -> None:
        """Give the log a loss of your own for the step that comes next."""
        self._loss = loss.detach() if isinstance(loss, Tensor) else loss

    def close(self) -> None:
        """Take the session's hooks off the optimizer and the Program; masks stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.program.__dict__.pop("_session", None)

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
        """Everything that a resumed run needs: step, scores, masks, schedule position, what is frozen, random generators.

        Holds tensors, numbers and text only, so ``torch.load(weights_only=True)`` reads it.
        """
        return {
            "version": _VERSION,
            "step": self.step,
            "skipped": self.skipped,
            "total_steps": self.total_steps,
            "masks": {site.name: site.mask.clone() for site in self._sites},
            "rules": {number: rule.state_dict() for number, rule in self._rules.items()},
            "freezing": self._freezing.state_dict(),
            "sampler": self.sampler.state_dict() if self.sampler is not None else None,
            "log": format_log(self.program.training_log.points),
            "random": random_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, random: bool = True) -> None:
        """Go on where ``state_dict`` was taken; weights and optimizer are restored by the user, as always.

        Args:
            state: What ``state_dict`` returned.
            random: Restore the random generators too.

        Raises:
            SparsityError: The state is of another Program: sites, shapes, times or the length of the run differ.
        """
        if state.get("version") != _VERSION:
            raise SparsityError(f"session state has version {state.get('version')!r}, this is version {_VERSION}")
        if state["total_steps"] != self.total_steps:
            raise SparsityError(
                f"the state is of a run of {state['total_steps']} steps, this session has total_steps={self.total_steps}; "
                f"give the same number, or the schedule would jump"
            )
        self._check_masks(state["masks"])
        if set(state["rules"]) != set(self._rules):
            raise SparsityError(
                f"the state has rules {sorted(state['rules'])}, this Program {sorted(self._rules)}; load it into the same recipe"
            )
        self._freezing.load_state_dict(state["freezing"])
        for site in self._sites:
            site.mask.copy_(state["masks"][site.name])
        for number, rule in self._rules.items():
            rule.load_state_dict(state["rules"][number])
        if self.sampler is not None and state["sampler"] is not None:
            self.sampler.load_state_dict(state["sampler"])
        self._sparsity = None
        self.step, self.skipped = int(state["step"]), int(state["skipped"])
        if self.log is not None:
            self.log.trim(self.step)
        if state.get("log"):  # states of older versions have none
            self.program.training_log.replace(parse_log(state["log"]))
        self._zero()
        self._version = self._weight_version()
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

    def _check_ownership(self, sites: tuple[MaskedSite, ...]) -> tuple[str, Tensor]:
        """Name and weight that show whether this optimizer trains the Program: the first masked one, else the first it holds."""
        held = {id(item) for group in self.optimizer.param_groups for item in group["params"]}
        for site in sites:
            if id(site.weight) not in held and site.weight.requires_grad:
                raise SparsityError(
                    f"the optimizer does not hold {site.name} of this Program; make it from program.parameters() after "
                    f"transform (or freeze the weight with requires_grad_(False))"
                )
        own = [(name, value) for name, value in self.program.named_parameters() if id(value) in held]
        if not sites and not own:
            raise SparsityError(
                "the optimizer holds no parameter of this Program; make it from program.parameters() after transform"
            )
        return (sites[0].name, sites[0].weight) if sites else own[0]

    def _check_sampler(self) -> None:
        for rule in self._rules.values():
            if rule.criterion.needs_samples and not rule.locked and self.sampler is None:
                raise SparsityError(
                    f"criterion {rule.criterion} draws gradients of its own at every mask update: give the session a "
                    f"GradientSampler as sampler="
                )

    # -- hooks --------------------------------------------------------------------------------------------------------

    def _after_forward(self, module: nn.Module, arguments: object, output: object) -> None:
        if torch.compiler.is_compiling():
            return  # a compiled forward keeps no loss aside; record gives one to the log
        if module.training and torch.is_grad_enabled():
            self._watch_steps()
            loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
            if isinstance(loss, Tensor) and loss.numel() == 1:
                self._loss = loss.detach()

    def _watch_steps(self) -> None:
        """Notice that somebody trains the weights past this session, with another optimizer."""
        version = self._weight_version()
        if version == self._version:
            return
        self._version = version
        self._strays += 1
        if self._strays >= _STRAY_STEPS:
            raise SparsityError(
                f"the weights of {self._watched[0]} change, but the optimizer that the session was given does not step; "
                f"give the session the optimizer that trains the Program, or close the session"
            )

    def _weight_version(self) -> int:
        return self._watched[1]._version

    def _before_step(self, optimizer: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        return with_gradients(args, kwargs, self._use_gradients)

    @torch.no_grad()
    def _use_gradients(self) -> None:
        self._watch_gradient()
        scoring = [rule for rule in self._rules.values() if rule.scoring(self.step)]
        sites = [site for rule in scoring for site in rule.sites if site.weight.requires_grad]
        for site in sites:
            if site.weight.grad is None:
                raise SparsityError(
                    f"no gradient reached {site.name}; its criterion {site.decision.criterion} needs one: the loss does not "
                    f"depend on this weight, so exclude the site"
                )
        sums = [whole(site.weight.grad.sum().float()) for site in sites if site.weight.grad is not None]
        if sums and not bool(torch.isfinite(torch.stack(sums)).all()):
            self.skipped += 1
        else:
            for rule in scoring:
                rule.accumulate()
        for rule in self._rules.values():
            rule.shape_gradients(self.step)

    def _watch_gradient(self) -> None:
        """Notice gradients that somebody changed after the backward pass, one site a step, in turn.

        A zero weight with a zero gradient and zero moments stays zero under an optimizer that works entry by entry. Where
        that does not hold, pruned weights are set to zero after every step.
        """
        if not (sites := self._sites):
            return
        site = sites[self.step % len(sites)]
        grad = site.weight.grad
        if self._entrywise and grad is not None and not site.criterion.dense_gradient:
            self._entrywise = not bool(whole(grad).masked_select(~site.mask).any())

    @torch.no_grad()
    def _after_step(self, optimizer: object, args: object, kwargs: object) -> None:
        for rule in self._rules.values():
            if rule.update(self.step, self.program, self.sampler):
                self._sparsity = None
                self._check_agreement(rule)
            elif not self._entrywise:
                rule.zero()
            rule.mark_clean()
        self._version, self._strays = self._weight_version(), 0
        if self.log is not None:
            self.log.write(self.step, self.sparsity, self._loss)
        self.program.training_log.write(self.step, self.sparsity, self._loss)
        self.step += 1
        self._freezing.act(self.step)
        if self.step == self.total_steps:
            self._check_reached()

    def _check_agreement(self, rule: Rule) -> None:
        name = differing({site.name: site.mask for site in rule.sites})
        if name is not None:
            raise SparsityError(
                f"the processes chose different masks for {name}: their gradients differ; wrap the Program in "
                f"DistributedDataParallel or fully_shard, and give all of them the same weights"
            )

    def _zero(self) -> None:
        for rule in self._rules.values():
            rule.zero()

    def _check_reached(self) -> None:
        for rule in self._rules.values():
            done, now, target = reached(rule.sites)
            if not done or rule.holds_weights:
                raise SparsityError(
                    f"training ended at step {self.step} of {self.total_steps} with sparsity {now:.4f} of {target:.4g} "
                    f"({rule.description}); train to the end of the schedule (last update at step {rule.window.end}), or close "
                    f"the session to leave it unfinished"
                )
