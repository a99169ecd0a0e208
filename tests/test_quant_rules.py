"""annotate-quant: operators chosen by name and kind, and rules that change what is planned for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from graphprune.errors import RecipeError
from graphprune.ir.quant_plan import planned
from graphprune.passes import AnnotateQuant
from tests.planned import plans, residuals
from tests.traced import traced

Golden = Callable[[str, str], None]
WEIGHT, INPUT = "int8:symmetric:channel", "uint8:affine:tensor"


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({"select": ("first",)}, {"first.weight"}),
        ({"select": ("re:^(first|head)",)}, {"first.weight", "head.weight"}),
        ({"exclude": ("*.weight",), "select": ()}, None),
        ({"exclude": ("second.weight",)}, {"first.weight", "head.weight"}),
    ],
)
def test_names(options: dict[str, tuple[str, ...]], taken: set[str] | None) -> None:
    if taken is None:
        with pytest.raises(RecipeError, match="nothing is left"):
            AnnotateQuant(**options).run(traced("mlp"))  # type: ignore[arg-type]
        return
    result = AnnotateQuant(**options).run(traced("mlp"))  # type: ignore[arg-type]
    assert set(result.coverage.matched) == taken
    assert set(result.coverage.left_out) == {"first.weight", "second.weight", "head.weight"} - taken


def test_a_name_that_matches_nothing() -> None:
    for option in ("select", "exclude"):
        message = rf"{option}: 'secnd' matches no quantizable operator; did you mean 'second'"
        with pytest.raises(RecipeError, match=message):
            AnnotateQuant(**{option: ("secnd",)}).run(traced("mlp"))  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="select: 're:\\(' is no regular expression"):
        AnnotateQuant(select=("re:(",)).run(traced("mlp"))


def test_kinds_and_operators() -> None:
    assert set(plans(residuals(), "annotate-quant{ops=[conv]}")) == {"first.weight", "second.weight"}
    assert set(plans(traced("gpt2_conv1d"), "annotate-quant{ops=[addmm]}")) == {"up.weight", "down.weight"}
    tied = plans(
        traced("tied_embedding"), "annotate-quant{preset=ipex,ops=[embedding],embeddings=int8:symmetric:channel}"
    )
    assert set(tied) == {"embedding.weight"}
    with pytest.raises(RecipeError, match="ops: unknown operator 'liner'; did you mean 'linear'"):
        AnnotateQuant(ops=("liner",))


# -- rules ------------------------------------------------------------------------------------------------------------


def test_rules_by_kind_name_and_type() -> None:
    bert = plans(traced("bert_qa"), 'annotate-quant{rules=["op embedding: off"]}')
    assert not [name for name in bert if "embeddings" in name]
    bert = plans(
        traced("bert_qa"), 'annotate-quant{rules=["type BertEmbeddings: off","type *Attention: weights=none"]}'
    )
    assert not [name for name in bert if "embeddings" in name]
    assert bert["bert.encoder.layer.0.attention.self.query.weight"] == f"0@{INPUT}"
    assert bert["bert.encoder.layer.0.intermediate.dense.weight"] == f"0@{INPUT};1@{WEIGHT}"
    text = 'annotate-quant{rules=["name re:layer.1: weights=int8:symmetric:tensor activations=none"]}'
    bert = plans(traced("bert_qa"), text)
    assert bert["bert.encoder.layer.1.intermediate.dense.weight"] == "1@int8:symmetric:tensor"
    assert bert["bert.encoder.layer.0.intermediate.dense.weight"] == f"0@{INPUT};1@{WEIGHT}"


def test_the_later_rule_wins() -> None:
    found = plans(
        traced("mlp"), 'annotate-quant{rules=["op linear: off","name head: on","name head: activations=none"]}'
    )
    assert found == {"head.weight": f"1@{WEIGHT}"}
    with pytest.raises(RecipeError, match="linear operators are off; a rule such as 'op linear: on' takes them"):
        AnnotateQuant(rules=("name head: on", "op linear: off")).run(traced("mlp"))


def test_rules_set_observers_and_outputs() -> None:
    rules = ("name first: observer=percentile(fraction=0.99) weight_observer=mse outputs=off",)
    program = residuals()
    AnnotateQuant(rules=rules).run(program)
    plan = next(plan for _, plan in planned(program) if plan.name == "first.weight")
    assert [(item.position, item.observer) for item in plan.operands] == [(0, "percentile(fraction=0.99)"), (1, "mse")]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("op liner: off", "rule 'op liner: off' matches no quantizable operator; did you mean 'linear'"),
        ("type Linaer: off", "matches no quantizable operator; did you mean 'Linear'"),
        ("name haed: off", "rule 'name haed: off': 'haed' matches no quantizable operator; did you mean 'head'"),
    ],
)
def test_a_rule_that_matches_nothing(rule: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        AnnotateQuant(rules=(rule,)).run(traced("mlp"))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("head off", "rule 'head off' cannot be read; write for example 'op embedding: off'"),
        ("name head: of", "unknown setting 'of'; did you mean 'off'"),
        ("name head: wieghts=none", "unknown setting 'wieghts=none'; did you mean 'weights'"),
        ("name head: weights=int8", "unknown quantization scheme 'int8'"),
        ("name head: weights=dynamic", "'dynamic' is for activations"),
        ("name head: activations=uint8:affine:channel", "rule .*has several scales.*write uint8:affine:tensor"),
        ("name head: observer=mni-max", "unknown observer 'mni-max'; did you mean 'min-max'"),
    ],
)
def test_rules_are_read_when_the_pass_is_made(rule: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        AnnotateQuant(rules=(rule,))
