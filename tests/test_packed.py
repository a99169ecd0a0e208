"""Packed matrices: blocks without zeros that come back as they were."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphprune.sparsity.packed import GROUP, UNIT, choose_block, pack_matrix, unpack_matrix


def _columns(columns: Tensor) -> list[int]:
    """Columns as they are meant: 16 bits without a sign."""
    return [int(column) for column in columns.reshape(-1).view(torch.uint16).to(torch.int64)]


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    rows, features = draw(st.integers(1, 40)), draw(st.integers(1, 30))
    dtype = draw(st.sampled_from([torch.float32, torch.int8]))
    height = draw(st.sampled_from([1, 2, 4, 8, 16]))
    density = draw(st.sampled_from([0.0, 0.05, 0.3, 0.8, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randint(-128, 128, (rows, features), generator=generator)
    kept = torch.rand(-(-rows // height), features, generator=generator) < density
    return (values * kept.repeat_interleave(height, 0)[:rows]).to(dtype)


@given(weight=matrices(), block=st.sampled_from([1, 4]))
def test_matrices_come_back(weight: Tensor, block: int) -> None:
    packed = pack_matrix(weight, block)
    rows, features = weight.shape
    assert packed.values.dtype is weight.dtype
    assert (packed.columns.dtype, packed.starts.dtype) == (torch.int16, torch.int32)
    assert all(part.is_contiguous() for part in (packed.values, packed.columns, packed.starts))
    assert torch.equal(unpack_matrix(packed, rows, features), weight)


@given(weight=matrices(), block=st.sampled_from([1, 4]))
def test_only_blocks_with_a_weight_are_stored_and_columns_ascend(weight: Tensor, block: int) -> None:
    packed = pack_matrix(weight, block)
    whole = torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % UNIT)).view(-1, block, weight.shape[1])
    starts = packed.starts.tolist()
    assert len(starts) == len(whole) + 1
    assert starts[0] == 0
    unit = GROUP if weight.dtype is torch.int8 else 1
    assert starts[-1] * unit == packed.columns.numel()
    for row, (start, end) in enumerate(itertools.pairwise(starts)):
        wanted = whole[row].ne(0).any(dim=0).nonzero().flatten().tolist()
        assert end - start == -(-len(wanted) // unit)
        stored = _columns(packed.columns[start:end])
        assert stored[: len(wanted)] == wanted
        assert not any(stored[len(wanted) :])  # padding points at a column that there is


def test_blocks_of_four_rows() -> None:
    weight = torch.zeros(5, 3)
    weight[0, 1], weight[3, 1], weight[2, 2], weight[4, 0] = 1.0, 2.0, 3.0, 4.0
    packed = pack_matrix(weight, 4)
    assert packed.values.tolist() == [[1.0, 0.0, 0.0, 2.0], [0.0, 0.0, 3.0, 0.0], [4.0, 0.0, 0.0, 0.0]]
    assert packed.columns.tolist() == [1, 2, 0]
    assert packed.starts.tolist() == [0, 2, 3, 3, 3]


def test_single_rows() -> None:
    packed = pack_matrix(torch.tensor([[0.0, 5.0, 0.0], [0.0, 0.0, 0.0], [6.0, 0.0, 7.0]]), 1)
    assert packed.values.tolist() == [[5.0], [6.0], [7.0]]
    assert packed.columns.tolist() == [1, 0, 2]
    assert packed.starts.tolist() == [0, 1, 1, 3] + [3] * 13


def test_bytes_lie_in_groups_of_four_columns() -> None:
    weight = torch.zeros(2, 6, dtype=torch.int8)
    weight[0] = torch.tensor([1, 2, 3, 4, 5, 0])
    weight[1, 1] = -9
    packed = pack_matrix(weight, 4)
    first, second = packed.values.tolist()
    assert first == [[1, 2, 3, 4], [0, -9, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert second == [[5, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert packed.columns.tolist() == [[0, 1, 2, 3], [4, 0, 0, 0]]
    assert packed.starts.tolist() == [0, 2, 2, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize(("rows", "features"), [(1, 1), (3, 7), (16, 4), (33, 5)])
def test_nothing_but_zeros_and_nothing_but_weights(dtype: torch.dtype, block: int, rows: int, features: int) -> None:
    empty = pack_matrix(torch.zeros(rows, features, dtype=dtype), block)
    assert empty.values.numel() == empty.columns.numel() == 0
    assert not bool(empty.starts.any())
    assert torch.equal(unpack_matrix(empty, rows, features), torch.zeros(rows, features, dtype=dtype))
    full = torch.ones(rows, features, dtype=dtype)
    assert torch.equal(unpack_matrix(pack_matrix(full, block), rows, features), full)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_columns_have_sixteen_bits(dtype: torch.dtype) -> None:
    weight = torch.zeros(2, 2**16, dtype=dtype)
    weight[0, 2**16 - 1], weight[1, 2**15] = 1, 2
    for block in (1, 4):
        packed = pack_matrix(weight, block)
        assert {2**15, 2**16 - 1} <= set(_columns(packed.columns))
        assert torch.equal(unpack_matrix(packed, 2, 2**16), weight)
    with pytest.raises(AssertionError):
        pack_matrix(torch.zeros(1, 2**16 + 1), 4)


def test_minus_zero_is_a_zero_and_what_is_no_number_is_kept() -> None:
    packed = pack_matrix(torch.tensor([[-0.0, float("nan"), float("inf")]]), 1)
    assert packed.columns.tolist() == [1, 2]


def test_memory_order_does_not_matter() -> None:
    weight = torch.randn(7, 20).t() * (torch.rand(20, 7) < 0.3)
    assert not weight.is_contiguous()
    assert torch.equal(unpack_matrix(pack_matrix(weight, 4), 20, 7), weight)


def _blocks(rows: int, features: int, height: int, density: float = 0.2) -> Tensor:
    return torch.ones(rows, features) * (torch.rand(rows // height, features) < density).repeat_interleave(height, 0)


@pytest.mark.parametrize("height", [4, 8, 16])
def test_whole_blocks_are_packed_in_fours(height: int) -> None:
    assert choose_block(_blocks(64, 100, height)) == 4


def test_scattered_weights_are_packed_one_by_one() -> None:
    assert choose_block(_blocks(64, 100, 1)) == 1
    assert choose_block(_blocks(64, 25, 1).repeat_interleave(4, 1)) == 1  # 1x4: four columns of one row


def test_blocks_of_which_half_is_kept_are_still_packed_in_fours() -> None:
    weight = torch.zeros(8, 10)
    weight[0:2], weight[4:6] = 1.0, 1.0
    assert choose_block(weight) == 4
    weight[0, 0] = 0.0
    assert choose_block(weight) == 1


@pytest.mark.parametrize(("rows", "block"), [(1, 1), (2, 4), (3, 4), (5, 4), (9, 4)])
def test_the_last_rows_count_as_a_block(rows: int, block: int) -> None:
    assert choose_block(torch.ones(rows, 8)) == block
    assert choose_block(torch.zeros(rows, 8)) == 4
