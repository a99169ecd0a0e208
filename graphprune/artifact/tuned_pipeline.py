"""A quantizing pipeline with one precision for each site: the base of a tuning, and the recipes that it tries."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from graphprune.errors import RecipeError
from graphprune.ir.program import Program
from graphprune.ir.properties import Property
from graphprune.ir.quant_plan import Request, parse_rule
from graphprune.passes.annotate_quant import AnnotateQuant
from graphprune.passes.dynamic_quant import DynamicQuant
from graphprune.passes.insert_fake_quant import InsertFakeQuant
from graphprune.pipeline.base import Pass
from graphprune.pipeline.manager import PassManager
from graphprune.pipeline.recipe import Recipe, Step

STATIC = "annotate-quant,insert-observers,calibrate,insert-fake-quant,freeze-quant"
"""Passes that a tuning starts from unless it is told others."""
OFF = "off"
"""The level of a site that is not quantized; others are settings of a rule, ``weights=int8:symmetric:channel``."""

Decider = AnnotateQuant | DynamicQuant | InsertFakeQuant
"""The pass that decides what is quantized."""

_QUANTIZED = Property.PLANNED | Property.OBSERVED | Property.FAKE_QUANT | Property.FROZEN
_SPECIAL = re.compile(r"[\s*?\[\]]|^re:")


@dataclass(frozen=True)
class TunedPipeline:
    """A pipeline, taken apart where it decides what is quantized.

    Attributes:
        before: Passes that run once: what they do does not depend on what is quantized.
        decider: The pass that decides what is quantized.
        after: The passes behind it.
    """

    before: tuple[Pass, ...]
    decider: Decider
    after: tuple[Pass, ...]

    @classmethod
    def of(cls, source: Recipe | Step | Sequence[Step]) -> TunedPipeline:
        """Take a pipeline apart; what the decider takes from this machine is written out.

        Raises:
            RecipeError: The pipeline is malformed, or no single pass of it decides what is quantized.
        """
        passes = PassManager(Recipe.of(source).passes, data=()).passes
        planning = [place for place, step in enumerate(passes) if isinstance(step, (AnnotateQuant, DynamicQuant))]
        inserting = [place for place, step in enumerate(passes) if isinstance(step, InsertFakeQuant)]
        deciding = planning or inserting
        if len(deciding) != 1:
            names = ", ".join(f"pipeline[{place}].{passes[place].name}" for place in deciding) or "none does"
            raise RecipeError(
                f"one pass must decide what is quantized, annotate-quant, dynamic-quant or insert-fake-quant alone, and "
                f"{names if not deciding else f'{len(deciding)} do: {names}'}; for example: {STATIC}"
            )
        place = deciding[0]
        for other in inserting:
            step = passes[other]
            assert isinstance(step, InsertFakeQuant)
            if other != place and (step.select, step.exclude, step.ops, step.include_last) != ((), (), (), True):
                raise RecipeError(
                    f"pipeline[{other}].{step.name} chooses what is quantized too; choose it in "
                    f"pipeline[{place}].{passes[place].name}, so that one pass decides"
                )
        decider = passes[place].recorded()
        assert isinstance(decider, Decider)
        return cls(passes[:place], decider, passes[place + 1 :])

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The whole pipeline."""
        return (*self.before, self.decider, *self.after)

    @property
    def request(self) -> Request:
        """What the decider asks for."""
        return self.decider.request

    def text(self) -> str:
        """The whole pipeline as text, from which ``of`` makes it again."""
        return Recipe.of(self.passes).text()

    def check_levels(self, fallback: Sequence[str]) -> None:
        """Check the levels to fall back to.

        Raises:
            RecipeError: There are none, one cannot be read, is given twice or cannot be had with this pipeline, or something
                comes behind ``off``.
        """
        if not fallback:
            raise RecipeError("fallback is empty; give one level or more, such as 'off'")
        for place, level in enumerate(fallback):
            try:
                changes = parse_rule(f"name x: {level}").changes
            except RecipeError as error:
                raise RecipeError(f"fallback {level!r}: {error}") from None
            if changes.get("on"):
                raise RecipeError(
                    f"fallback {level!r} says 'on', which is no higher precision; write settings or 'off'"
                )
            if level in fallback[:place]:
                raise RecipeError(f"fallback {level!r} is given twice")
            if (changes.get("on") is False) != (level == OFF):
                raise RecipeError(f"fallback {level!r}: what is off needs no other setting; write 'off'")
            if level == OFF and place + 1 < len(fallback):
                raise RecipeError("fallback 'off' is the highest precision; put it last")
            if level != OFF and isinstance(self.decider, InsertFakeQuant):
                raise RecipeError(
                    f"fallback {level!r}: insert-fake-quant can only leave sites out; put annotate-quant before it"
                )

    def decider_with(self, levels: Mapping[str, str]) -> Decider:
        """The decider with some sites at another level.

        Args:
            levels: Levels by the names of sites, without those that are quantized as the decider says.
        """
        if isinstance(self.decider, InsertFakeQuant):
            return replace(self.decider, exclude=(*self.decider.exclude, *map(_exactly, levels)))
        off = {name for name, level in levels.items() if level == OFF}
        return replace(
            self.decider,
            select=tuple(text for text in self.decider.select if text not in off),  # naming a site insists on it
            rules=(*self.decider.rules, *(f"name {_exactly(name)}: {level}" for name, level in levels.items())),
        )

    def recipe(self, levels: Mapping[str, str]) -> Recipe:
        """The whole pipeline as a recipe, with some sites at another level."""
        return Recipe.of((*self.before, self.decider_with(levels), *self.after))

    def check_order(self, program: Program, batches: Iterable[object] | None) -> None:
        """Check that the passes can follow each other and have data, before anything is measured.

        Raises:
            PassError: As for ``PassManager.check_order``.
            RecipeError: The Program is quantized already.
        """
        if held := program.properties & _QUANTIZED:
            raise RecipeError(f"the Program is {held} already; tune the one before it was quantized")
        PassManager(self.passes, data=batches).check_order(program.properties)


def default_pipeline(program: Program) -> Recipe:
    """What a Program is quantized with unless a pipeline is given: static, batch normalization folded first."""
    folds = any(True for _ in program.calls(torch.ops.aten.batch_norm.default))
    return Recipe.of(f"fold-conv-bn,{STATIC}" if folds else STATIC)


def _exactly(name: str) -> str:
    """The pattern that matches a name and nothing else, without white space."""
    if not _SPECIAL.search(name):
        return name
    return "re:^" + re.sub(r"(\\?)\s", r"\\s", re.escape(name)) + "$"
