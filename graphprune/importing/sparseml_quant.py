"""Quantization modifiers of SparseML as annotate-quant, insert-fake-quant and smooth-quant."""

from __future__ import annotations

import re
from collections.abc import Mapping

from graphprune.importing.draft import Options, Step
from graphprune.importing.fields import Fields
from graphprune.importing.sparseml_plan import Origin, Plan, Quantizing, end_of, start_of
from graphprune.importing.sparseml_pruning import select_text

NEVER = (
    "LayerNorm",
    "Tanh",
    "Softmax",
    "Dropout",
    "GELU",
    "GELUActivation",
    "ReLU",
    "SiLU",
    "BatchNorm1d",
    "BatchNorm2d",
)
"""Modules that graphprune does not quantize; to leave them out says nothing."""
_KINDS = {"Embedding": "embedding", "Linear": "linear", "Conv1d": "conv", "Conv2d": "conv", "Conv3d": "conv"}
_KINDS |= {"QATMatMul": "matmul", "MatMul": "matmul"}
_SCHEMES: dict[str, Options] = {
    "default": {},
    "deepsparse": {},
    "tensorrt": {"preset": "tensorrt", "weights": "int8:symmetric:tensor", "observer": "moving-average-min-max"},
}
_ALIASES: dict[str, Options] = {
    "W8A8": {"weights": "int8:symmetric:channel", "activations": "int8:symmetric:tensor"},
    "INT8": {"weights": "int8:symmetric:channel", "activations": "int8:symmetric:tensor"},
    "W8A16": {"weights": "int8:symmetric:channel", "activations": "none"},
    "W4A16": {"weights": "int4:symmetric:channel:group128", "activations": "none"},
    "W4A16_ASYM": {"weights": "uint4:affine:channel:group128", "activations": "none"},
}
_OUTPUTS = (
    "results of linear layers and embeddings are not quantized by themselves: the operator that reads one quantizes it"
)


def quantization(fields: Fields, plan: Plan) -> None:
    """``QuantizationModifier`` of either generation, and ``GPTQModifier``, whose format is carried."""
    options: Options = {"preset": "deepsparse"}
    rules: list[str] = []
    exclude: list[str] = []
    if fields.path.endswith("GPTQModifier"):
        reason = "weights are rounded to the nearest: graphprune has no compensation of the rounding error"
        fields.ledger.add(fields.node.line, fields.path, reason)
        fields.drop("it steers the compensation of the rounding error", "block_size", "dampening_frac", "actorder")
        fields.drop("layers are quantized at once", "sequential_update", "sequential_targets", unless=(None, False))
    _scheme(fields, options, rules)
    _legacy(fields, options, rules)
    _ignored(fields, rules, exclude)
    submodules = fields.texts("submodules")
    if submodules:
        options["select"] = [f"re:^{re.escape(name)}\\." for name in submodules]
    targets = [text for text in fields.texts("targets") or () if text != "Linear"]
    if targets:
        fields.refuse("targets", "only Linear layers are meant here; choose others with annotate-quant's rules")
    before = [Step("expand-attention")]
    if fields.text("model_fuse_fn_name") != "no_fuse":
        before.insert(0, Step("fold-conv-bn"))
    fields.drop("fold-conv-bn takes none", "model_fuse_fn_kwargs", unless=(None, {}))
    strict = fields.flag("strict")
    if strict is not None:
        fields.ledger.note("strict: a name that matches nothing is always an error here")
    if not plan.one_shot:
        fields.drop("while training, observers follow the training data", "num_calibration_steps")
    if end_of(fields) is not None:
        fields.refuse(fields.name_of("end_epoch", "end"), "quantization stays to the end of its stage")
    shape: Options = {**({"rules": rules} if rules else {}), **({"exclude": exclude} if exclude else {})}
    plan.quantizing.append(
        Quantizing(
            Origin.of(fields, "start_epoch", "start"),
            start_of(fields),
            tuple(before),
            Step("annotate-quant", {**options, **shape}),
            fields.number("disable_quantization_observer_epoch"),
            fields.number("freeze_bn_stats_epoch"),
            fields.number("num_calibration_steps"),
        )
    )


def smooth_quant(fields: Fields, plan: Plan) -> None:
    """``SmoothQuantModifier``."""
    options: Options = {}
    strength = fields.number("smoothing_strength")
    if strength is not None and (strength.text or strength.value != 0.5):
        options["alpha"] = strength.plain()
    fields.drop("which layer feeds which is found in the graph", "mappings")
    fields.drop("the calibration data is given when the recipe is run", "num_calibration_steps", "calibration_function")
    ignore = fields.texts("ignore")
    if ignore:
        options["exclude"] = [select_text(text) for text in ignore]
    plan.smoothing.append(Step("smooth-quant", options))


def _scheme(fields: Fields, options: Options, rules: list[str]) -> None:
    """``scheme``, ``scheme_overrides`` and ``config_groups``."""
    node = fields.take("scheme")
    if node is not None and node.mapping:
        options.update(_schemes(Fields(node, fields.at("scheme"), fields.ledger, fields.scope)))
    elif node is not None:
        _named_scheme(fields, "scheme", str(fields.text("scheme")), options)
    overrides = fields.take("scheme_overrides")
    for name, item in (overrides.mapping if overrides is not None else {}).items():
        path = f"{fields.at('scheme_overrides')}.{name}"
        said: Options = {}
        if item.mapping:
            said = _schemes(Fields(item, path, fields.ledger, fields.scope))
        elif isinstance(item.value, str):
            fields.ledger.add(item.line, path, "write the scheme out: weights=..., activations=...")
            continue
        changes = " ".join(f"{key}={value}" for key, value in said.items() if key in ("weights", "activations"))
        if item.value is None and name in NEVER:
            fields.ledger.note(f"{name} is never quantized here")
        else:
            rules.append(f"{_subject(name)}: {changes or 'off'}")
    groups = fields.take("config_groups")
    for index, (name, item) in enumerate((groups.mapping if groups is not None else {}).items()):
        path = f"{fields.at('config_groups')}.{name}"
        group = Fields(item, path, fields.ledger, fields.scope)
        targets = group.texts("targets") or ("Linear",)
        said = _schemes(group)
        if index == 0:
            options.update(said)
            continue
        changes = " ".join(f"{key}={value}" for key, value in said.items() if key in ("weights", "activations"))
        rules.extend(f"{_subject(target)}: {changes or 'off'}" for target in targets)


def _named_scheme(fields: Fields, name: str, said: str, options: Options) -> None:
    found = _SCHEMES.get(said) if said in _SCHEMES else _ALIASES.get(said.upper())
    if found is None:
        fields.refuse(name, f"no scheme {said!r}; write weights, input_activations and output_activations out")
    else:
        options.update(found)


def _schemes(fields: Fields) -> Options:
    """``weights``, ``input_activations`` and ``output_activations`` as annotate-quant's options; reads the whole part."""
    found: Options = {}
    for theirs, mine in (("weights", "weights"), ("input_activations", "activations")):
        if theirs not in fields:
            continue
        node = fields.take(theirs)
        said = "none" if node is None else _text(Fields(node, fields.at(theirs), fields.ledger, fields.scope), mine)
        if said is not None:
            found[mine] = said
    node = fields.take("output_activations")
    if node is not None:
        found["outputs"] = True
        fields.refuse("output_activations", f"outputs=true quantizes results of convolutions and sums; {_OUTPUTS}")
    fields.close()
    return found


def _text(fields: Fields, kind: str) -> str | None:
    """A scheme's text; None, and listed, where it has no equivalent."""
    bits = fields.number("num_bits")
    symmetric = fields.flag("symmetric")
    strategy = fields.text("strategy") or (
        "tensor" if kind == "activations" else "channel" if "group_size" in fields else "tensor"
    )
    group = fields.number("group_size")
    fields.drop("only integers are quantized to", "type", unless=(None, "int"))
    dynamic = fields.flag("dynamic")
    fields.drop("observers are chosen by annotate-quant's observer", "observer", "observer_kwargs", unless=(None, {}))
    fields.drop("it has no equivalent", "kwargs", "block_structure", "actorder", unless=(None, {}))
    fields.close()
    width = 8 if bits is None else int(bits.value)
    if width not in ((8,) if kind == "activations" else (4, 8)):
        fields.refuse("num_bits", f"{width} bits are not among those that graphprune has for {kind}")
        return None
    if kind == "activations":
        if strategy not in ("tensor", "token"):
            fields.refuse("strategy", "activations have one scale a tensor")
        return "uint8:dynamic" if dynamic else "int8:symmetric:tensor" if symmetric else "uint8:affine:tensor"
    sign = "int" if symmetric is not False else "uint"
    sort = "symmetric" if symmetric is not False else "affine"
    axis = "tensor" if strategy == "tensor" else "channel"
    grouped = (
        f":group{int(group.value)}" if group is not None and group.value > 0 and strategy in ("group", "tensor") else ""
    )
    return f"{sign}{width}:{sort}:{'channel' if grouped else axis}{grouped}"


def _legacy(fields: Fields, options: Options, rules: list[str]) -> None:
    """Options of the first generation."""
    if fields.flag("tensorrt"):
        options.update(_SCHEMES["tensorrt"])
    if fields.flag("quantize_embeddings") is False:
        rules.append("op embedding: off")
    for name in ("quantize_linear_activations", "quantize_conv_activations", "quantize_embedding_activations"):
        if fields.flag(name):
            fields.refuse(name, _OUTPUTS)
    if fields.flag("reduce_range"):
        options["reduce_range"] = True
    weights = fields.number("weight_bits")
    if weights is not None and weights.value != 8:
        if weights.value == 4:
            options["weights"] = "int4:symmetric:channel"
        else:
            fields.refuse("weight_bits", "weights have 8 or 4 bits")
    activations = fields.number("activation_bits")
    if activations is not None and activations.value != 8:
        fields.refuse("activation_bits", "activations have 8 bits")
    fields.drop(
        "schemes and observers are options of annotate-quant",
        "activation_qconfig_kwargs",
        "weight_qconfig_kwargs",
        unless=(None, {}),
    )
    fields.drop("operators are found in the graph", "custom_quantizable_module_types", unless=(None, []))
    if fields.flag("exclude_batchnorm") is False:
        fields.refuse(
            "exclude_batchnorm", "batch normalization is folded into the convolution before it, or stays in float"
        )


def _ignored(fields: Fields, rules: list[str], exclude: list[str]) -> None:
    """``ignore`` and ``exclude_module_types``."""
    for option in ("ignore", "exclude_module_types"):
        for name in fields.texts(option) or ():
            if name in NEVER:
                fields.ledger.note(f"{name} is never quantized here; {option} of it was left out")
            elif name.startswith("re:") or "." in name or name[:1].islower():
                exclude.append(select_text(name))
            else:
                rules.append(f"{_subject(name)}: off")


def _subject(name: str) -> str:
    """Whom a rule speaks of: a kind of operator, a name, or a type."""
    if name in _KINDS:
        return f"op {_KINDS[name]}"
    if name.startswith("re:"):
        return f"name {select_text(name)}"
    return f"name re:^{re.escape(name)}\\." if "." in name or name[:1].islower() else f"type {name}"


SCHEME_NAMES: Mapping[str, Options] = {**_SCHEMES, **_ALIASES}
"""Schemes that are known by name."""
