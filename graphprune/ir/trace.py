"""Trace a model into a Program through ``torch.export``, and prove that the Program computes the same."""

from __future__ import annotations

import inspect
import logging
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphprune.errors import TraceError, suggest
from graphprune.ir.blocks import FLAGS, holder_tree
from graphprune.ir.examples import add_labels, add_optional_inputs, default_inputs
from graphprune.ir.interface import Fill, Input, Interface, is_label, source_signature
from graphprune.ir.normalize import normalize
from graphprune.ir.parity import check_parity
from graphprune.ir.program import Program
from graphprune.ir.source import Source, constructor_options
from graphprune.ir.verifier import verify

_SIZE_NAMES = ("b", "s", "t", "u", "v", "w", "x", "y", "z")


def trace(
    model: nn.Module,
    example_inputs: Mapping[str, object] | tuple[object, ...] | Tensor | None = None,
    dynamic_shapes: Mapping[str, object] | None = None,
    *,
    labels: bool = False,
    factory: str | None = None,
    check: bool = True,
    **constants: object,
) -> Program:
    """Trace a model once into a Program.

    Args:
        model: Any module that ``torch.export`` traces. It keeps its mode and values; the Program shares its parameters.
        example_inputs: Tensors by argument name, or positional. Default: a Hugging Face model's own ``dummy_inputs``,
            with the masks and type ids that it takes.
        dynamic_shapes: As for ``torch.export.export``. Default: dimension 0 of every input is dynamic, and dimension 1 of
            integer inputs (batch and sequence). ``{}`` fixes every size.
        labels: Add the labels that ``forward`` takes to the example inputs, so that the Program returns a loss.
        factory: ``package.module:function`` that builds the model, so that a saved Program of a model without a Hugging
            Face config can be loaded.
        check: Compare the Program with the model, in eval mode and in train mode without dropout.
        **constants: Arguments of ``forward`` that are no tensors, such as ``output_hidden_states=True``.

    Returns:
        The Program, in the model's mode.

    Raises:
        TraceError: The model cannot be traced (the message names its line), or the Program computes something else.
    """
    was_training = model.training
    signature = source_signature(model)
    model.eval()
    try:
        inputs, fills = _example(model, example_inputs, labels, constants)
        if "use_cache" in signature:
            constants.setdefault("use_cache", False)  # a cache object is no tensor; torch.export refuses it
        model.train()
        with _buffers_restored(model), _quiet():
            exported = _export(model, inputs, constants, dynamic_shapes)
        program = _build(model, exported, inputs, fills, constants, factory)
        verify(program)
        if check and not any(value.is_meta for value in (*inputs.values(), *model.parameters())):
            check_parity(model, program, {**inputs, **constants})
    finally:
        model.train(was_training)
    program.train(was_training)
    return program


def _keyword_catcher(model: nn.Module) -> str | None:
    """Name of ``forward``'s ``**kwargs``, if it has one."""
    parameters = inspect.signature(model.forward).parameters.items()
    return next((name for name, item in parameters if item.kind is inspect.Parameter.VAR_KEYWORD), None)


def _example(
    model: nn.Module,
    example_inputs: Mapping[str, object] | tuple[object, ...] | Tensor | None,
    labels: bool,
    constants: dict[str, object],
) -> tuple[dict[str, Tensor], dict[str, Fill]]:
    """Example tensors by name, each its own object (export takes one tensor given twice for one input)."""
    fills: dict[str, Fill] = {}
    if example_inputs is None:
        inputs = default_inputs(model)
        fills = add_optional_inputs(model, inputs)
    else:
        if isinstance(example_inputs, Tensor):
            example_inputs = (example_inputs,)
        if not isinstance(example_inputs, Mapping):
            example_inputs = _by_name(model, example_inputs)
        inputs = {}
        for name, value in example_inputs.items():
            if isinstance(value, Tensor):
                inputs[name] = value
            elif isinstance(value, (tuple, list, dict)):
                raise TraceError(f"input {name!r} is a {type(value).__name__}; give each tensor an argument of its own")
            elif value is not None:
                constants.setdefault(name, value)
    if labels and not any(is_label(name) for name in inputs):
        add_labels(model, inputs)
    _check_arguments(model, {**inputs, **constants})
    order = {name: index for index, name in enumerate(source_signature(model))}
    ordered = sorted(inputs, key=lambda name: (is_label(name), order.get(name, 99)))
    return {name: inputs[name].clone() for name in ordered}, fills


def _by_name(model: nn.Module, values: tuple[object, ...]) -> dict[str, object]:
    signature = source_signature(model)
    if len(values) > len(signature):
        raise TraceError(
            f"{len(values)} example inputs given; {type(model).__name__}.forward takes {', '.join(signature)}"
        )
    return dict(zip(signature, values, strict=False))


def _check_arguments(model: nn.Module, arguments: Mapping[str, object]) -> None:
    signature = source_signature(model)
    unknown = [name for name in arguments if name not in signature]
    if unknown and _keyword_catcher(model) is None:
        raise TraceError(
            f"{type(model).__name__}.forward takes no argument {unknown[0]!r}{suggest(unknown[0], signature)}"
        )
    try:
        inspect.signature(model.forward).bind(**arguments)
    except TypeError as error:
        raise TraceError(f"{type(model).__name__}.forward: {error}; give it in example_inputs") from None


def _export(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    constants: Mapping[str, object],
    dynamic_shapes: Mapping[str, object] | None,
) -> torch.export.ExportedProgram:
    shapes = []
    for name, value in inputs.items():
        if dynamic_shapes is not None:
            shapes.append(dynamic_shapes.get(name))
        else:
            last = 1 if value.is_floating_point() else 2
            shapes.append(dict.fromkeys(range(min(last, value.dim())), torch.export.Dim.AUTO))
    try:
        with _bound(model, tuple(inputs), constants):
            return torch.export.export(model, tuple(inputs.values()), dynamic_shapes=tuple(shapes), strict=False)
    except Exception as error:  # export raises whatever the model's code or its own stages raise
        raise TraceError(_explain(model, error)) from error


@contextmanager
def _bound(model: nn.Module, names: tuple[str, ...], constants: Mapping[str, object]) -> Iterator[None]:
    """Let ``forward`` take exactly the traced tensors, with the constants filled in, while export looks at it."""
    original = model.forward
    patched = model.__dict__.get("forward")

    def forward(*values: Tensor) -> Any:
        return original(**dict(zip(names, values, strict=True)), **constants)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        if patched is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = patched


def _explain(model: nn.Module, error: Exception) -> str:
    torch_home = str(Path(torch.__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((torch_home, __file__, inspect.__file__))
    ]
    where = ""
    if frames:
        where = f" at {frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}: {frames[-1].line}"
    first_line = (str(error).strip().splitlines() or [""])[0]
    return (
        f"{type(model).__name__} cannot be traced{where}. {type(error).__name__}: {first_line}. "
        f"A trace has no control flow that depends on tensor values and takes tensors as inputs: rewrite that line with "
        f"tensor operators (torch.where, torch.cond), or pass example_inputs, dynamic_shapes or constants that avoid it"
    )


def _build(
    model: nn.Module,
    exported: torch.export.ExportedProgram,
    inputs: Mapping[str, Tensor],
    fills: Mapping[str, Fill],
    constants: Mapping[str, object],
    factory: str | None,
) -> Program:
    module: Any = exported.module()
    spec = exported.call_spec.out_spec
    dtype = next((item.dtype for item in model.parameters() if item.is_floating_point()), torch.float32)
    graph = normalize(module, inputs, dtype)
    root = holder_tree(model)
    _keep_constants(module, root, graph)
    _merge_tied(root, graph)
    placeholders = {node.target: node for node in graph.nodes if node.op == "placeholder"}
    names = _name_sizes(list(placeholders.values()))
    interface = Interface(
        parameters=tuple(dict.fromkeys((*source_signature(model), *inputs))),
        inputs=tuple(
            Input(name, value.dtype, _shape(placeholders[name], names), fills.get(name))
            for name, value in inputs.items()
        ),
        constants=dict(constants),
        output=spec,
    )
    options: dict[str, object] = {
        "inputs": {name: {"shape": list(value.shape), "dtype": str(value.dtype)[6:]} for name, value in inputs.items()},
        "constants": dict(constants),
    }
    kind = type(model)
    return Program(
        root,
        graph,
        name=_snake_case(kind.__name__),
        interface=interface,
        source=Source(f"{kind.__module__}:{kind.__qualname__}", factory, options, constructor_options(model)),
        config=getattr(model, "config", None),
    )


def _keep_constants(module: fx.GraphModule, root: nn.Module, graph: fx.Graph) -> None:
    """Register tensors that tracing lifted out of the code as buffers that are not saved, so that they move with ``to``."""
    for node in graph.nodes:
        if node.op != "get_attr" or node.target in FLAGS:
            continue
        owner, _, leaf = node.target.rpartition(".")
        try:
            holder = root.get_submodule(owner)
        except AttributeError:
            raise TraceError(f"the trace refers to {node.target}, which the model does not have") from None
        if not hasattr(holder, leaf):
            value = getattr(module.get_submodule(owner), leaf)
            if not isinstance(value, Tensor):
                raise TraceError(
                    f"the trace holds {node.target}, a nested graph; the model uses control flow that graphprune cannot flatten"
                )
            holder.register_buffer(leaf, value.detach().clone(), persistent=False)


def _merge_tied(root: nn.Module, graph: fx.Graph) -> None:
    """Give a tied parameter one node, under the first of its names, which ``named_parameters`` shows too."""
    first = {id(value): name for name, value in root.named_parameters()}
    kept: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "get_attr" or node.target in FLAGS:
            continue
        owner, _, leaf = node.target.rpartition(".")
        node.target = first.get(id(getattr(root.get_submodule(owner), leaf)), node.target)
        if node.target in kept:
            node.replace_all_uses_with(kept[node.target])
            graph.erase_node(node)
        else:
            kept[node.target] = node


def _name_sizes(placeholders: list[fx.Node]) -> dict[str, str]:
    """Letters for dynamic sizes, in order of first appearance: b for the batch, s for the sequence, ...

    Dimension 0 of every input is the batch wherever it had one size in the example, also where the model's operators would
    let it differ (a mask that is broadcast).
    """
    names: dict[str, str] = {}
    batch = next((node.meta["val"].shape[0] for node in placeholders if node.meta["val"].dim()), None)
    for node in placeholders:
        for dim, size in enumerate(node.meta["val"].shape):
            if isinstance(size, int) or str(size) in names:
                continue
            if dim == 0 and not isinstance(batch, int) and batch is not None and size.node.hint == batch.node.hint:
                names[str(size)] = names.get(str(batch), _SIZE_NAMES[0])
            else:
                used = len(set(names.values()))
                names[str(size)] = _SIZE_NAMES[used] if used < len(_SIZE_NAMES) else f"d{used}"
    return names


def _shape(node: fx.Node, names: Mapping[str, str]) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else names[str(size)] for size in node.meta["val"].shape)


@contextmanager
def _buffers_restored(model: nn.Module) -> Iterator[None]:
    saved = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(saved[name])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence export's notes about shapes; what matters of them reaches the caller as an error."""
    names = ("torch.export", "torch._export", "torch.fx.experimental.symbolic_shapes")
    loggers = [logging.getLogger(name) for name in names]
    levels = [item.level for item in loggers]
    for item in loggers:
        item.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for item, level in zip(loggers, levels, strict=True):
            item.setLevel(level)


def _snake_case(name: str) -> str:
    """``BertForQuestionAnswering`` to ``bert_for_question_answering``."""
    return "".join(
        ("_" if index and letter.isupper() and not name[index - 1].isupper() else "") + letter.lower()
        for index, letter in enumerate(name)
    )
