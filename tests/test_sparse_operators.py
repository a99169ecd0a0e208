"""What the operators of sparse linear layers mean, and the shapes that tracing gives them."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from graphprune.ir import sparse_operators
from graphprune.ir.sparse_operators import (
    ACTIVATIONS,
    BYTE_ORDER,
    LAYERS,
    PANEL,
    pack,
    pack_bytes,
    read_argument,
    sparse_linear,
    sparse_linear_int8,
    write_argument,
)
from graphprune.sparsity.packed import pack_matrix
from graphprune.targets.sparse_cpu import building

SCALE, ZERO = 0.05, 120


def _weight(rows: int, features: int) -> Tensor:
    return torch.randn(rows, features) * (torch.rand(-(-rows // 4), features) < 0.4).repeat_interleave(4, 0)[:rows]


def _parts(weight: Tensor, block: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    packed = pack_matrix(weight, block)
    return packed.values, packed.columns, packed.starts


def _rows(panels: Tensor, tokens: int) -> Tensor:
    return torch.cat([panel.t() for panel in panels])[:tokens] if len(panels) else panels.new_empty(0, panels.shape[1])


def _activate(x: Tensor, activation: str) -> Tensor:
    return {
        "none": lambda: x,
        "relu": lambda: torch.relu(x),
        "gelu": lambda: torch.nn.functional.gelu(x),
        "gelu_tanh": lambda: torch.nn.functional.gelu(x, approximate="tanh"),
    }[activation]()


def test_the_order_of_bytes_is_that_of_the_kernels() -> None:
    """``linear.h`` has the place of each token; ``BYTE_ORDER`` the token of each place."""
    header = (Path(building.__file__).parent / "kernels" / "linear.h").read_text()
    found = re.search(r"byte_place\(int token\) \{ return (.*?); \}", header)
    assert found is not None
    expression = found[1].replace("/", "//")
    assert re.fullmatch(r"[token()\d+*/% ]+", expression)
    places = [eval(expression, {"token": token}) for token in range(PANEL)]
    assert [BYTE_ORDER[place] for place in places] == list(range(PANEL))
    assert sorted(BYTE_ORDER) == list(range(PANEL))


def test_a_panel_has_64_tokens_feature_by_feature() -> None:
    x = torch.randn(2, 50, 3)
    panels = pack(x)
    assert panels.shape == (2, 3, PANEL)
    flat = x.reshape(100, 3)
    assert torch.equal(panels[0], flat[:64].t())
    assert torch.equal(panels[1, :, :36], flat[64:].t())
    assert not bool(panels[1, :, 36:].any())


def test_bytes_are_rounded_half_to_even_and_clamped() -> None:
    x = torch.tensor([[-1e9], [-60.0], [0.25], [0.75], [1.25], [2.0], [1e9]])
    panels = pack_bytes(x, 0.5, 100)
    assert panels.dtype is torch.uint8
    have = [int(panels[0, 0, BYTE_ORDER.index(token)]) for token in range(len(x))]
    assert have == [0, 0, 100, 102, 102, 104, 255]
    assert int(panels[0, 0, BYTE_ORDER.index(len(x))]) == 100  # padding is zero


@given(
    sizes=st.lists(st.integers(0, 9), min_size=0, max_size=3),
    rows=st.integers(1, 20),
    features=st.integers(1, 20),
    block=st.sampled_from([1, 4]),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    residual=st.booleans(),
)
def test_a_sparse_layer_is_a_linear_layer(
    sizes: list[int], rows: int, features: int, block: int, activation: str, bias: bool, residual: bool
) -> None:
    x, weight = torch.randn(*sizes, features), _weight(rows, features)
    b = torch.randn(rows) if bias else None
    more = torch.randn(*sizes, rows) if residual else None
    want = _activate(torch.nn.functional.linear(x, weight, b), activation)
    want = want if more is None else want + more
    have = sparse_linear(pack(x), *_parts(weight, block), b, more, sizes, rows, activation)
    assert have.shape == want.shape
    torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)
    tokens = math.prod(sizes)
    given = None if more is None else pack(more)
    panels = sparse_linear(pack(x), *_parts(weight, block), b, given, sizes, rows, activation, "panels")
    assert torch.equal(_rows(panels, tokens), have.reshape(tokens, rows))


@given(
    tokens=st.integers(0, 140),
    rows=st.integers(1, 20),
    features=st.integers(1, 20),
    block=st.sampled_from([1, 4]),
    activation=st.sampled_from(["none", "relu"]),
    bias=st.booleans(),
)
def test_a_layer_of_integers_is_exact(
    tokens: int, rows: int, features: int, block: int, activation: str, bias: bool
) -> None:
    x, weight = torch.randn(tokens, features), _weight(rows, features).mul(50).round().clamp(-127, 127).to(torch.int8)
    b, scales = torch.randn(rows) if bias else None, torch.rand(rows) * 0.01
    correction = (weight.long().sum(1) * ZERO).int()
    grid = (torch.round(x / SCALE) + ZERO).clamp(0, 255).long()
    want = (grid @ weight.long().t() - correction).float() * scales
    want = _activate(want if b is None else want + b, activation)
    arguments = (
        pack_bytes(x, SCALE, ZERO),
        *_parts(weight, block),
        correction,
        scales,
        b,
        None,
        (tokens,),
        rows,
        activation,
    )
    assert torch.equal(sparse_linear_int8(*arguments), want)
    panels = sparse_linear_int8(*arguments, "bytes", SCALE, ZERO)
    in_order = torch.stack([panels[..., BYTE_ORDER.index(token)] for token in range(PANEL)], dim=-1)
    assert torch.equal(_rows(in_order, tokens).long(), (torch.round(want / SCALE) + ZERO).clamp(0, 255).long())


def test_a_result_in_panels_is_what_the_next_layer_takes() -> None:
    x, first, second = torch.randn(70, 12), _weight(20, 12), _weight(8, 20)
    inner = sparse_linear(pack(x), *_parts(first), None, None, (70,), 20, "relu")
    panels = sparse_linear(pack(x), *_parts(first), None, None, (70,), 20, "relu", "panels")
    want = sparse_linear(pack(inner), *_parts(second), None, None, (70,), 8)
    assert torch.equal(sparse_linear(panels, *_parts(second), None, None, (70,), 8), want)


def _arguments(operator: Any, tokens: int, result: str) -> tuple[Any, ...]:
    rows, features = 6, 5
    x, weight = torch.randn(tokens, features), _weight(rows, features)
    if operator is sparse_linear:
        return (pack(x), *_parts(weight), torch.randn(rows), None, (tokens,), rows, "gelu", result, SCALE, ZERO)
    grid = (weight * 20).to(torch.int8)
    scales, correction = torch.rand(rows), grid.sum(1, dtype=torch.int32)
    parts = (*_parts(grid), correction, scales, torch.randn(rows), None)
    return (pack_bytes(x, SCALE, ZERO), *parts, (tokens,), rows, "gelu", result, SCALE, ZERO)


def _assert_alike(fake: Tensor, real: Tensor) -> None:
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
    assert fake.is_contiguous()
    assert real.is_contiguous()


@pytest.mark.parametrize("tokens", [0, 1, 70])
@pytest.mark.parametrize(("operator", "result"), list(itertools.product(LAYERS, sparse_operators.RESULTS)))
def test_fake_layers_have_the_shape_and_dtype_of_real_ones(operator: Any, result: str, tokens: int) -> None:
    arguments = _arguments(operator, tokens, result)
    real = operator(*arguments)
    with FakeTensorMode() as mode:
        fake = operator(*torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, arguments))
    _assert_alike(fake, real)


@pytest.mark.parametrize("shape", [(5,), (0, 5), (64, 5), (2, 40, 5)])
def test_fake_panels_have_the_shape_and_dtype_of_real_ones(shape: tuple[int, ...]) -> None:
    for operator, options in ((pack, ()), (pack_bytes, (SCALE, ZERO))):
        real = operator(torch.randn(shape), *options)
        with FakeTensorMode():
            fake = operator(torch.empty(shape), *options)
        _assert_alike(fake, real)


@pytest.mark.parametrize("result", sparse_operators.RESULTS)
def test_torch_finds_no_fault_with_the_operators(result: str) -> None:
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(pack, (torch.randn(3, 4),), test_utils=checks)
    torch.library.opcheck(pack_bytes, (torch.randn(3, 4), SCALE, ZERO), test_utils=checks)
    for operator in LAYERS:
        torch.library.opcheck(
            operator, _arguments(operator, 64, result), test_utils=checks
        )  # 64: padding is any number


def test_free_sizes_stay_free_where_a_graph_is_traced() -> None:
    parts, bias = _parts(_weight(8, 5)), torch.randn(8)

    def layer(x: Tensor, *weights: Tensor) -> Tensor:
        result: Tensor = sparse_linear(pack(x), *weights, bias, None, x.shape[:-1], 8)
        return result

    graph = make_fx(layer, tracing_mode="symbolic", _allow_non_fake_inputs=True)(torch.randn(3, 4, 5), *parts)
    x = torch.randn(7, 20, 5)
    assert torch.equal(graph(x, *parts), layer(x, *parts))


def test_arguments_are_read_and_written_by_name() -> None:
    graph = torch.fx.Graph()
    node = graph.call_function(sparse_linear, (*(graph.placeholder(name) for name in "pvcsb"), None, (1,), 4, "relu"))
    assert read_argument(node, "rows") == 4
    assert read_argument(node, "activation") == "relu"
    assert read_argument(node, "result") == "rows"  # the default
    assert read_argument(node, "zero_point") == 0
    write_argument(node, "activation", "gelu")
    write_argument(node, "result", "panels")
    assert node.args[8] == "gelu"
    assert node.kwargs == {"result": "panels"}
    assert read_argument(node, "result") == "panels"
