"""keep-panels: between sparse linear layers activations stay as the next one takes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from graphprune.ir.program import Program
from graphprune.ir.sparse_operators import LAYERS, pack, pack_bytes, read_argument
from graphprune.ir.trace import trace
from graphprune.passes import KeepPanels
from graphprune.pipeline.recipe import Recipe
from tests.models import MODELS, example
from tests.packed_programs import PACK, blocked, integers, with_round_scales
from tests.traced import answer, assert_same, inputs_of, run, run_passes

Golden = Callable[[str, str], None]
FUSE = f"{PACK},fuse-epilogues"


def _fixed(model: nn.Module, x: Tensor) -> Program:
    """Packed, with sizes that are fixed."""
    return run_passes(trace(model.eval(), (x,), {}), FUSE)


def _forms(program: Program) -> list[str]:
    return [read_argument(node, "result") for node in program.calls(*LAYERS)]


def test_golden(golden: Golden) -> None:
    program = run_passes(blocked("mlp"), FUSE)
    golden("keep_panels_before", str(program))
    golden("keep_panels_after", str(run_passes(program, "keep-panels")))


def test_golden_of_integers(golden: Golden) -> None:
    program = run_passes(with_round_scales(integers("mlp")), FUSE)
    golden("keep_panels_integers", str(run_passes(program, "keep-panels")))


@pytest.mark.parametrize(
    ("name", "joined"), [("mlp", 2), ("residual", 1), ("shared_weight", 3), ("attention", 1), ("bert_qa", 2)]
)
def test_layers_with_free_sizes_join_and_outputs_are_bitwise_equal(name: str, joined: int) -> None:
    program = run_passes(blocked(name), FUSE)
    inputs = inputs_of(name, MODELS[name]())
    before, packs = run(program, inputs), len(list(program.calls(pack)))
    result = KeepPanels().run(program)
    assert result.stats == {"joined": joined}
    assert _forms(program).count("panels") == joined
    assert len(list(program.calls(pack))) == packs - joined
    assert_same(before, run(program, inputs), 0.0)


@pytest.mark.parametrize("name", ["mlp", "residual", "shared_weight"])
def test_layers_with_fixed_sizes_join(name: str) -> None:
    (x,) = example(name) or ()
    program = _fixed(MODELS[name](), x)
    before = answer(program, x)
    assert KeepPanels().run(program).changed
    assert "panels" in _forms(program)
    assert torch.equal(answer(program, x), before)


@pytest.mark.parametrize(
    ("name", "way"), [("mlp", "static"), ("mlp", "QAT"), ("residual", "static"), ("bert_qa", "static")]
)
def test_layers_of_integers_hand_on_bytes(name: str, way: str) -> None:
    program = run_passes(integers(name, way), FUSE)
    inputs = inputs_of(name, MODELS[name]())
    before = run(program, inputs)
    grids = {node.args[0]: node.args[1:] for node in program.calls(pack_bytes)}
    assert KeepPanels().run(program).changed
    joined = [node for node in program.calls(*LAYERS) if read_argument(node, "result") == "bytes"]
    assert joined
    for node in joined:
        assert (read_argument(node, "scale"), read_argument(node, "zero_point")) == grids[node]
        assert node.meta["val"].dtype is torch.uint8
    assert_same(before, run(program, inputs), 0.0)


class _Two(nn.Module):
    """Two layers with something between them: [b, 8] to [b, 8]."""

    def __init__(self, between: Callable[[Tensor, Tensor], Tensor], behind: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.between, self.behind = between, behind

    def forward(self, x: Tensor) -> Tensor:
        y = self.between(self.first(x), x)
        return self.behind(self.second(y), y)


@pytest.mark.parametrize(
    ("between", "behind", "reason"),
    [
        (lambda y, x: torch.relu(y), lambda z, y: z, ""),
        (lambda y, x: y, lambda z, y: z * y, "its result is used in rows too"),
        (lambda y, x: y, lambda z, y: z + y, "its result is used in rows too"),
        (lambda y, x: y + x, lambda z, y: z, "its residual is in rows"),
    ],
)
@pytest.mark.parametrize("free", [False, True])
def test_what_is_left_out(
    between: Callable[[Tensor, Tensor], Tensor], behind: Callable[[Tensor, Tensor], Tensor], reason: str, free: bool
) -> None:
    model, x = _Two(between, behind).eval(), torch.randn(70, 8)
    program = run_passes(trace(model, (x,), None if free else {}), FUSE)
    before, text = answer(program, x), str(program)
    result = KeepPanels().run(program)
    assert result.changed is (str(program) != text)
    assert result.changed or reason
    assert list(result.coverage.left_out.values()) == ([reason] if reason else [])
    assert _forms(program) == ["rows" if reason else "panels", "rows"]
    assert torch.equal(answer(program, x), before)


def test_a_result_of_the_program_stays_in_rows() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.first(x)
            return y, self.second(y)

    program = _fixed(Both(), torch.randn(3, 8))
    assert not KeepPanels().run(program).changed


def test_layers_in_two_dimensions_of_tokens_join() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)).eval()
    program = run_passes(trace(model, (torch.randn(2, 5, 8),)), f"{FUSE},keep-panels")
    assert _forms(program) == ["panels", "rows"]
    for batch in (0, 1, 13, 30):
        x = torch.randn(batch, 5, 8)
        with torch.no_grad():
            torch.testing.assert_close(answer(program, x), model(x), rtol=1e-5, atol=1e-5)


def test_nothing_to_join() -> None:
    program = blocked("mlp")
    text = str(program)
    result = KeepPanels().run(program)
    assert (result.changed, result.stats) == (False, {"joined": 0})
    assert str(program) == text


def test_twice_is_once() -> None:
    program = run_passes(blocked("mlp"), f"{FUSE},keep-panels")
    text = str(program)
    assert not KeepPanels().run(program).changed
    assert str(program) == text


def test_text_reads_back() -> None:
    assert Recipe.of(str(KeepPanels())).passes == (KeepPanels(),)
