"""The torch target: a checkpoint of the source's own class that anyone loads, with pruned and rounded weights and masks beside it."""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from graphprune.errors import LoweringError
from graphprune.ir.interface import is_label
from graphprune.ir.masking import Pruned
from graphprune.ir.program import Program
from graphprune.ir.quantizing import Dequantized
from graphprune.ir.sites import Site, find_sites
from graphprune.ir.source import Source
from graphprune.ir.source_model import build_source, resolve, source_model
from graphprune.pipeline.records import read_record
from graphprune.pipeline.target import Lowered, Run, StoredWeight, Support, Target
from graphprune.quant.schemes import parse_scheme
from graphprune.sparsity.layout import Layout, from_logical, to_logical
from graphprune.sparsity.patterns import parse_pattern

_WEIGHTS, _MASKS, _RECORD = "model.safetensors", "masks.safetensors", "checkpoint.json"
_FORMAT = 1
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ROWS, _COLUMNS = 32, 64
"""What a float16 weight's sizes must be multiples of, so that each kernel of torch's semi-structured matrices takes it."""


@dataclass(frozen=True)
class Torch(Target):
    """Write a checkpoint of the source's class: ``from_pretrained`` loads it, graphprune is not needed.

    Attributes:
        semi_structured: Run linear layers whose weights are 2:4 sparse as ``torch.sparse`` semi-structured matrices, in float16 on an
            NVIDIA GPU of compute capability 8.0 or newer. The files are the same.
    """

    name = "torch"
    any_graph = False
    legalize = ("fold-masks", "freeze-quant", "remove-quant")
    remarks: ClassVar[Mapping[str, str]] = {
        "N:M": "2:4 only, in linear layers, with semi_structured=true on an NVIDIA GPU",
        **dict.fromkeys(
            ("int8", "uint8", "int4", "uint4", "int8 per group", "int4 per group"),
            "weights only, as float numbers on their grid; activations are float",
        ),
        "dynamic uint8": "activations are float",
    }

    semi_structured: bool = False

    @classmethod
    def capabilities(cls) -> Mapping[str, Support]:
        """A plain checkpoint holds float weights and no quantizers.

        Zeros are stored like other numbers; only semi-structured matrices skip them. Weights keep the values that quantization gave
        them, in float; activations, static or dynamic, are not quantized. A model traced in 16 bits stays in 16 bits; casts that
        ``cast-mixed`` inserted have no place in it.
        """
        return {
            "unstructured": Support.STORED,
            "NxM": Support.STORED,
            "N:M": Support.EXPLOITED,
            "channel": Support.STORED,
            "fp32": Support.EXPLOITED,
            "fp16": Support.STORED,
            "bf16": Support.STORED,
            "int8": Support.STORED,
            "uint8": Support.STORED,
            "int4": Support.STORED,
            "uint4": Support.STORED,
            "int8 per group": Support.STORED,
            "int4 per group": Support.STORED,
            "dynamic uint8": Support.IGNORED,
        }

    def tolerance(self) -> float | None:
        """Of float16 where semi-structured matrices compute in it."""
        return 2e-2 if self.semi_structured else None

    def lower(self, program: Program, folder: Path) -> Lowered:
        """Write the checkpoint, ``masks.safetensors`` where weights were pruned, and ``checkpoint.json``, which says how to load it.

        Raises:
            LoweringError: ``cast-mixed`` ran, or something else has no place in the source's class.
        """
        if any(step.startswith("cast-mixed") for step in program.history):
            raise LoweringError(
                f"{program.name} has casts of cast-mixed, and a checkpoint of {program.source.model} has no place for them; leave the "
                f"pass out, and load the checkpoint with dtype=torch.bfloat16 or torch.float16"
            )
        model = source_model(program)
        _move_biases(model, program.source)
        if _is_pretrained(model):
            pretrained: Any = model
            with _no_progress_bars():
                pretrained.save_pretrained(folder)
        else:
            save_model(model, str(folder / _WEIGHTS))
        sites, _ = find_sites(program)
        masks = dict(_masks(program, sites))
        if masks:
            save_file(masks, folder / _MASKS)
        names = tuple(name for name in program.interface.names if not is_label(name))
        given = copy.deepcopy(program)
        given.drop_inputs(frozenset(program.interface.names) - frozenset(names))
        outputs = tuple(
            name
            for name, leaf in zip(given.interface.output_names, given.output.args[0], strict=True)  # type: ignore[arg-type]
            if leaf is not None
        )
        dtypes = {str(value.dtype) for value in model.parameters() if value.is_floating_point()}
        record = {
            "format": _FORMAT,
            "pretrained": _is_pretrained(model),
            "model": program.source.model,
            "factory": program.source.factory,
            "options": dict(program.source.options),
            "dtype": dtypes.pop().removeprefix("torch.") if len(dtypes) == 1 else "float32",
            "constants": dict(program.interface.constants),
            "inputs": list(names),
            "outputs": list(outputs),
        }
        (folder / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        files = sorted(path.name for path in folder.iterdir())
        files.sort(key=lambda name: not name.startswith("model"))
        return Lowered(tuple(files), names, outputs, _coverage(program, sites))

    def open(self, folder: Path, threads: int | None = None) -> Run:
        """Load the checkpoint as anyone does.

        Raises:
            LoweringError: It is missing or damaged, or ``semi_structured`` is set and there is no GPU for it or no weight.
        """
        device = _gpu() if self.semi_structured else torch.device("cpu")
        record = read_record(folder / _RECORD, _FORMAT)
        model = _load(folder, record).to(device)
        if self.semi_structured:
            _make_semi_structured(model.half())

        @torch.no_grad()
        def run(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            missing = [name for name in record["inputs"] if name not in inputs]
            if missing:
                raise LoweringError(f"input {missing[0]!r} is missing; the model takes {', '.join(record['inputs'])}")
            given = {name: torch.from_numpy(np.asarray(inputs[name])).to(device) for name in record["inputs"]}
            if self.semi_structured:
                given = {name: value.half() if value.is_floating_point() else value for name, value in given.items()}
            before = torch.get_num_threads()
            torch.set_num_threads(threads or before)
            try:
                found = dict(_leaves(model(**given, **record["constants"])))
            finally:
                torch.set_num_threads(before)
            return {name: _to_numpy(found[name]) for name in record["outputs"] if name in found}

        return run

    def weights(self, folder: Path, layouts: Mapping[str, str]) -> dict[str, StoredWeight]:
        """Read weights by site name out of the loaded checkpoint, as float32."""
        held = dict(_load(folder, read_record(folder / _RECORD, _FORMAT)).named_parameters(remove_duplicate=False))
        return {
            name: StoredWeight(_to_numpy(to_logical(held[name].detach(), Layout(layout))))
            for name, layout in layouts.items()
            if name in held
        }


def _to_numpy(value: Tensor) -> np.ndarray:
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).numpy()


def _is_pretrained(model: nn.Module) -> bool:
    return hasattr(model, "save_pretrained") and hasattr(type(model), "from_pretrained")


def _leaves(output: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors of an output by the names that ``Interface.output_names`` gives them."""
    if isinstance(output, Tensor):
        yield path or "output", output
    elif isinstance(output, Mapping):
        for key, item in output.items():
            yield from _leaves(item, f"{path}_{key}" if path else str(key))
    elif isinstance(output, (tuple, list)):
        for index, item in enumerate(output):
            yield from _leaves(item, f"{path or 'output'}_{index}")


def _masks(program: Program, sites: tuple[Site, ...]) -> Iterator[tuple[str, Tensor]]:
    """Masks by parameter name, bool, True = kept: False where a whole unit of the pattern that the weight was pruned to is zero."""
    for site in sites:
        node = program.attribute(site.name)
        pruned = None if node is None else program.annotation(node, Pruned)
        if pruned is not None:
            weight = program.tensor(site.name).detach()
            pattern = parse_pattern(pruned.pattern).bound(kernel=site.kernel, groups=site.groups)
            kept = pattern.locked(to_logical(weight, site.layout) == 0)
            yield site.name, from_logical(kept, site.layout, tuple(weight.shape)).contiguous()


def _coverage(program: Program, sites: tuple[Site, ...]) -> dict[str, tuple[str, ...]]:
    """Weights by the format whose values they have, and those whose operators read float where the Program read integers."""
    found: dict[str, list[str]] = {"float": []}
    for site in sites:
        node = program.attribute(site.name)
        record = None if node is None else program.annotation(node, Dequantized)
        kind = "float" if record is None or not record.scheme else parse_scheme(record.scheme).dtype.value
        found.setdefault("float" if kind == "float" else f"{kind} values in float", []).append(site.name)
        if record is not None and record.quantized_inputs:
            found.setdefault("activations: float", []).append(site.name)
    return {kind: tuple(names) for kind, names in found.items()}


# -- batch normalization ----------------------------------------------------------------------------------------------


def _move_biases(model: nn.Module, source: Source) -> None:
    """Let normalizations that ``fold-conv-bn`` took away add the biases that it made, for which the class has no parameter.

    Before: ``normalize(conv(x) + bias)``, where normalizing changes nothing.  After: ``normalize(conv(x))`` with the mean ``-bias``.
    """
    with torch.device("meta"):
        known = dict(build_source(source, copy.deepcopy(getattr(model, "config", None))).named_parameters())
    added = {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, _CONVOLUTIONS) and module.bias is not None and f"{name}.bias" not in known
    }
    if not added:
        return
    followers = _followers(model, source)
    for convolution, name in added.items():
        follower = followers.get(convolution)
        if follower is None or convolution.bias is None or follower.running_mean is None:
            raise LoweringError(
                f"{name}.bias, which fold-conv-bn made, has no place in {source.model}, and no normalization reads what the convolution "
                f"gives; leave fold-conv-bn out"
            )
        with torch.no_grad():
            follower.running_mean.copy_(-convolution.bias)
        convolution.bias = None


@torch.no_grad()
def _followers(model: nn.Module, source: Source) -> dict[nn.Module, _BatchNorm]:
    """The batch normalization that reads each convolution's result, seen while the model runs once on the traced shapes."""
    made: dict[int, tuple[nn.Module, Tensor]] = {}  # with the tensors, so that none of their ids is used again
    found: dict[nn.Module, _BatchNorm] = {}

    def remember(module: nn.Module, _: object, output: Tensor) -> None:
        made[id(output)] = module, output

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, _BatchNorm) and id(inputs[0]) in made:
            found[made[id(inputs[0])][0]] = module

    hooks = [item.register_forward_hook(remember) for item in model.modules() if isinstance(item, _CONVOLUTIONS)]
    hooks += [item.register_forward_pre_hook(look) for item in model.modules() if isinstance(item, _BatchNorm)]
    traced: Any = source.trace
    inputs = {
        name: torch.zeros(item["shape"], dtype=getattr(torch, item["dtype"])) for name, item in traced["inputs"].items()
    }
    try:
        model(**inputs, **traced["constants"])
    finally:
        for hook in hooks:
            hook.remove()
    return found


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing bars while a checkpoint is written or read."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


# -- loading ----------------------------------------------------------------------------------------------------------


def _load(folder: Path, record: Mapping[str, Any]) -> nn.Module:
    if not record["pretrained"]:
        model = build_source(Source(record["model"], record["factory"], {}), None).to(getattr(torch, record["dtype"]))
        try:
            load_model(model, str(folder / _WEIGHTS), strict=True)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise LoweringError(f"{folder / _WEIGHTS} does not load: {error}; export it again") from error
        return model.eval()
    kind = resolve(record["model"])
    try:
        with _no_progress_bars():
            model, info = kind.from_pretrained(
                folder,
                dtype=getattr(torch, record["dtype"]),
                local_files_only=True,
                output_loading_info=True,
                **record.get("options", {}),
            )
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise LoweringError(f"the checkpoint in {folder} does not load: {error}; export it again") from error
    odd = sorted((*info["missing_keys"], *info["unexpected_keys"]))
    if odd:
        raise LoweringError(
            f"the checkpoint in {folder} does not fit {record['model']}, for example {odd[0]}; export it again"
        )
    return model.eval()  # type: ignore[no-any-return]


# -- semi-structured matrices -----------------------------------------------------------------------------------------


def _gpu() -> torch.device:
    if not torch.cuda.is_available():
        raise LoweringError(
            "semi_structured=true needs an NVIDIA GPU, and torch finds none; leave the option out to run on the CPU, where zeros are "
            "stored and multiplied"
        )
    if torch.cuda.get_device_capability() < (8, 0):
        raise LoweringError(
            f"semi_structured=true needs compute capability 8.0, and this GPU has {torch.cuda.get_device_capability()}; leave it out"
        )
    return torch.device("cuda")


def _make_semi_structured(model: nn.Module) -> None:
    """Replace the weights of linear layers that are 2:4 sparse, and of a size that the kernels take."""
    changed = 0
    for module in model.modules():
        if not isinstance(module, nn.Linear):
            continue
        weight = module.weight.detach()
        fits = weight.shape[0] % _ROWS == 0 and weight.shape[1] % _COLUMNS == 0
        if fits and int((weight != 0).view(-1, 4).sum(1).max()) <= 2:
            sparse: Any = torch.sparse.to_sparse_semi_structured(weight)
            module.weight = nn.Parameter(sparse, requires_grad=False)
            changed += 1
    if not changed:
        raise LoweringError(
            f"semi_structured=true, but no linear layer's weight is 2:4 sparse with sizes that are multiples of {_ROWS} and {_COLUMNS}; "
            f"prune with pattern=2:4, or leave the option out"
        )
