"""Run a graph from stop to stop with all batches, and prune at each stop the sites that it feeds.

Between two stops each batch runs alone, so that what lives there only (attention weights, for example) exists for one batch at a
time; values that are needed after the stop are kept for all batches. The sites of a stop are pruned with inputs that have
gone through all pruned sites before it.

A weight that is used several times is pruned at its first use with the inputs of all its uses: from the first use each batch runs
ahead to the last one, with weights as they are before this stop, and then goes on from the stop with the pruned weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx

from graphprune.errors import SparsityError
from graphprune.ir import ops
from graphprune.ir.blocks import FLAGS
from graphprune.ir.program import Program
from graphprune.ir.watching import call_node
from graphprune.oneshot.inputs import input_rows
from graphprune.oneshot.plan import Plan, Stop, goal_of
from graphprune.oneshot.weights import Meter, Weights
from graphprune.sparsity.activation import Statistic
from graphprune.sparsity.layout import to_logical

Live = dict[fx.Node, object]
"""Values of one batch that are still needed."""


class Walker:
    """One walk.

    Args:
        program: The Program; its graph is read, its tensors are not.
        plan: What to do.
        weights: Its tensors.
        batches: Inputs of each batch by name.
        device: Where to compute.
        limit: Bytes of weights to hold between two stops, where that can be chosen: the walk then goes in smaller pieces.

    Attributes:
        live: Values of each batch.
        done: Stops that were carried out.
        tokens: Rows of input that each site was pruned with, by name.
        meter: Bytes of weights, statistics and work space.
    """

    def __init__(
        self,
        program: Program,
        plan: Plan,
        weights: Weights,
        batches: Sequence[Mapping[str, Tensor]],
        *,
        device: torch.device,
        meter: Meter,
        limit: int = 0,
    ) -> None:
        self.program, self.plan, self.weights, self.device, self.limit = program, plan, weights, device, limit
        self.meter = meter
        self.live: list[Live] = [
            {node: batch[str(node.target)].to(device) for node in plan.inputs if node in plan.last} for batch in batches
        ]
        self.done = 0
        self.tokens: dict[str, int] = {}
        self._shared: dict[fx.Node, object] = {}

    @torch.no_grad()
    def run(self, after_stop: Callable[[Stop], None]) -> None:
        """Carry out all stops that are not done; the callback runs after each, when ``live`` is what the rest needs."""
        while self.done < len(self.plan.stops):
            stop = self.plan.stops[self.done]
            start = self.plan.stops[self.done - 1].index if self.done else 0
            self._advance(self.plan.between(start, stop.index))
            statistic = stop.criterion.statistic(self._features(stop), self.device, groups=stop.groups)
            with self.meter.held(statistic.values.nbytes):
                for number, live in enumerate(self.live):
                    self._observe(stop, live, statistic, number)
                self._drop()
                self._prune(stop, statistic)
            del statistic
            self._forget(stop)
            self.done += 1
            after_stop(stop)

    # -- running nodes ------------------------------------------------------------------------------------------------

    def _advance(self, nodes: Sequence[fx.Node]) -> None:
        for piece in self._pieces(nodes):
            for live in self.live:
                self._run(piece, live)
            self._drop()

    def _pieces(self, nodes: Sequence[fx.Node]) -> Iterator[list[fx.Node]]:
        """Cut nodes where the weights that they read would exceed the limit; a single larger weight is a piece of its own."""
        piece: list[fx.Node] = []
        names: set[str] = set()
        size = 0
        for node in nodes:
            new = self._weight_names(node) - names
            more = sum(self.weights.size(name) for name in new)
            if piece and self.limit and more and size + more > self.limit:
                yield piece
                piece, names, size = [], set(), 0
                new = self._weight_names(node)
                more = sum(self.weights.size(name) for name in new)
            piece.append(node)
            names |= new
            size += more
        yield piece

    def _weight_names(self, node: fx.Node) -> set[str]:
        """Parameters and buffers that a node reads, through nodes without data."""
        found: set[str] = set()
        waiting = [value for value in node.all_input_nodes if value in self.plan.shared]
        while waiting:
            value = waiting.pop()
            if value.op == "get_attr" and value.target not in FLAGS:
                found.add(str(value.target))
            elif value.target is ops.mask:
                waiting.append(value.all_input_nodes[0])
            elif value.target is not getattr:
                waiting.extend(value.all_input_nodes)
        return found

    def _run(self, nodes: Sequence[fx.Node], live: Live) -> None:
        order, last = self.plan.order, self.plan.last
        for node in nodes:
            result = call_node(node, lambda value: self._value(value, live))
            for value in node.all_input_nodes:
                if last[value] <= order[node]:
                    live.pop(value, None)
            if last.get(node, -1) > order[node]:
                live[node] = result

    def _value(self, node: fx.Node, live: Live) -> object:
        return self._shared_value(node) if node in self.plan.shared else live[node]

    def _shared_value(self, node: fx.Node) -> object:
        if node not in self._shared:
            self._shared[node] = self._compute_shared(node)
        return self._shared[node]

    def _compute_shared(self, node: fx.Node) -> object:
        if node.op == "get_attr":
            name = str(node.target)
            return bool(getattr(self.program, name)) if name in FLAGS else self.weights.read(name)
        if node.target is getattr:
            owner, name = node.all_input_nodes[0], str(node.args[1])
            while owner.op != "get_attr" and name != "device":
                owner = owner.all_input_nodes[0]  # a mask has its weight's dtype
            return self.device if name == "device" else getattr(self.program.tensor(str(owner.target)), name)
        if node.target is ops.mask:
            return self._shared_value(node.all_input_nodes[0])  # what is pruned is zero in storage
        return call_node(node, self._shared_value)

    def _drop(self) -> None:
        self._shared.clear()
        self.weights.drop()

    # -- pruning ------------------------------------------------------------------------------------------------------

    def _features(self, stop: Stop) -> int:
        return stop.sites[0].shape[1]

    def _observe(self, stop: Stop, live: Live, statistic: Statistic, number: int) -> None:
        first, *later = stop.uses
        self._add(stop, first.value, first.shape, live, statistic, number)
        if not later:
            return
        ahead: Live = {node: value.clone() if isinstance(value, Tensor) else value for node, value in live.items()}
        place = first.index
        for use in later:
            self._run(self.plan.between(place, use.index), ahead)
            self._add(stop, use.value, use.shape, ahead, statistic, number)
            place = use.index

    def _add(
        self, stop: Stop, node: fx.Node, shape: tuple[object, ...], live: Live, statistic: Statistic, number: int
    ) -> None:
        x = live[node]
        assert isinstance(x, Tensor)
        if not bool(torch.isfinite(x).all()):
            raise SparsityError(
                f"the inputs of {stop.sites[0].name} have NaN or infinite values in batch {number} (counted from 0); leave the "
                f"batch out, or look for the layer before it that overflows (in float16, compute in float32)"
            )
        stop.criterion.observe(statistic, input_rows(x, shape))

    def _prune(self, stop: Stop, statistic: Statistic) -> None:
        if not statistic.tokens:
            raise SparsityError(f"no rows of input reached {stop.sites[0].name}: all batches are empty; give others")
        for site in stop.sites:
            weight = to_logical(self.weights.read(site.name), site.decision.layout)
            try:
                with self.meter.held(stop.criterion.workspace(site.shape, stop.groups)):
                    changed, mask = stop.criterion.prune(weight, statistic, site.pattern, goal_of(site))
            except SparsityError as error:
                raise SparsityError(f"{site.name}: {error}") from error
            self.weights.write(site, changed, mask)
            self.tokens[site.name] = statistic.tokens
            self._drop()

    def _forget(self, stop: Stop) -> None:
        """Drop the stop's input where no node runs that would."""
        value = stop.uses[0].value
        if self.plan.last[value] <= stop.index and stop.uses[0].node not in self.plan.nodes:
            for live in self.live:
                live.pop(value, None)
