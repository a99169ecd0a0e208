"""What the quantizers of a Program ask of each layer of its source model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from graphprune.errors import LoweringError
from graphprune.ir import ops
from graphprune.ir.origin import origin
from graphprune.ir.program import Program
from graphprune.ir.quantizing import Quantizer
from graphprune.ir.sites import OPERATORS, attribute_behind
from graphprune.quant.schemes import QuantDtype, Scheme, parse_scheme

LAYERS = (nn.Linear, nn.Conv2d, nn.Conv3d)
"""Classes of layers that IPEX multiplies as integers; subclasses it does not know."""
_ADVICE = (
    "IPEX multiplies inputs and weights of linear layers and of 2-d and 3-d convolutions as integers; plan with "
    "annotate-quant{preset=ipex}, or leave it in float by a rule"
)


@dataclass(frozen=True)
class Grid:
    """Integers that stand for real numbers.

    Attributes:
        scale: float32, ``[]``, or ``[channels]`` of a weight.
        zero_point: int32, likewise.
        dtype: ``torch.qint8`` or ``torch.quint8``.
    """

    scale: Tensor
    zero_point: Tensor
    dtype: torch.dtype

    def same(self, other: Grid | None) -> bool:
        """Whether both are the same numbers."""
        return (
            other is not None
            and self.dtype is other.dtype
            and torch.equal(self.scale, other.scale)
            and torch.equal(self.zero_point, other.zero_point)
        )


@dataclass(frozen=True)
class Use:
    """One place where a layer runs.

    Attributes:
        module: Dotted name of the layer.
        site: Dotted name of its weight; tied ones have the first of their names.
        node: The operator.
        weight: How its weight is quantized, None where it is not.
        input: How its input is quantized, None where it is not, or by the range at hand.
        dynamic: Whether the input is quantized by the range at hand.
    """

    module: str
    site: str
    node: fx.Node = field(repr=False)
    weight: Grid | None = None
    input: Grid | None = None
    dynamic: bool = False

    @property
    def is_integer(self) -> bool:
        """Whether it multiplies integers: a weight alone is stored in float, on its grid."""
        return self.weight is not None and (self.dynamic or self.input is not None)

    def stored(self, weight: Tensor) -> Tensor:
        """The weight as it is stored: integers where it is multiplied so, else as it is."""
        grid = self.weight
        if grid is None or not self.is_integer:
            return weight
        if grid.scale.dim():
            return torch.quantize_per_channel(weight, grid.scale, grid.zero_point.long(), 0, torch.qint8)
        return torch.quantize_per_tensor(weight, float(grid.scale), int(grid.zero_point), torch.qint8)


def find_uses(program: Program, model: nn.Module) -> tuple[Use, ...]:
    """Find every place where a layer runs, and its quantizers.

    Args:
        program: Frozen where it is quantized.
        model: Its source model.

    Returns:
        In graph order: operators with a weight, quantized or not.

    Raises:
        LoweringError: Something is quantized that IPEX has no integer kernel for; names its operator, module and source line.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    carried: set[fx.Node] = set()
    uses = []
    for node in program.calls(*OPERATORS):
        operator = OPERATORS[node.target]
        weight = node.args[operator.weight]
        root = attribute_behind(weight)
        if root is None:
            continue  # a product of two activations
        value = node.args[operator.weight - 1]
        name = _module_of(node, modules) or str(root.target).rpartition(".")[0]
        assert isinstance(weight, fx.Node)
        assert isinstance(value, fx.Node)
        use = Use(
            name,
            str(root.target),
            node,
            _grid(program, weight),
            _grid(program, value),
            value.target is ops.dynamic_fake_quantize,
        )
        if use.is_integer or use.input is not None or use.dynamic:
            _check(program, use, weight, value, modules)
        carried |= {item for item in (weight, value) if item.target in (ops.fake_quantize, ops.dynamic_fake_quantize)}
        uses.append(use)
    _check_others(program, carried)
    return tuple(uses)


def _module_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """The innermost module that an operator ran in, if the model has it."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    name = str(stack[-1][0]) if stack else ""
    return name if name in modules and hasattr(modules[name], "weight") else None


def _grid(program: Program, value: fx.Node) -> Grid | None:
    if value.target is not ops.fake_quantize:
        return None
    scale, zero_point = (program.tensor(str(item.target)).detach() for item in value.args[1:3])  # type: ignore[union-attr]
    dtype = torch.quint8 if _scheme(program, value).dtype is QuantDtype.UINT8 else torch.qint8
    return Grid(scale.cpu().float(), zero_point.cpu(), dtype)


def _scheme(program: Program, value: fx.Node) -> Scheme:
    decision: Quantizer = program.annotation(value, Quantizer)  # type: ignore[assignment]
    return parse_scheme(decision.scheme)


def _check(program: Program, use: Use, weight: fx.Node, value: fx.Node, modules: Mapping[str, nn.Module]) -> None:
    """Raise LoweringError where IPEX has no kernel for a quantized operator."""
    where = origin(use.node)
    layer = modules.get(use.module)
    if type(layer) not in LAYERS:
        raise LoweringError(f"{where} is quantized, and runs in a {type(layer).__name__}; {_ADVICE}")
    if use.dynamic and type(layer) is not nn.Linear:
        raise LoweringError(
            f"{where}: its input is quantized by the range at hand, which IPEX does for linear layers only; leave convolutions out "
            f"(dynamic-quant{{ops=[linear]}}) or give them fixed scales (annotate-quant{{preset=ipex}})"
        )
    if use.weight is None:
        raise LoweringError(f"{where}: its input is quantized and its weight is not; {_ADVICE}")
    scheme = _scheme(program, weight)
    if scheme.dtype is not QuantDtype.INT8 or scheme.axis not in (None, 0) or bool(use.weight.zero_point.any()):
        raise LoweringError(
            f"{where}: its weight is {scheme}; IPEX takes int8:symmetric:channel and int8:symmetric:tensor, give it one of them"
        )
    if use.input is not None and use.input.scale.dim():
        raise LoweringError(f"{where}: its input is {_scheme(program, value)}; IPEX takes one scale a tensor")


def _check_others(program: Program, carried: set[fx.Node]) -> None:
    """Raise LoweringError where a quantized value goes somewhere else than into a layer."""
    for node in program.calls(ops.fake_quantize, ops.dynamic_fake_quantize):
        lookup = attribute_behind(node) is not None  # a table on its grid is looked up, not multiplied
        for user in node.users:
            if not (node in carried and user.target in OPERATORS) and not lookup:
                raise LoweringError(f"what {origin(user)} reads is quantized; {_ADVICE}")
