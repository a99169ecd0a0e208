"""Every run that is compared with the reference."""

from __future__ import annotations

from dataclasses import replace

from tests.conformance.reference import PENALTY, RATE, Rule

PATTERNS = ("unstructured", "4x1", "1x4", "2x2", "2:4", "1:4", "channelx1", "1xchannel")
SCOPES = ("global", "local")
SCHEDULES = ("exponential", "linear", "cosine", "cube", "cubic", "one-shot")
CRITERIA = ("magnitude", "gradient", "snip", "snip_momentum")
BLOCKS = tuple(pattern for pattern in PATTERNS if ":" not in pattern)
CHANNELS = ("channelx1", "1xchannel")
OF_CRITERION = {"block_mask": BLOCKS, "retrain_free": CHANNELS}
"""Patterns of the criteria that do not work with all of them."""
MORE_CRITERIA = ("movement", f"soft_movement(rate={RATE},penalty={PENALTY})", "taylor", "top_kast")
"""What Neural Compressor does not have; ``rigl``, ``obs`` and ``random`` come by themselves."""
MORE_SCOPES = ("erdos-renyi", "erdos-renyi-kernel")
SUBSTEPS = 4
PROGRESSIVE = tuple(pattern for pattern in PATTERNS if pattern != "unstructured")
"""Patterns with units to divide."""


def plain() -> list[Rule]:
    """Criterion x pattern x scope x schedule."""
    return [
        Rule(criterion, pattern, scope, schedule, _target(pattern))
        for criterion in (*CRITERIA, *OF_CRITERION)
        for pattern in OF_CRITERION.get(criterion, PATTERNS)
        for scope in SCOPES
        for schedule in SCHEDULES
    ]


def progressive() -> list[Rule]:
    """The same in sub-steps: every criterion, pattern and scope, and every schedule with one pattern.

    One-shot has nothing between two updates to go through.
    """
    return [
        Rule(criterion, pattern, scope, schedule, _target(pattern), start=1, end=17, frequency=6, substeps=SUBSTEPS)
        for criterion in CRITERIA
        for pattern in PROGRESSIVE
        for scope in SCOPES
        for schedule in SCHEDULES
        if schedule == "cubic" or (pattern == "4x1" and schedule != "one-shot")
    ]


def capped() -> list[Rule]:
    """Global scope with least and most sparsity of a weight, both so narrow that they bind."""
    return [
        Rule(criterion, pattern, "global", "cubic", 0.5, least=0.4, most=0.55)
        for criterion in (*CRITERIA, *OF_CRITERION)
        for pattern in OF_CRITERION.get(criterion, PATTERNS)
        if pattern != "2:4"  # its most is the target itself
    ]


def edges() -> list[Rule]:
    """Windows of another form: every step, one update, all of training, a first update at step 0."""
    rule = Rule("snip_momentum", "4x1", sparsity=0.8)
    return [
        replace(rule, start=0, end=19, frequency=1),
        replace(rule, start=7, end=7),
        replace(rule, start=0, end=18, frequency=18),
        replace(rule, start=3, end=12, frequency=50),
        replace(rule, criterion="magnitude", start=0, end=10, frequency=5),
    ]


def beyond() -> list[Rule]:
    """What Neural Compressor does not have: criteria, with every pattern and scope; schedules; scopes; targets of single weights."""
    more = [
        Rule(criterion, pattern, scope, "cubic", _target(pattern))
        for criterion in MORE_CRITERIA
        for pattern in PATTERNS
        for scope in SCOPES
    ]
    more += [
        Rule("rigl", pattern, scope, "constant", _target(pattern))
        for pattern in BLOCKS
        for scope in ("local", *MORE_SCOPES)
    ]
    more += [
        Rule("magnitude", pattern, scope, "acdc(cycles=2)", _target(pattern), start=1, end=17, frequency=2)
        for pattern in PATTERNS
        for scope in SCOPES
    ]
    more += [Rule("magnitude", pattern, "global", "inverse-cubic", _target(pattern)) for pattern in PATTERNS]
    more += [Rule("snip_momentum", pattern, scope, "cubic", 0.45) for pattern in PATTERNS for scope in MORE_SCOPES]
    targets = (("conv.weight", 0.25), ("fc.weight", 0.5))
    more += [
        Rule(criterion, pattern, "local", "linear", 0.4, targets=targets)
        for criterion in CRITERIA
        for pattern in PATTERNS
    ]
    return more


def locked() -> list[Rule]:
    """Zeros that are there."""
    return [Rule("lock", pattern) for pattern in PATTERNS]


def _target(pattern: str) -> float:
    return {"2:4": 0.5, "1:4": 0.7, "unstructured": 0.8}.get(pattern, 0.6)


def name(rule: Rule) -> str:
    """How a test of the rule is called."""
    parts = [
        rule.criterion.partition("(")[0],
        *(["progressive"] if rule.substeps else []),
        rule.pattern,
        rule.scope,
        rule.schedule,
    ]
    return "-".join([*parts, *(["targets"] if rule.targets else [])])
