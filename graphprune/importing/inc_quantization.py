"""Neural Compressor's quantization configurations, of YAML and of config objects, as passes."""

from __future__ import annotations

from dataclasses import dataclass, field

from graphprune.importing.document import Node
from graphprune.importing.draft import Options, Step
from graphprune.importing.fields import Fields, Ledger

_APPROACHES = {
    "post_training_static_quant": "static",
    "static": "static",
    "post_training_dynamic_quant": "dynamic",
    "dynamic": "dynamic",
    "quant_aware_training": "aware",
    "aware_training": "aware",
    "auto": "auto",
}
_KINDS = {
    "Linear": "linear",
    "Conv2d": "conv",
    "Conv1d": "conv",
    "Conv3d": "conv",
    "Embedding": "embedding",
    "MatMul": "matmul",
}
_KINDS |= {"Conv": "conv", "matmul": "matmul", "linear": "linear", "embedding": "embedding"}
_SAMPLES = "the data and its size are given when the recipe is run: --data FILE --samples N"
_TUNING = "graphprune tune quantizes as far as a metric allows: --relative 0.01, --max-trials 100"
_NODES = (
    "pre_post_process_quantization",
    "add_qdq_pair_to_weight",
    "optypes_to_exclude_output_quant",
    "dedicated_qdq_pair",
)
_ROUNDING = ("rtn_args", "awq_args", "gptq_args", "teq_args", "autoround_args")


@dataclass
class Plan:
    """What is asked for."""

    approach: str
    options: Options = field(default_factory=dict)
    rules: list[str] = field(default_factory=list)
    smooth: Options | None = None
    correct: bool = False

    def steps(self) -> list[Step]:
        """The passes, in order."""
        options = {**self.options, **({"rules": self.rules} if self.rules else {})}
        smooth = [] if self.smooth is None else [Step("smooth-quant", self.smooth)]
        if self.approach == "dynamic":
            kept = {key: value for key, value in options.items() if key not in ("preset", "activations", "observer")}
            return [*smooth, Step("dynamic-quant", kept)]
        if self.approach == "aware":
            plan = [Step("annotate-quant", {**options, "observer": "moving-average-min-max"})] if options else []
            return [*plan, Step("insert-fake-quant")]
        steps = [
            *smooth,
            Step("annotate-quant", options),
            Step("insert-observers"),
            Step("calibrate"),
            Step("insert-fake-quant"),
        ]
        return [*steps, *([Step("bias-correct")] if self.correct else []), Step("freeze-quant")]


def yaml_plan(node: Node, path: str, ledger: Ledger) -> Plan:
    """The section ``quantization`` of a YAML file."""
    fields = Fields(node, path, ledger)
    plan = Plan(_approach(fields, "approach", "post_training_static_quant"))
    _part(fields, "calibration", _SAMPLES)
    model = fields.take("model_wise")
    if model is not None:
        _model_wise(Fields(model, fields.at("model_wise"), ledger), plan)
    _operators(fields, "op_wise", "name", plan)
    _recipes(fields, plan)
    fields.drop(
        "a fixed plan is not weighed against others: graphprune tune does", "optimization_level", unless=(None, 1)
    )
    _part(fields, "train", "give the training tool its data; its other settings stand in training")
    fields.close()
    return plan


def object_plan(node: Node, path: str, ledger: Ledger) -> Plan:
    """``PostTrainingQuantConfig`` and ``QuantizationAwareTrainingConfig``."""
    fields = Fields(node, path, ledger)
    aware = node.tag == "QuantizationAwareTrainingConfig"
    plan = Plan("aware" if aware else _approach(fields, "approach", "static"))
    if fields.text("backend") == "ipex":
        plan.options["preset"] = "ipex"
    elif fields.text("backend") not in (None, "default"):
        fields.refuse("backend", "name a target where the recipe is exported")
    fields.drop(_SAMPLES, "calibration_sampling_size", "example_inputs")
    if fields.flag("reduce_range"):
        plan.options["reduce_range"] = True
    _operators(fields, "op_type_dict", "type", plan)
    _operators(fields, "op_name_dict", "name", plan)
    _recipes(fields, plan)
    fields.drop(
        _TUNING, "quant_level", "tuning_criterion", "accuracy_criterion", "diagnosis", unless=(None, "auto", 0, False)
    )
    fields.drop("cast-mixed casts to 16 bits; without it nothing is cast", "use_bf16", unless=(None, False))
    if fields.texts("excluded_precisions"):
        fields.ledger.note("excluded_precisions: nothing is cast to 16 bits without cast-mixed")
    fields.drop("the target's option form chooses it", "quant_format", unless=(None, "default"))
    fields.drop("operators are found in the graph", "domain", unless=(None, "auto"))
    fields.describe("the source is for", "device", "model_name", "framework")
    fields.drop("names of the model stay", "inputs", "outputs", unless=(None, []))
    fields.close()
    return plan


def mixed_steps(node: Node, path: str, ledger: Ledger) -> list[Step]:
    """``MixedPrecisionConfig``."""
    fields = Fields(node, path, ledger)
    precisions = fields.texts("precisions", "precision") or ("bf16",)
    if len(precisions) > 1 or precisions[0] not in ("bf16", "fp16"):
        fields.refuse(
            fields.name_of("precisions", "precision"), f"{list(precisions)}: one of bf16 and fp16; bf16 was taken"
        )
    fields.describe("the source is for", "device", "backend")
    fields.close()
    return [Step("cast-mixed", {"dtype": "float16"} if precisions[0] == "fp16" else {})]


def _approach(fields: Fields, name: str, default: str) -> str:
    said = fields.text(name) or default
    found = _APPROACHES.get(said)
    if found is None:
        fields.refuse(name, f"no approach {said!r} is known; static quantization was taken")
        return "static"
    if found == "auto":
        fields.refuse(name, "static or dynamic has to be chosen; static quantization was taken")
        return "static"
    return found


def _part(fields: Fields, name: str, reason: str) -> None:
    if fields.take(name) is not None:
        fields.refuse(name, reason)


def _model_wise(fields: Fields, plan: Plan) -> None:
    for name, option in (("weight", "weights"), ("activation", "activations")):
        node = fields.take(name)
        if node is None:
            continue
        part = Fields(node, fields.at(name), fields.ledger)
        text = _scheme(part, activation=name == "activation")
        algorithm = part.text("algorithm")
        if algorithm is not None:
            _algorithm(part, algorithm, name, plan)
        part.close()
        if text is not None:
            plan.options[option] = text
    fields.close()


def _scheme(part: Fields, *, activation: bool) -> str | None:
    """A scheme's text; None where nothing is said."""
    said = [name for name in ("scheme", "dtype", "granularity", "bit") if name in part]
    symmetric = (part.text("scheme") or ("asym" if activation else "sym")) == "sym"
    dtype = part.text("dtype") or ("int8" if symmetric else "uint8")
    axis = (
        "channel"
        if (part.text("granularity") or ("per_tensor" if activation else "per_channel")) == "per_channel"
        else "tensor"
    )
    bits = part.number("bit")
    if bits is not None and bits.value not in (7, 8):
        part.refuse("bit", "8 bits, or 7 with reduce_range")
    if not said:
        return None
    if dtype in ("fp32", "bf16"):
        return "none"
    if dtype not in ("int8", "uint8") or (symmetric and dtype == "uint8"):
        part.refuse("dtype", f"{dtype} is no integer type with this scheme")
        return None
    reduced = ":reduced" if bits is not None and bits.value == 7 else ""
    return f"{dtype}:{'symmetric' if symmetric else 'affine'}:{axis}{reduced}"


def _algorithm(part: Fields, algorithm: str, name: str, plan: Plan) -> None:
    known = {"minmax": "min-max", "kl": "histogram-kl"}
    if algorithm not in known:
        part.refuse("algorithm", f"no observer {algorithm!r}; there are minmax and kl")
    elif name == "activation":
        plan.options["observer"] = known[algorithm]
    elif algorithm != "minmax":
        part.refuse("algorithm", "weights take their whole range")


def _operators(fields: Fields, name: str, kind: str, plan: Plan) -> None:
    """What is said of single operators: those that stay in float are rules; schemes of their own are listed."""
    node = fields.take(name)
    for operator, item in (node.mapping if node is not None else {}).items():
        path = f"{fields.at(name)}.{operator}"
        types = {str(value) for part in item.mapping.values() for value in _listed(part.mapping.get("dtype"))}
        if not types or not types <= {"fp32", "bf16"}:
            fields.ledger.add(item.line, path, "write a rule of annotate-quant: weights=... activations=...")
        elif kind == "type" and operator in _KINDS:
            plan.rules.append(f"op {_KINDS[operator]}: off")
        elif kind == "type":
            plan.rules.append(f"type {operator}: off")
        else:
            plan.rules.append(f"name re:{operator}: off")


def _listed(node: Node | None) -> list[object]:
    if node is None:
        return []
    return [item.value for item in node.items] or [node.value]


def _recipes(fields: Fields, plan: Plan) -> None:
    node = fields.take("recipes")
    if node is None:
        return
    inner = Fields(node, fields.at("recipes"), fields.ledger)
    arguments = inner.take("smooth_quant_args")
    if inner.flag("smooth_quant"):
        plan.smooth = {}
        if arguments is not None:
            smooth = Fields(arguments, inner.at("smooth_quant_args"), fields.ledger)
            alpha = smooth.plain("alpha")
            if isinstance(alpha, (int, float, str)):
                plan.smooth["alpha"] = alpha
            elif alpha is not None:
                smooth.refuse("alpha", "one number, or auto")
            if smooth.flag("folding") is False:
                plan.smooth["folding"] = False
            smooth.close()
    plan.correct = bool(inner.flag("fast_bias_correction"))
    if inner.flag("last_conv_or_matmul_quantization") is False:
        plan.options["include_last"] = False
    inner.drop("weights are not corrected; bias-correct corrects biases", "weight_correction", unless=(None, False))
    inner.drop(
        "write a rule of annotate-quant: name FIRST: off", "first_conv_or_matmul_quantization", unless=(None, True)
    )
    inner.drop("nodes between operators are the target's business", "gemm_to_matmul", unless=(None, True))
    inner.drop("nodes between operators are the target's business", *_NODES, unless=(None, False, [], True))
    inner.drop("weights are quantized as a whole", "layer_wise_quant", unless=(None, False))
    inner.drop("weights are rounded to the nearest", *_ROUNDING, unless=(None, {}))
    inner.close()
