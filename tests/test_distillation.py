"""Distillation on real models: parts and weights, layers and projections, labels, several teachers, refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

import graphprune as gp
from graphprune.pipeline.stages import DistillationSettings
from graphprune.training import Distillation, TeacherCache, frozen_copy, hardness_weights, logits_loss, loss_weights
from graphprune.training.entries import Entries, count_entries
from graphprune.training.layers import spread_layers
from tests.taught import bert, collate, examples


def batch(kind: str = "sequence", count: int = 4) -> dict[str, torch.Tensor]:
    return collate(examples(kind, count))


def wide(**options: Any) -> Any:
    return bert(seed=1, hidden_size=24, intermediate_size=48, num_hidden_layers=4, **options)


@pytest.fixture(scope="module")
def embedder() -> tuple[gp.Program, BertModel]:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    teacher = BertModel(config, add_pooling_layer=False).eval()
    return gp.trace(copy.deepcopy(teacher), output_hidden_states=True), teacher


def test_a_program_equal_to_its_teacher_has_no_loss(embedder: tuple[gp.Program, BertModel]) -> None:
    program, teacher = embedder
    ids = torch.randint(0, 99, (2, 5))
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}
    distillation = Distillation(teacher, hidden=2.0, embedding=1.0, hidden_loss="relative")
    program.eval()
    loss = distillation(program(**inputs), distillation.teach(inputs), inputs)
    assert set(loss.parts) == {"hidden", "embedding"}
    assert float(loss.total.detach()) == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        program.tensor("encoder.layer.1.output.dense.weight").add_(torch.randn(16, 32))
    assert float(distillation(program(**inputs), distillation.teach(inputs), inputs).total.detach()) > 0.01


def test_the_teacher_keeps_its_mode_and_takes_what_it_knows(embedder: tuple[gp.Program, BertModel]) -> None:
    _, teacher = embedder
    teacher.train()
    inputs = {"input_ids": torch.ones(1, 3, dtype=torch.int64), "labels": torch.ones(1), "teacher_row": torch.ones(1)}
    (output,) = Distillation(teacher, embedding=1.0).teach({**inputs, "something_else": torch.ones(1)})
    assert teacher.training
    assert not output["last_hidden_state"].requires_grad
    teacher.eval()


def test_the_sum_of_task_and_teacher() -> None:
    student, teacher, inputs = bert(), bert(seed=1), batch()
    distillation = Distillation(teacher, logits=0.75, task=0.25, temperature=2.0)
    output = student(**inputs)
    loss = distillation(output, distillation.teach(inputs), inputs)
    wanted = logits_loss(output.logits, teacher(**inputs).logits, 2.0)
    torch.testing.assert_close(loss.total, 0.75 * wanted + 0.25 * output.loss)
    torch.testing.assert_close(loss.distillation, 0.75 * wanted)
    torch.testing.assert_close(loss.task, output.loss)
    assert hardness_weights(0.9) == {"task": pytest.approx(0.1), "logits": 0.9}
    assert loss_weights([1.0, 3.0]) == {"task": 0.25, "logits": 0.75}
    by_hardness = Distillation(teacher, **hardness_weights(0.75), temperature=2.0)
    assert torch.equal(by_hardness(output, distillation.teach(inputs), inputs).total, loss.total)


def test_questions_have_the_mean_of_start_and_end_without_padding() -> None:
    student, teacher, inputs = bert("qa"), bert("qa", seed=1), batch("qa")
    distillation = Distillation(teacher, logits=1.0, temperature=3.0)
    loss = distillation(student(**inputs), distillation.teach(inputs), inputs).total
    wanted = []
    for row in range(4):  # each question alone, without padding
        alone = {name: inputs[name][row : row + 1] for name in ("input_ids", "attention_mask")}
        size = int(alone["attention_mask"].sum())
        alone = {name: value[:, :size] for name, value in alone.items()}
        ours, theirs = student(**alone), teacher(**alone)
        wanted += [logits_loss(ours[name], theirs[name], 3.0) for name in ("start_logits", "end_logits")]
    torch.testing.assert_close(loss, torch.stack(wanted).mean())


def test_tokens_without_label_or_of_padding_do_not_count() -> None:
    student, teacher, inputs = bert("token"), bert("token", seed=1), batch("token")
    distillation = Distillation(teacher, logits=1.0)
    output, taught = student(**inputs), distillation.teach(inputs)
    counted = (inputs["labels"] != -100) & (inputs["attention_mask"] == 1)
    wanted = logits_loss(output.logits[counted], taught[0]["logits"][counted])
    torch.testing.assert_close(distillation(output, taught, inputs).total, wanted)
    unlabeled = {name: value for name, value in inputs.items() if name != "labels"}
    real = inputs["attention_mask"] == 1
    wanted = logits_loss(output.logits[real], taught[0]["logits"][real])
    torch.testing.assert_close(distillation(output, taught, unlabeled).total, wanted)


@pytest.mark.parametrize("kind", ["sequence", "token", "qa"])
def test_parts_of_a_batch_sum_to_its_gradient(kind: str) -> None:
    rows = examples(kind, 8, length=12 if kind == "qa" else 0)  # padding takes part in BERT's own loss of questions
    student = bert(kind).double()
    teacher = (wide() if kind == "sequence" else bert(kind, seed=1)).double()
    distillation = Distillation(teacher, logits=1.0, task=0.5, hidden=1.0, temperature=2.0)
    whole = collate(rows)
    distillation.prepare(student, whole)
    parts = [collate(rows[:3]), collate(rows[3:])]
    counts = [count_entries(part) for part in parts]
    student.train()

    def gradients(pieces: list[tuple[dict[str, torch.Tensor], Entries]]) -> list[torch.Tensor]:
        student.zero_grad()
        for inputs, share in pieces:
            output = student(**inputs, output_hidden_states=True)
            distillation(output, distillation.teach(inputs), inputs, share=share).total.backward()
        return [item.grad.clone() for item in student.parameters() if item.grad is not None]

    once = gradients([(whole, count_entries(whole).share(count_entries(whole)))])
    total = counts[0] + counts[1]
    twice = gradients([(part, count.share(total)) for part, count in zip(parts, counts, strict=True)])
    for one, two in zip(once, twice, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8)


def test_a_part_without_any_label_has_no_gradient_instead_of_nan() -> None:
    student, inputs = bert("token"), batch("token")
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    distillation = Distillation(bert("token", seed=1), logits=1.0, task=1.0)
    share = count_entries(inputs).share(Entries(8.0, 40.0, 20.0, 20.0))
    output = student(**inputs)
    assert torch.isnan(output.loss)
    loss = distillation(output, distillation.teach(inputs), inputs, share=share).total
    loss.backward()
    assert float(loss.detach()) == 0
    assert all((item.grad == 0).all() for item in student.parameters() if item.grad is not None)


class TestLayers:
    @pytest.mark.parametrize(
        ("student", "teacher", "pairs"),
        [
            (3, 6, ((1, 2), (2, 4), (3, 6))),
            (2, 2, ((1, 1), (2, 2))),
            (4, 6, ((1, 2), (2, 3), (3, 5), (4, 6))),
            (4, 2, ((1, 1), (2, 1), (3, 2), (4, 2))),
        ],
    )
    def test_spread_evenly(self, student: int, teacher: int, pairs: object) -> None:
        assert spread_layers(student, teacher) == pairs

    def test_projections_are_made_trained_and_no_part_of_the_program(self, tmp_path: Path) -> None:
        program = gp.transform(bert(), [], output_hidden_states=True, labels=True)
        inputs, teacher = batch(), wide()
        names = set(program.state_dict())
        distillation = Distillation(teacher, hidden=1.0)
        state = torch.random.get_rng_state()
        distillation.prepare(program, inputs)
        assert torch.equal(state, torch.random.get_rng_state())
        assert [tuple(item.weight.shape) for item in distillation.projections.values()] == [(24, 16)] * 2
        assert len(list(distillation.parameters())) == 4  # the teacher's are not among them
        optimizer = torch.optim.AdamW([*program.parameters(), *distillation.parameters()], lr=1e-2)
        before = copy.deepcopy(distillation.state_dict())
        losses = []
        for _ in range(40):
            loss = distillation(program(**inputs), distillation.teach(inputs), inputs).total
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0] / 2
        assert all(not torch.equal(value, before[name]) for name, value in distillation.state_dict().items())
        assert set(program.state_dict()) == names
        distillation.save_projections(tmp_path)
        again = Distillation(teacher, hidden=1.0)
        again.prepare(program, inputs)
        again.load_projections(tmp_path)
        assert all(torch.equal(value, distillation.state_dict()[name]) for name, value in again.state_dict().items())
        (tmp_path / "graphprune_projections.safetensors").write_bytes(b"cut off")
        with pytest.raises(gp.GraphPruneError, match="was not written to its end"):
            again.load_projections(tmp_path)

    def test_layers_by_number_and_loss_by_hand(self) -> None:
        student, teacher, inputs = bert(), bert(seed=1, num_hidden_layers=4), batch()
        distillation = Distillation(teacher, hidden=1.0, layers=[(-1, -1), (0, 0)])
        ours = student(**inputs, **distillation.arguments(student)).hidden_states
        theirs = distillation.teach(inputs)[0]["hidden_states"]
        loss = distillation(student(**inputs, output_hidden_states=True), distillation.teach(inputs), inputs).total
        real = inputs["attention_mask"] == 1
        wanted = [(ours[one] - theirs[two])[real].square().mean() for one, two in ((2, 4), (0, 0))]
        torch.testing.assert_close(loss, torch.stack(wanted).mean())

    def test_modules_by_name_of_a_model_and_of_a_program(self) -> None:
        inputs, teacher = batch(), wide()
        pairs = [("bert.encoder.layer.0", "bert.encoder.layer.1"), ("bert.encoder.layer.1", "bert.encoder.layer.3")]
        student = bert()
        numbers = Distillation(teacher, hidden=1.0, layers=[(1, 2), (2, 4)])
        wanted = _prepared_loss(numbers, student, inputs)
        named = Distillation(teacher, hidden=1.0, layers=pairs)
        assert named.arguments(student) == {}
        assert _prepared_loss(named, student, inputs) == pytest.approx(wanted)
        hooks = teacher.bert.encoder.layer[1]._forward_hooks
        count = len(hooks)
        named.close()
        assert len(hooks) == count - 1
        program = gp.transform(bert(), "insert-masks{sparsity=0.5}", output_hidden_states=True, labels=True)
        assert _prepared_loss(named, program, inputs) == pytest.approx(
            _prepared_loss(Distillation(teacher, hidden=1.0, layers=[(1, 2), (2, 4)]), program, inputs)
        )
        with pytest.raises(gp.GraphPruneError, match=r"no module 'bert\.encoder\.layer\.7'; did you mean"):
            Distillation(teacher, hidden=1.0, layers=[("bert.encoder.layer.7", "bert.encoder")]).prepare(
                program, inputs
            )
        with pytest.raises(gp.GraphPruneError, match="computes no hidden state that the Program"):
            Distillation(teacher, hidden=1.0, layers=[("bert.encoder.layer.0.attention", "bert.encoder")]).prepare(
                program, inputs
            )

    @pytest.mark.parametrize("kind", ["kl", "mse"])
    def test_attention_maps_with_other_numbers_of_heads(self, kind: str) -> None:
        eager = {"attn_implementation": "eager"}
        student, teacher = bert(**eager), bert(seed=1, num_attention_heads=4, num_hidden_layers=4, **eager)
        inputs = batch()
        distillation = Distillation(teacher, attentions=1.0, hidden_loss=kind)  # type: ignore[arg-type]
        loss = _prepared_loss(distillation, student, inputs)
        (taught,) = distillation.teach(inputs)
        ours = student(**inputs, output_attentions=True).attentions
        wanted = []
        for one, two in ((0, 1), (1, 3)):
            for row, size in enumerate(inputs["attention_mask"].sum(1)):
                p, q = (item[row].mean(0)[:size, :size] for item in (taught["attentions"][two], ours[one]))
                rows = (p * (p / q).log()).sum(-1) if kind == "kl" else (p - q).square().mean(-1)
                wanted.append(rows)
        wanted = torch.cat(wanted)
        assert loss == pytest.approx(float(wanted.mean().detach()), rel=1e-4)
        program = gp.trace(student, labels=True, output_attentions=True)
        assert _prepared_loss(distillation, program, inputs) == pytest.approx(loss, rel=1e-4)


def _prepared_loss(distillation: Distillation, student: Any, inputs: dict[str, torch.Tensor]) -> float:
    distillation.prepare(student, inputs)
    output = student(**inputs, **distillation.arguments(student))
    return float(distillation(output, distillation.teach(inputs), inputs).total.detach())


def test_labels_in_another_order_are_mapped() -> None:
    names = ("bad", "fair", "good")
    student, inputs = bert(num_labels=3, id2label=dict(enumerate(names))), batch()
    teacher = bert(seed=1, num_labels=3, id2label={0: "Good", 1: "bad", 2: "fair"})
    distillation = Distillation(teacher, logits=1.0)
    loss = _prepared_loss(distillation, student, inputs)
    theirs = teacher(**inputs).logits[:, [1, 2, 0]]
    assert loss == pytest.approx(float(logits_loss(student(**inputs).logits, theirs).detach()), rel=1e-6)


def test_self_distillation_learns_from_the_dense_model() -> None:
    model, inputs = bert(dropout=0.1), batch()
    teacher = frozen_copy(model.train())
    assert not teacher.training
    assert not any(item.requires_grad for item in teacher.parameters())
    program = gp.transform(
        model, "insert-masks{sparsity=0.9,schedule=one-shot,criterion=magnitude}", labels=True
    ).eval()
    distillation = Distillation(teacher, logits=1.0)
    optimizer = torch.optim.SGD(program.parameters(), lr=0.1)
    with gp.training.Session(program, optimizer, total_steps=1):
        distillation(program(**inputs), distillation.teach(inputs), inputs).total.backward()
        optimizer.step()
    assert float(distillation(program(**inputs), distillation.teach(inputs), inputs).total.detach()) > 1e-3
    assert all(
        torch.equal(one, two) for one, two in zip(frozen_copy(model).parameters(), teacher.parameters(), strict=True)
    )


def test_settings_of_a_recipe() -> None:
    settings = DistillationSettings(
        teacher="self",
        task=0.0,
        logits=1.0,
        loss="ce",
        temperature=3.0,
        hidden=0.5,
        layers=((1, 2),),
        hidden_loss="cosine",
    )
    inputs, student = batch(), bert()
    distillation = Distillation.from_settings(settings, wide(), student, inputs)
    assert distillation.weights == {"logits": 1.0, "hidden": 0.5, "attentions": 0.0, "embedding": 0.0}
    assert (distillation.task, distillation.loss_kind, distillation.temperature) == (0.0, "ce", 3.0)
    assert len(distillation.projections) == 1
    assert Distillation.from_settings(DistillationSettings(), wide()).weights["logits"] == 0.5


def test_several_teachers_by_weight() -> None:
    one, two, student, inputs = bert(seed=1), bert(seed=2), bert(), batch()
    distillation = Distillation([one, two], logits=1.0, temperature=2.0, teacher_weights=[3.0, 1.0])
    output = student(**inputs)
    wanted = logits_loss(output.logits, [one(**inputs).logits, two(**inputs).logits], 2.0, weights=[0.75, 0.25])
    torch.testing.assert_close(distillation(output, distillation.teach(inputs), inputs).total, wanted)


def test_refusals(embedder: tuple[gp.Program, BertModel], tmp_path: Path) -> None:
    _, teacher = embedder
    for options, message in [
        ({}, "all weights zero does nothing"),
        ({"task": 1.0}, "all weights zero does nothing"),
        ({"logits": 1.0, "temperature": 0}, "temperature=0 is not positive"),
        ({"logits": -1.0}, "the weight logits=-1.0 is negative"),
        ({"logits": 1.0, "loss": "kld"}, "there is no loss 'kld'; did you mean 'kl'"),
        ({"hidden": 1.0, "layers": [(1, "a")]}, r"layers has \(1, 'a'\)"),
        ({"logits": 1.0, "teacher_weights": [1.0, 2.0]}, "must be 1 positive numbers"),
    ]:
        with pytest.raises(gp.GraphPruneError, match=message):
            Distillation(teacher, **options)  # type: ignore[arg-type]
    with pytest.raises(gp.GraphPruneError, match="the list of teachers is empty"):
        Distillation([], logits=1.0)
    with pytest.raises(gp.GraphPruneError, match="2 teachers teach their logits only"):
        Distillation([teacher, teacher], hidden=1.0)
    cache = TeacherCache.of(tmp_path, bert(), examples(count=2), collate=collate, show=False)
    with pytest.raises(gp.GraphPruneError, match="a cache holds a teacher's logits only"):
        Distillation(cache, hidden=1.0)
    with pytest.raises(gp.GraphPruneError, match="share none of logits"):
        Distillation(teacher, logits=1.0)({}, {})
    with pytest.raises(gp.GraphPruneError, match="returns no loss, and task is not 0"):
        Distillation(teacher, logits=1.0, task=1.0)({}, {})
    with pytest.raises(gp.GraphPruneError, match="an output is a Tensor"):
        Distillation(teacher, logits=1.0)(torch.zeros(1), {})
    with pytest.raises(gp.GraphPruneError, match="trace or call it with output_hidden_states=True"):
        Distillation(teacher, hidden=1.0)({}, {})
    with pytest.raises(gp.GraphPruneError, match='attn_implementation="eager"'):
        Distillation(teacher, attentions=1.0)({}, {})
    with pytest.raises(gp.GraphPruneError, match=r"logits: the student's have shape \[2, 3\], the teacher's \[2, 4\]"):
        Distillation(teacher, logits=1.0)({"logits": torch.zeros(2, 3)}, {"logits": torch.zeros(2, 4)})
    states = {"hidden_states": (torch.zeros(1, 2, 4),) * 2}
    wider = {"hidden_states": (torch.zeros(1, 2, 8),) * 2}
    with pytest.raises(gp.GraphPruneError, match=r"call prepare.student, batch. before the optimizer is made"):
        Distillation(teacher, hidden=1.0)(states, wider)
    with pytest.raises(gp.GraphPruneError, match="allow projections with project=True"):
        Distillation(teacher, hidden=1.0, project=False)(states, wider)
    with pytest.raises(gp.GraphPruneError, match="asks for layer 5 of the student, which has 1 layers"):
        Distillation(teacher, hidden=1.0, layers=[(5, 1)])(states, states)
    with pytest.raises(gp.GraphPruneError, match=r"hardness=1.5 is not in \[0, 1\]"):
        hardness_weights(1.5)
    with pytest.raises(gp.GraphPruneError, match="must be two numbers"):
        loss_weights([0.0, 0.0])
