"""What a session has to say: how far every rule is, and what it left out and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RuleReport:
    """One rule of the recipe.

    Attributes:
        rule: Its number, counted from 0.
        pattern: Sparsity pattern.
        criterion: Criterion.
        sites: Masked weights.
        sparsity: Fraction of masked weights now.
        target: Fraction to reach.
        reached: Whether it is reached.
        updates: Mask updates made.
        first: Step of the first update.
        last: Step of the last update.
    """

    rule: int
    pattern: str
    criterion: str
    sites: int
    sparsity: float
    target: float
    reached: bool
    updates: int
    first: int
    last: int

    def __str__(self) -> str:
        state = "reached" if self.reached else f"updates at steps {self.first} to {self.last}"
        return (
            f"rule {self.rule}: {self.pattern} by {self.criterion} on {self.sites} sites, sparsity {self.sparsity:.4f} of "
            f"{self.target:.4f}, {self.updates} updates ({state})"
        )


@dataclass(frozen=True)
class SessionReport:
    """A session so far.

    Attributes:
        step: Optimizer steps taken.
        total_steps: Optimizer steps of the run.
        sparsity: Fraction of masked weights over all rules.
        skipped: Steps whose gradients were NaN or infinite and did not count for the scores.
        samples_left_out: Sampled gradients that were NaN or infinite.
        rules: One entry a rule.
        warnings: What a user should know, one sentence each.
        freezing: Which of observers and batch normalization is frozen, and when the other will be; empty where none is to be.
    """

    step: int
    total_steps: int
    sparsity: float
    skipped: int
    samples_left_out: int
    rules: tuple[RuleReport, ...]
    warnings: tuple[str, ...]
    freezing: str = ""

    def __str__(self) -> str:
        lines = [f"step {self.step} of {self.total_steps}, sparsity {self.sparsity:.4f}"]
        lines += [f"  {rule}" for rule in self.rules]
        lines += [f"  {self.freezing}"] if self.freezing else []
        lines += [f"  warning: {text}" for text in self.warnings]
        return "\n".join(lines)
