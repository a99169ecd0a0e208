"""Trainable hard-concrete gates on masked weights, for L0 regularization.

Before: ``linear(x, mask(w, w_mask))``.  After: ``linear(x, gate(mask(w, w_mask), w_log_alpha, noise(w_log_alpha, training), training,
...))``; ``w_log_alpha`` is a parameter beside ``w`` with one entry for each score of the pattern. In train mode each unit is
multiplied by a sample of its gate, in eval mode by the deterministic gate. Folding multiplies the deterministic gates into the
weights, bitwise as in eval mode, and takes operators and parameters away.

The gate stands behind the mask, so that masks go on masking weights; the product is the same in either order.
Formulas: ``graphprune.sparsity.hard_concrete``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from graphprune.errors import SparsityError
from graphprune.ir.gate_operators import bound_pattern, gate, noise, spread_gates
from graphprune.ir.masking import MaskedSite
from graphprune.ir.program import Program, argument
from graphprune.sparsity import hard_concrete
from graphprune.sparsity.layout import Layout, logical_shape
from graphprune.sparsity.pattern_base import Pattern


@dataclass(frozen=True)
class GatedSite:
    """A gate in a Program.

    Attributes:
        name: The weight's dotted name.
        node: The gate operator.
        weight: The weight, as stored.
        log_alpha: The gate's parameter.
        pattern: The pattern, for the geometry of the weight.
    """

    name: str
    node: fx.Node
    weight: Tensor
    log_alpha: nn.Parameter
    pattern: Pattern

    @property
    def shape(self) -> tuple[int, int]:
        """Logical shape of the weight."""
        return logical_shape(tuple(self.weight.shape), Layout(str(self.node.args[5])))

    def penalty(self) -> Tensor:
        """Return the expected number of weights whose gate is not zero, a scalar; differentiable in ``log_alpha``."""
        sizes = self.pattern.score_sizes(self.shape, device=self.log_alpha.device)
        return (hard_concrete.expected_l0(self.log_alpha) * sizes).sum()

    @torch.no_grad()
    def penalty_gradient(self) -> Tensor:
        """Return the gradient of ``penalty``, shape and dtype of ``log_alpha``."""
        sizes = self.pattern.score_sizes(self.shape, device=self.log_alpha.device)
        return (hard_concrete.expected_l0_gradient(self.log_alpha) * sizes).to(self.log_alpha.dtype)


def insert_gates(program: Program, sites: Iterable[MaskedSite], *, log_alpha: float = hard_concrete.OPEN) -> int:
    """Put a gate behind each mask.

    Args:
        program: Mutated: a parameter, ``<weight>_log_alpha`` (float32), and two operators a site. The optimizer has to be
            made afterwards, from ``program.parameters()``.
        sites: Masks without a gate, not coupled over several sites.
        log_alpha: Value at the start; from ``hard_concrete.OPEN`` on, eval outputs are bitwise those without the gates.

    Returns:
        Number of gates.

    Raises:
        SparsityError: A site has a gate already, or is coupled with others.
    """
    gated = {site.name for site in gated_sites(program)}
    count = 0
    for site in sites:
        if site.name in gated:
            raise SparsityError(f"{site.name} has a gate already; give only one rule the criterion l0")
        if site.decision.coupling:
            raise SparsityError(
                f"{site.name} is coupled with other sites of {site.decision.coupling}, and gates are independent; use a pattern of "
                f"one weight with the criterion l0"
            )
        _insert(program, site, log_alpha)
        count += 1
    program.recompile()
    return count


def gated_sites(program: Program) -> tuple[GatedSite, ...]:
    """All gates of a Program, in graph order."""
    found = []
    for node in program.calls(gate):
        name = str(argument(argument(node, 0), 0).target)
        weight = program.tensor(name)
        log_alpha = program.tensor(str(argument(node, 1).target))
        assert isinstance(log_alpha, nn.Parameter)
        pattern, layout, groups = node.args[4:7]
        bound = bound_pattern(str(pattern), str(layout), int(groups), tuple(weight.shape))  # type: ignore[arg-type]
        found.append(GatedSite(name, node, weight, log_alpha, bound))
    return tuple(found)


@torch.no_grad()
def fold_gates(program: Program) -> int:
    """Multiply deterministic gates into the weights in place, and take the gates and their parameters away.

    Eval outputs are bitwise the same afterwards. Units whose gate is 0 become zero, whatever their mask says.

    Returns:
        Number of gates.
    """
    sites = gated_sites(program)
    for site in sites:
        masked, alpha, drawn, training = (argument(site.node, place) for place in range(4))
        if not site.weight.is_meta:
            gates = hard_concrete.deterministic(site.log_alpha).to(site.weight.dtype)
            pattern, layout, groups = site.node.args[4:7]
            site.weight.mul_(spread_gates(gates, site.weight, pattern, layout, groups))  # type: ignore[arg-type]
        site.node.replace_all_uses_with(masked)
        graph = site.node.graph
        for node in (site.node, drawn, alpha, training):
            if not node.users:  # dropout may read the mode too
                graph.erase_node(node)
        owner, _, leaf = str(alpha.target).rpartition(".")
        delattr(program.get_submodule(owner), leaf)
    program.recompile()
    return len(sites)


def _insert(program: Program, site: MaskedSite, log_alpha: float) -> None:
    masked = site.node
    graph = masked.graph
    owner, _, leaf = f"{site.name}_log_alpha".rpartition(".")
    value = torch.full(site.pattern.score_shape(site.shape), log_alpha, device=site.weight.device)
    program.get_submodule(owner).register_parameter(leaf, nn.Parameter(value))
    users = list(masked.users)
    training = _training(graph)
    with graph.inserting_after(argument(masked, 1)):
        alpha = graph.create_node("get_attr", f"{site.name}_log_alpha")
    with graph.inserting_after(masked):
        drawn = graph.call_function(noise, (alpha, training))
    with graph.inserting_after(drawn):
        pattern, layout = site.decision.pattern, site.decision.layout.value
        gated = graph.call_function(gate, (masked, alpha, drawn, training, pattern, layout, site.decision.groups))
    for node in (alpha, drawn):
        node.meta["val"] = torch.empty(value.shape, dtype=value.dtype, device="meta")
    gated.meta = {key: item for key, item in masked.meta.items() if key == "val"}
    for user in users:
        user.replace_input_with(masked, gated)


def _training(graph: fx.Graph) -> fx.Node:
    """The node that reads the mode, made where the graph has none; before everything that computes."""
    found = next(iter(graph.find_nodes(op="get_attr", target="training")), None)
    first = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
    if found is None:
        with graph.inserting_before(first):
            found = graph.create_node("get_attr", "training")
    else:
        first.prepend(found)
    return found
