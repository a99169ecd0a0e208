"""Quantize a source model with IPEX, by the scales of the Program."""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.errors import LoweringError
from graphprune.ir.origin import origin
from graphprune.quant.presets import has_vnni
from graphprune.targets.ipex_model.layers import Grid, Use

_FLOAT = "torch.float32"


def quantize_static(
    ipex: Any, model: nn.Module, example: tuple[Tensor, ...], uses: Sequence[Use], prefix: str
) -> nn.Module:
    """Prepare and convert a model, with the Program's scales in place of those that IPEX would find.

    Args:
        ipex: The package.
        model: In eval mode, called with ``example``; mutated.
        example: Inputs, by position.
        uses: Every place where a layer runs, in the order in which they run.
        prefix: What names of modules start with in ``model``.

    Returns:
        The converted model. What the Program leaves in float is in float.

    Raises:
        LoweringError: IPEX does not find a layer at as many places as the Program has it, or cannot give it its scale.
    """
    quantization = ipex.quantization
    prepared: Any = quantization.prepare(model, _observers(), example_inputs=example, inplace=True, bn_folding=False)
    prepared(*example)  # it makes observers in its first run, and they see this one
    with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
        path = Path(folder) / "summary.json"
        prepared.save_qconf_summary(str(path))
        summary = json.loads(path.read_text(encoding="utf-8"))
        write_scales(summary, uses, prefix)
        path.write_text(json.dumps(summary), encoding="utf-8")
        prepared.load_qconf_summary(str(path))
    converted: nn.Module = quantization.convert(prepared, inplace=True)
    return converted


def _observers() -> Any:
    """Cheap observers: their scales are replaced."""
    ao: Any = importlib.import_module("torch.ao.quantization")
    activation = ao.MinMaxObserver.with_args(dtype=torch.quint8, qscheme=torch.per_tensor_affine)
    weight = ao.PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
    return ao.QConfigMapping().set_global(ao.QConfig(activation=activation, weight=weight))


def write_scales(summary: dict[str, Any], uses: Sequence[Use], prefix: str) -> None:
    """Write the Program's scales into what IPEX's ``save_qconf_summary`` wrote, and put all other operators into float.

    Args:
        summary: Mutated.
        uses: Every place where a layer runs, in order.
        prefix: What names of modules start with in ``summary``.

    Raises:
        LoweringError: A layer of the Program is missing, runs at several places with several scales where IPEX has one, or two layers
            of a module quantize one value in two ways, which IPEX cannot.
    """
    wanted: dict[str, list[Use]] = {}
    for use in uses:
        wanted.setdefault(prefix + use.module, []).append(use)
    for state in summary.values():
        given: dict[int, tuple[Grid, Use]] = {}
        entries = [state["q_op_infos"][index] for index in sorted(state["q_op_infos"], key=int)]
        for entry in entries:
            _leave_in_float(entry)
        for name in dict.fromkeys(entry["fqn"] for entry in entries if entry["weight_tensor_infos"]):
            places = [entry for entry in entries if entry["fqn"] == name and entry["weight_tensor_infos"]]
            for entry, use in zip(places, _matched(name, len(places), wanted.pop(name, [])), strict=False):
                if use.input is not None and use.weight is not None:
                    _write(entry, use, given)
    for lost in wanted.values():
        for use in lost:
            if use.input is not None:
                raise LoweringError(
                    f"{origin(use.node)} is quantized, and IPEX does not see a layer there; leave it in float by a rule"
                )


def _matched(name: str, count: int, uses: list[Use]) -> list[Use]:
    """One use for each place where IPEX sees a layer: a module that runs many times is one place to it."""
    if len(uses) in (0, count):
        return uses
    for use in uses[1:]:
        if not _alike(use.input, uses[0].input) or not _alike(use.weight, uses[0].weight):
            raise LoweringError(
                f"{origin(use.node)} runs {len(uses)} times with different scales, and IPEX has one for {name}; leave it in float by a rule"
            )
    return uses[:1] * count


def _alike(one: Grid | None, other: Grid | None) -> bool:
    return one is other if one is None else one.same(other)


def _leave_in_float(entry: dict[str, Any]) -> None:
    for kind in ("input_tensor_infos", "weight_tensor_infos", "output_tensor_infos"):
        for info in entry[kind]:
            if info:
                info["inf_dtype"] = _FLOAT
                info.pop("scale", None)
                info.pop("zero_point", None)
                if "force_dtype" in info:
                    info["force_dtype"] = _FLOAT


def _write(entry: dict[str, Any], use: Use, given: dict[int, tuple[Grid, Use]]) -> None:
    assert use.input is not None
    assert use.weight is not None
    value, weight = entry["input_tensor_infos"][0], entry["weight_tensor_infos"][0]
    known, owner = given.setdefault(int(value["id"]), (use.input, use))
    if not known.same(use.input):
        raise LoweringError(
            f"{origin(use.node)} and {origin(owner.node)} read one value and quantize it in two ways, which IPEX cannot; plan both alike"
        )
    for info, grid in ((value, use.input), (weight, use.weight)):
        info["inf_dtype"] = str(grid.dtype)
        info["scale"] = grid.scale.reshape(-1).tolist()
        info["zero_point"] = grid.zero_point.reshape(-1).tolist()
    value["force_dtype"] = value["inf_dtype"]


def quantize_dynamic(model: nn.Module, uses: Iterable[Use]) -> None:
    """Put torch's dynamic linear layers, which ``ipex.quantization.convert`` puts too, in place of those that the Program quantizes so.

    They take the Program's scales of weights. Activations have 8 bits where the CPU has VNNI and 7 where it has not.

    Args:
        model: The source model; mutated.
        uses: Places where layers run.
    """
    dynamic: Any = importlib.import_module("torch.ao.nn.quantized.dynamic")

    for module, use in {use.module: use for use in uses if use.dynamic}.items():
        layer = model.get_submodule(module)
        assert isinstance(layer, nn.Linear)
        made = dynamic.Linear(layer.in_features, layer.out_features, dtype=torch.qint8)
        made.set_weight_bias(use.stored(layer.weight.detach()), layer.bias)
        if has_vnni():
            made.version = 3  # its way to say: all 8 bits of the activations
        owner, _, leaf = module.rpartition(".")
        setattr(model.get_submodule(owner), leaf, made)
