"""The quantization plan: which operands of which operators are quantized, and how. It is decided here and inserted elsewhere.

A preset says what is quantized by kind of operator; options replace parts of it; rules change it for operators chosen by kind, by
name or by the type of a module around them, the later rule winning. The decision is an annotation on each operator.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from graphprune.errors import PassError, RecipeError, suggest
from graphprune.ir.coupling import last_sites
from graphprune.ir.gates import gated_sites
from graphprune.ir.program import Program
from graphprune.ir.quantizable import KINDS, Quantizable, find_quantizable
from graphprune.ir.selection import matching
from graphprune.ir.sites import attribute_behind, find_sites
from graphprune.quant.observer_text import parse_observer
from graphprune.quant.presets import preset
from graphprune.quant.schemes import Scheme, parse_scheme
from graphprune.sparsity.layout import Layout

DYNAMIC = "uint8:dynamic"
"""Text in place of a scheme: the range is that of each value when it is computed."""
RESULT = -1
"""Position that stands for an operator's result."""
_OPERATORS = {*KINDS, "addmm", "mm", "bmm", "conv1d", "conv2d", "conv3d"}
"""What ``ops`` may name."""


@dataclass(frozen=True)
class Operand:
    """One value that is quantized.

    Attributes:
        position: Position among the operator's arguments, ``RESULT`` for its result.
        scheme: Text of the scheme, or ``DYNAMIC``.
        observer: Text of the observer.
        weight: Whether it is the weight.
    """

    position: int
    scheme: str
    observer: str
    weight: bool = False

    def __str__(self) -> str:
        return f"{'result' if self.position == RESULT else self.position}@{self.scheme}"


@dataclass(frozen=True)
class QuantPlan:
    """Annotation on an operator: what is quantized at it.

    Attributes:
        name: Name of the operator: that of its weight, where it has one.
        operands: What is quantized.
        quantize: The operands as text.
    """

    name: str = field(repr=False)
    operands: tuple[Operand, ...] = field(repr=False)
    quantize: str

    @classmethod
    def of(cls, name: str, operands: Sequence[Operand]) -> QuantPlan:
        """Make a plan and its text."""
        return cls(name, tuple(operands), ";".join(str(item) for item in operands))


@dataclass(frozen=True)
class Request:
    """What a recipe asks for; texts as in ``annotate-quant``. None takes what the preset says."""

    preset: str = "onnxruntime"
    weights: str | None = None
    activations: str | None = None
    embeddings: str | None = None
    observer: str | None = None
    weight_observer: str | None = None
    outputs: bool | None = None
    reduce_range: bool | None = None
    select: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    include_last: bool = True
    rules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.settings()
        for text in self.rules:
            parse_rule(text)
        for name in self.ops:
            if name not in _OPERATORS:
                raise RecipeError(f"ops: unknown operator {name!r}{suggest(name, _OPERATORS)}")

    def settings(self) -> Mapping[str, Settings]:
        """What is asked for by kind of operator, before rules."""
        base = preset(self.preset, vnni=None if self.reduce_range is None else not self.reduce_range)
        weights = str(base.weights) if self.weights is None else _weight_scheme("weights", self.weights)
        if self.reduce_range and weights != "none":
            weights = str(replace(parse_scheme(weights), reduced=True))
        tables = self.embeddings
        if tables is None:
            tables = "none" if base.embeddings is None else str(base.embeddings)
        common = Settings(
            on=True,
            weights=weights,
            activations=_activation_scheme("activations", self.activations or str(base.activations)),
            observer=_observer(base.observer if self.observer is None else self.observer),
            weight_observer=_observer(base.weight_observer if self.weight_observer is None else self.weight_observer),
            outputs=base.outputs if self.outputs is None else self.outputs,
        )
        kinds = {kind: replace(common, on=kind in base.operators) for kind in KINDS}
        kinds["embedding"] = replace(
            kinds["embedding"],
            weights=_weight_scheme("embeddings", tables),
            on=kinds["embedding"].on or self.embeddings is not None,
        )
        if base.products is not None and self.activations is None:
            kinds["matmul"] = replace(kinds["matmul"], activations=str(base.products))
        return kinds

    def written_range(self) -> bool | None:
        """``reduce_range`` with what is taken from this CPU written out; None where nothing is taken from it."""
        chosen = preset(self.preset)
        asks = self.reduce_range is None and self.weights is None and chosen.reduce_without_vnni
        return chosen.weights.reduced if asks else self.reduce_range


@dataclass(frozen=True)
class Settings:
    """How one operator is quantized; texts."""

    on: bool
    weights: str
    activations: str
    observer: str
    weight_observer: str
    outputs: bool


@dataclass(frozen=True)
class Rule:
    """A change for the operators that it matches.

    Attributes:
        text: As written.
        kind: ``op``, ``name`` or ``type``.
        pattern: A glob; for names also ``re:`` and a regular expression.
        changes: New values of ``Settings``.
    """

    text: str
    kind: str
    pattern: str
    changes: Mapping[str, object]

    def matches(self, found: Sequence[Quantizable]) -> set[fx.Node]:
        """The operators it speaks of; RecipeError where there are none."""
        if self.kind == "name":
            chosen = matching(found, (self.pattern,), f"rule {self.text!r}", _ITEM)
            return {item.node for item in found if item.name in chosen}
        names = {item.node: (item.kind, item.op) if self.kind == "op" else item.types for item in found}
        nodes = {
            node for node, known in names.items() if any(fnmatch.fnmatchcase(name, self.pattern) for name in known)
        }
        if not nodes:
            known = {name for known in names.values() for name in known}
            raise RecipeError(f"rule {self.text!r} matches no {_ITEM}{suggest(self.pattern, known)}")
        return nodes


_ITEM = "quantizable operator"
_RULE = re.compile(r"(op|name|type)\s+(\S+)\s*:\s+(.+)", re.DOTALL)


def parse_rule(text: str) -> Rule:
    """Read ``op|name|type PATTERN: SETTING ...``, where a setting is ``on``, ``off`` or ``key=value``.

    Keys are ``weights``, ``activations``, ``observer``, ``weight_observer`` and ``outputs`` (``on`` or ``off``).

    Raises:
        RecipeError: The text cannot be read, or names something unknown.
    """
    match = _RULE.fullmatch(text.strip())
    if match is None:
        raise RecipeError(
            f"rule {text!r} cannot be read; write for example 'op embedding: off', 'type BertPooler: off' or "
            f"'name *.layer.0.*: weights=int8:symmetric:tensor'"
        )
    changes: dict[str, object] = {}
    for setting in match[3].split():
        key, equals, value = setting.partition("=")
        if not equals and key in ("on", "off"):
            changes["on"] = key == "on"
        elif key == "outputs" and value in ("on", "off"):
            changes["outputs"] = value == "on"
        elif key == "weights":
            changes[key] = _weight_scheme(f"rule {text!r}", value)
        elif key == "activations":
            changes[key] = _activation_scheme(f"rule {text!r}", value)
        elif key in ("observer", "weight_observer"):
            changes[key] = _observer(value)
        else:
            known = ("on", "off", "weights", "activations", "observer", "weight_observer", "outputs")
            raise RecipeError(f"rule {text!r}: unknown setting {setting!r}{suggest(key, known)}")
    return Rule(text, match[1], match[2], changes)


@dataclass(frozen=True)
class Plans:
    """The decision for a whole Program.

    Attributes:
        plans: What is quantized, by operator.
        left_out: Reasons by name.
    """

    plans: Mapping[fx.Node, QuantPlan]
    left_out: Mapping[str, str]


def planned(program: Program) -> Iterator[tuple[fx.Node, QuantPlan]]:
    """The operators that are planned, with their plans, in graph order."""
    for node in program.nodes():
        plan: QuantPlan | None = program.annotation(node, QuantPlan)
        if plan is not None:
            yield node, plan


def decide(program: Program, request: Request) -> Plans:
    """Decide what is quantized. Changes nothing.

    Raises:
        RecipeError: A name or a rule matches nothing, or nothing at all is chosen.
        PassError: An operator that was named cannot be quantized so.
    """
    found = find_quantizable(program)
    settings = _settings(found, request)
    chosen = matching(found, request.select, "select", _ITEM) if request.select else {item.name for item in found}
    refused = matching(found, request.exclude, "exclude", _ITEM)
    gated = {item.name for item in gated_sites(program)}
    last = set() if request.include_last else last_sites(program, find_sites(program)[0])
    plans: dict[fx.Node, QuantPlan] = {}
    left: dict[str, str] = {}
    for item in found:
        reason = _unwanted(item, settings[item.node], request, chosen, refused, last) or _obstacle(item, gated)
        operands: tuple[Operand, ...] = ()
        if reason is None:
            operands, reason = _operands(item, settings[item.node])
        if reason is not None and item.name in request.select:
            raise PassError(f"{item.name} cannot be quantized as asked: {reason}")
        if reason is not None:
            left[item.name] = reason
        else:
            plans[item.node] = QuantPlan.of(item.name, operands)
    _share_schemes(plans)
    if not plans:
        why = "; ".join(sorted(set(left.values()))) or "the model has no operator that can be quantized"
        raise RecipeError(f"nothing is left to quantize: {why}")
    return Plans(plans, left)


def _settings(found: Sequence[Quantizable], request: Request) -> dict[fx.Node, Settings]:
    """How each operator is to be quantized: by its kind, what ``ops`` names being on, and then by the rules in turn."""
    kinds = request.settings()
    settings = {
        item.node: replace(kinds[item.kind], on=kinds[item.kind].on or bool({item.kind, item.op} & {*request.ops}))
        for item in found
    }
    for text in request.rules:
        rule = parse_rule(text)
        for node in rule.matches(found):
            settings[node] = replace(settings[node], **rule.changes)  # type: ignore[arg-type]
    return settings


def _share_schemes(plans: dict[fx.Node, QuantPlan]) -> None:
    """Give a weight that several operators use (a tied embedding) one scheme, that of the first of them."""
    first: dict[fx.Node, Operand] = {}
    for node, plan in plans.items():
        operands = []
        for operand in plan.operands:
            root = attribute_behind(node.args[operand.position]) if operand.weight else None
            known = first.setdefault(root, operand) if root is not None else operand
            operands.append(replace(known, position=operand.position))
        plans[node] = QuantPlan.of(plan.name, operands)


def _unwanted(
    item: Quantizable, settings: Settings, request: Request, chosen: set[str], refused: set[str], last: set[str]
) -> str | None:
    if item.name in refused:
        return "excluded by name"
    if item.name not in chosen:
        return "not selected"
    if request.ops and not {item.kind, item.op} & set(request.ops):
        return f"operator {item.op} is not among ops"
    if not settings.on:
        return f"{item.kind} operators are off; a rule such as 'op {item.kind}: on' takes them"
    if item.name in last:
        return "last layer before the output; set include_last to take it"
    return None


def _obstacle(item: Quantizable, gated: set[str]) -> str | None:
    if item.is_attention:
        return "attention is one operator, whose products cannot be quantized one by one; run expand-attention first"
    if item.is_cast:
        return "its weight is cast to another dtype; quantize before cast-mixed"
    if item.name in gated:
        return "it has a trainable gate, whose range changes; run fold-masks first"
    if any(str(user.target).startswith("aten.batch_norm") for user in item.node.users):
        return "followed by batch normalization; run fold-conv-bn first"
    return None


def _operands(item: Quantizable, settings: Settings) -> tuple[tuple[Operand, ...], str | None]:
    operands: list[Operand] = []
    if item.inputs and settings.activations != "none":
        if settings.activations == DYNAMIC and item.kind == "add":
            return (), "sums are quantized with fixed scales only"
        operands += [Operand(place, settings.activations, settings.observer) for place in item.inputs]
    if item.weight is not None and settings.weights != "none":
        scheme = parse_scheme(settings.weights)
        if scheme.axis == 0 and item.layout is Layout.IN_OUT:
            scheme = replace(scheme, axis=1)
        weight = item.node.args[item.weight]
        assert isinstance(weight, fx.Node)
        reason = _misfit(weight.meta["val"].shape, scheme)
        if reason is not None:
            return (), reason
        operands.append(Operand(item.weight, str(scheme), settings.weight_observer, weight=True))
    static = settings.activations not in ("none", DYNAMIC)
    if settings.outputs and static and item.kind in ("conv", "add"):
        operands.append(Operand(RESULT, settings.activations, settings.observer))
    if not operands:
        return (), "neither weights nor activations of it are to be quantized"
    return tuple(operands), None


def _misfit(shape: Sequence[int], scheme: Scheme) -> str | None:
    """Why a scheme cannot be had for a weight."""
    if scheme.group is not None and len(shape) != 2:
        return f"scales per group of {scheme.group} are for matrices, not for a weight of {len(shape)} dimensions"
    if scheme.axis is not None and scheme.axis >= len(shape):
        return f"its weight of shape {tuple(shape)} has no dimension {scheme.axis} for the scheme {scheme}"
    grouped = shape[1 - scheme.axis] if scheme.group is not None and scheme.axis is not None else 0
    if scheme.group is not None and grouped % scheme.group:
        return f"its {grouped} input features are not a multiple of the group of {scheme.group}"
    return None


def _weight_scheme(option: str, text: str) -> str:
    """The text of a weight's scheme in its canonical form, or ``none``."""
    if text in ("dynamic", DYNAMIC):
        raise RecipeError(
            f"{option}: {text!r} is for activations; a weight has a scheme of its own, such as int8:symmetric:channel"
        )
    return text if text == "none" else str(parse_scheme(text))


def _activation_scheme(option: str, text: str) -> str:
    """The text of an activation's scheme in its canonical form, ``DYNAMIC``, or ``none``."""
    if text == "none":
        return text
    if text in ("dynamic", DYNAMIC):
        return DYNAMIC
    scheme = parse_scheme(text)
    if scheme.axis is not None:
        raise RecipeError(
            f"{option}: {text!r} has several scales, and integer products need one for all of an activation; write "
            f"{replace(scheme, axis=None, group=None)}"
        )
    return str(scheme)


def _observer(text: str) -> str:
    parse_observer(text)
    return text
