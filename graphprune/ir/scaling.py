"""Layers whose input or output channels are scaled, and the way that channels take from one layer to the next.

A factor that is multiplied into one layer and divided out of another one leaves what the model computes as it is, as long as
everything between them is positively homogeneous in each channel: ``f(s * x) == s * f(x)`` for ``s > 0``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphprune.ir import ops
from graphprune.ir.blocks import FLAGS
from graphprune.ir.features import sees_values
from graphprune.ir.program import Program
from graphprune.ir.sites import OPERATORS, Site, users_of_value
from graphprune.sparsity.layout import Layout, to_logical

_SAME = frozenset({"alias", "clone", "contiguous", "detach", "dropout", "feature_dropout"})
_HOMOGENEOUS = frozenset({"leaky_relu", "leaky_relu_", "prelu", "relu", "relu_"})
_VIEWS = frozenset({"_unsafe_view", "flatten", "reshape", "squeeze", "unflatten", "unsqueeze", "view"})
_POOLS = {
    **dict.fromkeys(("adaptive_avg_pool1d", "avg_pool1d", "max_pool1d"), 1),
    **dict.fromkeys(("adaptive_avg_pool2d", "avg_pool2d", "max_pool2d"), 2),
    **dict.fromkeys(("adaptive_avg_pool3d", "avg_pool3d", "max_pool3d"), 3),
}
_BIAS = {"linear": 2, "addmm": 0, "conv1d": 2, "conv2d": 2, "conv3d": 2}


@dataclass(frozen=True, eq=False)
class Layer:
    """An operator, the site that only it uses, and what stands around it.

    Attributes:
        site: The weight.
        node: The operator.
        x: Its input.
        weight: The weight's ``get_attr`` node.
        mask: Name of its mask buffer; None where it has none.
        bias: Its bias; None where it has none.
    """

    site: Site
    node: fx.Node
    x: fx.Node
    weight: fx.Node
    mask: str | None
    bias: fx.Node | None

    @property
    def axis(self) -> int:
        """Dimension of the output's channels: the last one, but for convolutions."""
        return self._channels(self.node)

    @property
    def input_axis(self) -> int:
        """Dimension of the input's channels."""
        return self._channels(self.x)

    def _channels(self, value: fx.Node) -> int:
        behind = len(self.site.stored_shape) - 2 if self.site.layout is Layout.CONV else 0
        return int(value.meta["val"].dim()) - behind - 1

    @property
    def inputs(self) -> int:
        """Input channels."""
        if self.site.layout is Layout.CONV:
            return self.site.stored_shape[1] * self.site.groups
        return self.site.shape[1]

    @property
    def outputs(self) -> int:
        """Output channels."""
        return self.site.shape[0]

    def shown(self, program: Program) -> Tensor:
        """The weight as the operator sees it: detached, in float32 or wider, zero where it is masked."""
        value = program.tensor(self.site.name).detach()
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        return value if self.mask is None else value * program.tensor(self.mask)

    def largest_of_inputs(self, weight: Tensor) -> Tensor:
        """The largest absolute value of a stored weight for each input channel, ``[inputs]``."""
        if self.site.layout is Layout.CONV:
            rows = weight.abs().flatten(2).amax(2)
            return rows.view(self.site.groups, -1, rows.shape[1]).amax(1).reshape(-1)
        return weight.abs().amax(0 if self.site.layout is Layout.OUT_IN else 1)

    def largest_of_outputs(self, weight: Tensor) -> Tensor:
        """The largest absolute value of a stored weight for each output channel, ``[outputs]``."""
        return to_logical(weight, self.site.layout).abs().amax(1)

    def along_inputs(self, factor: Tensor) -> Tensor:
        """Shape ``[inputs]`` factors so that they broadcast over the stored weight."""
        if self.site.layout is Layout.CONV:
            groups, outputs = self.site.groups, self.outputs
            each = factor.view(groups, 1, -1).expand(groups, outputs // groups, -1)
            return each.reshape(outputs, -1, *[1] * (len(self.site.stored_shape) - 2))
        return factor.view(1, -1) if self.site.layout is Layout.OUT_IN else factor.view(-1, 1)

    def along_outputs(self, factor: Tensor) -> Tensor:
        """Shape ``[outputs]`` factors so that they broadcast over the stored weight."""
        if self.site.layout is Layout.IN_OUT:
            return factor.view(1, -1)
        return factor.view(-1, *[1] * (len(self.site.stored_shape) - 1))

    def scale_inputs(self, program: Program, factor: Tensor) -> None:
        """Multiply the weights of each input channel, in place; zeros stay zero."""
        multiply(program.tensor(self.site.name), self.along_inputs(factor))

    def scale_outputs(self, program: Program, factor: Tensor) -> None:
        """Multiply weights and bias of each output channel, in place; zeros stay zero."""
        multiply(program.tensor(self.site.name), self.along_outputs(factor))
        if self.bias is not None:
            multiply(program.tensor(str(self.bias.target)), factor)


@torch.no_grad()
def multiply(tensor: Tensor, factor: Tensor) -> None:
    """Multiply in place, with one rounding, whatever the dtype."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    tensor.copy_(tensor.to(wide) * factor.to(tensor.device, wide))


def users_of_parameters(program: Program) -> dict[str, tuple[fx.Node, ...]]:
    """For each parameter and buffer in the graph, by name: the operators that use its values, under any name that it has."""
    users: dict[int, list[fx.Node]] = {}
    names: dict[str, int] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        if node.target in FLAGS:
            continue
        key = names[str(node.target)] = id(program.tensor(str(node.target)))
        found = users.setdefault(key, [])
        found.extend(user for user, _ in users_of_value(node))
        found.extend(user for user in node.users if user.op == "output")
    return {name: tuple(users[key]) for name, key in names.items()}


def find_layers(
    program: Program, sites: Iterable[Site], users: Mapping[str, tuple[fx.Node, ...]]
) -> tuple[dict[fx.Node, Layer], dict[str, str]]:
    """Find the operators of sites whose channels may be scaled.

    Args:
        program: A flat Program without quantizers.
        sites: Candidates.
        users: From ``users_of_parameters``.

    Returns:
        Layers by their operators, in the order of ``sites``; and the reason why each other site is none.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    layers: dict[fx.Node, Layer] = {}
    left_out: dict[str, str] = {}
    for site in sites:
        if len(site.uses) > 1 or len(users[site.name]) > 1:
            left_out[site.name] = "its weight is used several times, with inputs of different ranges"
            continue
        node = nodes[site.uses[0]]
        place = OPERATORS[node.target].weight
        x, value = node.args[place - 1], node.args[place]
        mask = None
        if isinstance(value, fx.Node) and value.target is ops.mask:
            value, mask = value.args[0], str(value.args[1].target)  # type: ignore[union-attr]
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            left_out[site.name] = "something computes on its weight (a trainable gate?); run fold-masks first"
        elif not isinstance(x, fx.Node):
            left_out[site.name] = "its input is a constant"
        else:
            bias = _argument(node, _BIAS.get(site.op))
            layers[node] = Layer(site, node, x, value, mask, bias)
    return layers, left_out


def _argument(node: fx.Node, place: int | None) -> fx.Node | None:
    value = node.args[place] if place is not None and len(node.args) > place else None
    return value if isinstance(value, fx.Node) else None


def outputs_obstacle(layer: Layer, users: Mapping[str, tuple[fx.Node, ...]]) -> str | None:
    """Why a layer's output channels cannot be scaled; None where they can."""
    if layer.bias is None:
        return None
    if layer.bias.op != "get_attr":
        return "its bias is computed"
    if users[str(layer.bias.target)] != (layer.node,):
        return "its bias is used elsewhere too"
    if tuple(layer.bias.meta["val"].shape) != (layer.outputs,):
        return "its bias is not one number an output channel"
    return None


def readers(node: fx.Node) -> list[fx.Node]:
    """Users of a node that read its numbers, and not only its shape, dtype or device."""
    return [
        user
        for user in node.users
        if user.target is not getattr and (user.meta.get("val") is None or sees_values(user))
    ]


def channels_after(node: fx.Node, axis: int) -> tuple[int, int] | None:
    """Where an operator leaves the channels of its first argument.

    Args:
        node: The operator.
        axis: Dimension of the channels in its first argument.

    Returns:
        ``(axis, repeat)``: the dimension of its result and how many consecutive entries there stand for one channel; None where
        it is not positively homogeneous in each channel by itself, or is not known to be.
    """
    name = operator_name(node)
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return None
    if name in _SAME or name in _HOMOGENEOUS:
        return axis, 1
    if name in _POOLS:
        return (axis, 1) if axis == before.dim() - _POOLS[name] - 1 else None
    if name == "mean" and len(node.args) > 1 and isinstance(node.args[1], (list, tuple)):
        gone = {int(dim) % before.dim() for dim in node.args[1]}  # type: ignore[arg-type]
        if axis in gone:
            return None
        kept = after.dim() == before.dim()
        return (axis if kept else axis - sum(dim < axis for dim in gone)), 1
    if name in _VIEWS:
        inner = [size for size in before.shape[axis:] if isinstance(size, int)]
        whole = len(inner) == before.dim() - axis and after.dim() > 0 and isinstance(after.shape[-1], int)
        if whole and after.shape[-1] == math.prod(inner):
            return after.dim() - 1, math.prod(inner[1:])
    return None


def operator_name(node: fx.Node) -> str:
    """``relu`` for a call of ``aten.relu.default``, ``output`` for the output."""
    return "output" if node.op == "output" else str(node.target).removeprefix("aten.").split(".")[0]


def source_of(value: fx.Node) -> fx.Node:
    """The value that another one is a copy or view of, with the same channels in its last dimension."""
    while _keeps_last(value) and operator_name(value) not in _HOMOGENEOUS:
        value = value.all_input_nodes[0]
    return value


def _keeps_last(node: fx.Node) -> bool:
    """Whether a positively homogeneous operator leaves the channels of the last dimension there."""
    first = node.args[0] if node.op == "call_function" and node.args else None
    value = first.meta.get("val") if isinstance(first, fx.Node) else None
    if not isinstance(value, Tensor) or not value.dim():
        return False
    return channels_after(node, value.dim() - 1) == (node.meta["val"].dim() - 1, 1)


def only_read_by(source: fx.Node, layers: Mapping[fx.Node, Layer]) -> bool:
    """Whether nothing but these layers reads a value, itself or through copies and views."""
    waiting = [source]
    while waiting:
        value = waiting.pop()
        for user in readers(value):
            layer = layers.get(user)
            if layer is not None and layer.x is value and sum(item is value for item in user.args) == 1:
                continue
            if not _keeps_last(user) or operator_name(user) in _HOMOGENEOUS or user.args.count(value) != 1:
                return False
            waiting.append(user)
    return True


def divisors_of(
    value: fx.Node, layers: Mapping[fx.Node, Layer], users: Mapping[str, tuple[fx.Node, ...]]
) -> list[Layer | str] | None:
    """Find the parameters by which each channel in the last dimension of a value can be scaled.

    Args:
        value: The value; who reads it is the caller's concern.
        layers: Layers whose output channels may be scaled.
        users: From ``users_of_parameters``.

    Returns:
        Layers, and names of parameters ``[channels]``, such as the weight and bias of a normalization; scaling all of them scales
        the value. None where there are no such parameters, or others use them too.
    """
    name = operator_name(value)
    if name in ("layer_norm", "rms_norm"):
        affine = value.args[2:4] if name == "layer_norm" else value.args[2:3]
        given = [item for item in affine if item is not None]
        vectors = [vector for item in given if (vector := _own_vector(item, value, users)) is not None]
        scales = bool(affine) and affine[0] is not None and len(vectors) == len(given)
        return [*vectors] if scales else None
    if value in layers:
        layer = layers[value]
        free = layer.site.layout is not Layout.CONV and outputs_obstacle(layer, users) is None
        return [layer] if free else None
    if str(value.target) == "aten.mul.Tensor":
        return _divisors_of_product(value, layers, users)
    if _keeps_last(value) and readers(value.all_input_nodes[0]) == [value]:
        return divisors_of(value.all_input_nodes[0], layers, users)
    return None


def _divisors_of_product(
    value: fx.Node, layers: Mapping[fx.Node, Layer], users: Mapping[str, tuple[fx.Node, ...]]
) -> list[Layer | str] | None:
    for item in value.args:
        vector = _own_vector(item, value, users)
        if vector is not None:
            return [vector]
    first, second = value.args
    for item in (second, first):
        if first is second or not isinstance(item, fx.Node) or item.op != "call_function" or readers(item) != [value]:
            continue
        size, whole = item.meta["val"].shape, value.meta["val"].shape
        found = divisors_of(item, layers, users) if len(size) and size[-1] == whole[-1] else None
        if found is not None:
            return found
    return None


def _own_vector(item: object, user: fx.Node, users: Mapping[str, tuple[fx.Node, ...]]) -> str | None:
    """The name of a parameter with one number a channel that only ``user`` uses."""
    if not isinstance(item, fx.Node) or item.op != "get_attr" or users.get(str(item.target)) != (user,):
        return None
    size, whole = item.meta["val"].shape, user.meta["val"].shape
    return str(item.target) if len(size) == 1 and size[0] == whole[-1] else None
