"""Keep some outputs and cut the others, with everything that only they need.

Before: ``return %logits, %hidden_states_0, %hidden_states_1``.  After ``keep-outputs{names=[logits]}``: ``return %logits, null, null``;
the others are None in the output object from then on.  Exact: what is kept is bitwise equal.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphprune.errors import PassError
from graphprune.ir.program import Program
from graphprune.pipeline.base import Coverage, Pass, PassResult


@dataclass(frozen=True)
class KeepOutputs(Pass):
    """Cut outputs that only training needed, such as hidden states for distillation.

    Attributes:
        names: Outputs to keep; ``hidden_states`` stands for all of its entries.
    """

    name = "keep-outputs"

    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.names:
            raise PassError("names is empty; a Program without outputs computes nothing, name what to keep")

    def run(self, program: Program) -> PassResult:
        """Replace other outputs by None and erase what is dead then."""
        before = program.output.args
        program.keep_outputs(self.names)
        known = program.interface.output_names
        kept = program.output.args[0]
        assert isinstance(kept, tuple)
        gone = {name: "not in names" for name, leaf in zip(known, kept, strict=True) if leaf is None}
        matched = tuple(name for name in known if name not in gone)
        return PassResult(
            program, program.output.args != before, {"outputs-kept": len(matched)}, Coverage(matched, gone)
        )
