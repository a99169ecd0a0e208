"""Tracing: the Program computes, trains, moves and is called like the model it came from."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from graphprune.errors import TraceError
from graphprune.ir.parity import NoDropout
from graphprune.ir.program import Program
from graphprune.ir.sites import find_sites
from graphprune.ir.trace import trace
from tests.models import HUGGING_FACE, MODELS, example
from tests.traced import assert_same, inputs_of, pair, run, tensors, traced

HF = tuple(HUGGING_FACE)


# -- every architecture -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_outputs_equal_the_sources_at_another_shape(name: str) -> None:
    model, program = pair(name, labels=name in HF)
    inputs = inputs_of(name, model)
    assert_same(run(model, inputs), run(program, inputs))


@pytest.mark.parametrize("name", MODELS)
def test_names_of_parameters_and_buffers_are_the_sources(name: str) -> None:
    model, program = pair(name, labels=name in HF)
    assert set(model.state_dict()) == set(program.state_dict())
    assert [key for key, _ in model.named_parameters()] == [key for key, _ in program.named_parameters()]
    program.load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", ["mlp", "conv_bn", "tied_embedding", "bert_qa", "gpt2"])
def test_parameters_are_the_same_objects(name: str) -> None:
    model = MODELS[name]()
    program = trace(model, example(name), check=False)
    theirs = dict(model.named_parameters(remove_duplicate=False))
    for key, value in program.named_parameters(remove_duplicate=False):
        assert value is theirs[key]


@pytest.mark.parametrize("name", MODELS)
def test_one_step_of_training_reaches_every_site(name: str) -> None:
    model, program = pair(name, labels=name in HF)
    inputs = inputs_of(name, model)
    program.train()
    optimizer = torch.optim.SGD(program.parameters(), lr=0.1)
    before = {site.name: program.tensor(site.name).detach().clone() for site in find_sites(program)[0]}
    if name in HF:
        inputs |= _labels(program, inputs)
        loss = program(**inputs).loss
    else:
        loss = program(**inputs).square().mean()
    loss.backward()
    optimizer.step()
    assert before
    for site, value in before.items():
        assert not torch.equal(value, program.tensor(site)), f"{site} did not move"


def _labels(program: Program, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for item in program.interface.inputs:
        if "label" in item.name or item.name.endswith("_positions"):
            like = inputs.get("decoder_input_ids", next(iter(inputs.values())))
            found[item.name] = torch.ones(like.shape[: len(item.shape)], dtype=torch.int64)
    return found


@pytest.mark.parametrize("name", HF)
def test_loss_equals_the_sources_with_labels_and_is_none_without(name: str) -> None:
    model, program = pair(name, labels=True)
    inputs = inputs_of(name, model)
    labels = _labels(program, inputs)
    assert labels
    want, have = run(model, inputs | labels), run(program, inputs | labels)
    assert type(want) is type(have)
    torch.testing.assert_close(have.loss, want.loss)  # type: ignore[attr-defined]
    without = run(program, inputs)
    assert without.loss is None  # type: ignore[attr-defined]
    assert_same(run(model, inputs), without)


@pytest.mark.parametrize("name", ["bert_qa", "conv_bn", "llama"])
def test_gradients_equal_the_sources(name: str) -> None:
    model, program = pair(name, labels=name in HF)
    inputs = inputs_of(name, model)
    labels = _labels(program, inputs)
    for module in (model, program):
        module.train()
        with NoDropout():
            output = module(**inputs, **labels)
        (output.loss if name in HF else output.square().mean()).backward()
    mine = dict(program.named_parameters())
    for key, value in model.named_parameters():
        assert (value.grad is None) == (mine[key].grad is None), key
        if value.grad is not None:
            torch.testing.assert_close(mine[key].grad, value.grad, rtol=1e-4, atol=1e-6)


def test_llama_3_with_grouped_queries() -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=64,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    program = trace(model, labels=True)
    sites = {site.name: site for site in find_sites(program)[0]}
    assert sites["model.layers.0.self_attn.k_proj.weight"].shape == (8, 32)
    ids = torch.arange(15).view(3, 5)
    assert_same(run(model, {"input_ids": ids}), run(program, {"input_ids": ids}))


# -- modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "bert_qa", "gpt2", "t5"])
def test_dropout_acts_in_train_mode_only(name: str) -> None:
    model, program = pair(name)
    inputs = inputs_of(name, model)
    torch.manual_seed(0)
    program.train()
    first, second = tensors(run(program, inputs))[0], tensors(run(program, inputs))[0]
    assert not torch.equal(first, second)
    program.eval()
    assert torch.equal(tensors(run(program, inputs))[0], tensors(run(program, inputs))[0])


@pytest.mark.parametrize("name", ["conv_bn", "resnet"])
def test_batch_statistics_update_as_the_sources(name: str) -> None:
    model, program = pair(name)
    inputs = inputs_of(name, model)
    for module in (model, program):
        module.eval()
        before = copy.deepcopy(dict(module.named_buffers()))
        run(module, inputs)
        assert all(torch.equal(before[key], value) for key, value in module.named_buffers())
        module.train()
        run(module, inputs)
        run(module, inputs)
    mine = dict(program.named_buffers())
    for key, value in model.named_buffers():
        torch.testing.assert_close(mine[key], value)
    assert any(int(value) == 2 for key, value in mine.items() if key.endswith("num_batches_tracked"))


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = MODELS["conv_bn"]()
    state = copy.deepcopy(model.state_dict())
    trace(model, example("conv_bn"))
    assert not model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    model.train()
    assert trace(model, example("conv_bn"), check=False).training


def test_deepcopy_is_independent() -> None:
    program = traced("tied_embedding")
    clone = copy.deepcopy(program)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    before = program(ids).detach()
    with torch.no_grad():
        for value in clone.parameters():
            value.zero_()
    clone.graph.erase_node(next(iter(clone.graph.nodes)).graph.output_node())
    assert torch.equal(program(ids), before)
    again = copy.deepcopy(program)
    tied = dict(again.named_parameters(remove_duplicate=False))
    assert tied["embedding.weight"] is tied["head.weight"]


# -- calling ----------------------------------------------------------------------------------------------------------


def test_positional_call_and_output_class() -> None:
    model, program = pair("bert_qa", labels=True)
    inputs = inputs_of("bert_qa", model)
    mask = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        want, have = model(inputs["input_ids"], mask), program(inputs["input_ids"], mask)
    assert type(have).__name__ == "QuestionAnsweringModelOutput"
    assert_same(want, have)


def test_config_is_kept() -> None:
    model, program = pair("bert_qa")
    assert program.config.to_dict() == model.config.to_dict()
    assert not hasattr(traced("mlp"), "config")


def test_left_out_attention_mask_means_all_tokens() -> None:
    model, program = pair("bert_qa")
    assert "attention_mask" in program.interface.names
    inputs = inputs_of("bert_qa", model)
    assert_same(run(model, inputs), run(program, inputs))
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, 3:] = 0
    masked = {**inputs, "attention_mask": mask}
    assert_same(run(model, masked), run(program, masked))
    assert not torch.equal(run(program, masked).start_logits, run(program, inputs).start_logits)  # type: ignore[attr-defined]


def test_missing_input_is_named() -> None:
    program = traced("bert_qa", labels=True)
    with pytest.raises(TraceError, match="input 'input_ids' is missing and every output needs it"):
        program(attention_mask=torch.ones(2, 8, dtype=torch.int64))


def test_unknown_input_is_named_with_a_suggestion() -> None:
    program = traced("bert_qa")
    ids = torch.ones(2, 8, dtype=torch.int64)
    with pytest.raises(TraceError, match="unknown input 'input_idz'; did you mean 'input_ids'"):
        program(input_idz=ids)
    with pytest.raises(TraceError, match=r"input 'start_positions' was not traced.*labels=True"):
        program(input_ids=ids, start_positions=torch.ones(2, dtype=torch.int64))
    with pytest.raises(TraceError, match="given twice"):
        program(ids, input_ids=ids)
    with pytest.raises(TraceError, match="positional arguments given"):
        traced("mlp")(ids, ids)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "input 'x' must be a tensor, not list"),
        (torch.ones(2, 3, 16), "has 3 dimensions, but was traced with 2"),
        (torch.ones(2, 15), "has size 15 in dimension 1, but the trace is fixed to 16"),
    ],
)
def test_input_that_does_not_fit(value: object, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        traced("mlp")(value)


def test_constants_are_fixed() -> None:
    model = MODELS["bert_token"]()
    program = trace(model, output_hidden_states=True)
    inputs = inputs_of("bert_token", model)
    have = run(program, inputs)
    want = run(model, {**inputs, "output_hidden_states": True})  # type: ignore[dict-item]
    assert len(have.hidden_states) == len(want.hidden_states) == 3  # type: ignore[attr-defined]
    assert_same(want, have)
    program(**inputs, output_hidden_states=True, return_dict=True)
    with pytest.raises(TraceError, match="'output_hidden_states' was traced as True and cannot be False now"):
        program(**inputs, output_hidden_states=False)


# -- refusals ---------------------------------------------------------------------------------------------------------


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.layer(x)
        return x


class DrawsNumbers(Branching):
    def forward(self, x: Tensor) -> Tensor:
        scale = 1.0 if self.training else 2.0
        return self.layer(x) * scale


def test_data_dependent_control_flow_names_its_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        TraceError, match=r"Branching cannot be traced at .*test_trace\.py:\d+ in forward: if x\.sum\(\) > 0:"
    ):
        trace(Branching(), torch.randn(2, 4))


def test_a_model_that_branches_on_its_mode_is_no_trace() -> None:
    with pytest.raises(TraceError, match=r"eval mode: output 0 of the trace differs .* branch on its mode"):
        trace(DrawsNumbers(), torch.randn(2, 4))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"y": torch.randn(2, 16)}, "Mlp.forward takes no argument 'y'"),
        ((torch.randn(2, 16), torch.randn(2, 16)), "2 example inputs given; Mlp.forward takes x"),
        ({}, "missing a required argument: 'x'"),
        (None, "has no dummy_inputs to trace with"),
        ({"x": [torch.randn(2, 16)]}, "input 'x' is a list"),
    ],
)
def test_wrong_example_inputs(inputs: object, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        trace(MODELS["mlp"](), inputs)  # type: ignore[arg-type]


def test_labels_of_a_model_without_labels() -> None:
    with pytest.raises(TraceError, match="takes none of labels"):
        trace(MODELS["mlp"](), example("mlp"), labels=True)


def test_unknown_constant() -> None:
    with pytest.raises(TraceError, match="takes no argument 'y'; known: x"):
        trace(MODELS["mlp"](), example("mlp"), y=True)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
