"""Number formats of the ONNX target: what is stored, in how many bytes, which kernel runs it, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import graphprune as gp
from graphprune.errors import LoweringError
from graphprune.pipeline.target import StoredWeight, Support
from graphprune.targets.onnx import Onnx
from graphprune.targets.onnx_model import integer_convolutions as convolutions
from graphprune.targets.onnx_model import quantized_layers as layers
from graphprune.targets.onnx_model import quantized_moves as moves
from graphprune.targets.onnx_model import weight_blocks as blocks
from graphprune.targets.onnx_model import weight_folds as fold
from graphprune.targets.onnx_model import weight_lookups as lookup
from graphprune.targets.onnx_model.kernels import kernels
from graphprune.targets.onnx_model.passes import FORMS
from tests.onnx_graphs import Case, integers, random, rewrite, run, steps
from tests.traced import run_passes, traced

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
ml_dtypes = pytest.importorskip("ml_dtypes")

_FAKE = (
    "(float[5,32] x) => (float[5,3] y) {{ v = graphprune.FakeQuantize"
    "<quant_min={low}, quant_max={high}, axis={axis}, group={group}>(w, s, z)  t = Transpose<perm=[1,0]>(v)  y = MatMul(x, t) }}"
)


def _small(low: int, high: int, group: int, opset: int = 18) -> tuple[Case, np.ndarray]:
    """A product with a weight of our own operator, and its result by the operator's definition."""
    shape = (3, 32 // group) if group else (3,)
    scale = steps(*shape)
    zero_point = (
        integers(*shape, low=low + 2, high=high - 2, dtype=np.int32) if low + high else np.zeros(shape, np.int32)
    )
    weight = random(3, 32) * 0.02
    text = _FAKE.format(low=low, high=high, axis=0, group=group)
    case = Case(
        fold.fold_weight_quantization,
        text,
        {"w": weight, "s": scale, "z": zero_point},
        {"x": random(5, 32)},
        opset=opset,
    )
    wide = (np.repeat(item.reshape(3, -1), group or 32, axis=1) for item in (scale, zero_point))
    scales, offsets = wide
    rounded = (np.clip(np.rint(weight / scales) + offsets, low, high) - offsets) * scales
    return case, np.asarray(case.feeds["x"] @ rounded.T.astype(np.float32))


@pytest.mark.parametrize("limits", [(-7, 7), (-8, 7), (0, 15), (-127, 127), (-64, 64)])
@pytest.mark.parametrize("group", [0, 16])
def test_small_weights_run_in_every_opset(limits: tuple[int, int], group: int, tmp_path: Path) -> None:
    for opset in (18, 21):
        case, want = _small(*limits, group, opset)
        model, count, _ = rewrite(case.model(), fold.fold_weight_quantization)
        assert count == 1
        model, _, _ = rewrite(model, fold.fold_weight_transposes)
        if opset == 18 and (group or limits[1] < 16):
            model, count, _ = rewrite(model, blocks.pack_products)
            assert count == 1
            packed = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
            level = next(item for item in packed.attribute if item.name == "accuracy_level")
            level.i = 0  # in float, to see the weights themselves
        onnx.checker.check_model(model)
        assert np.abs(run(model, case.feeds)[0] - want).max() < 1e-5
        onnx.save_model(model, tmp_path / "model.onnx")
        assert set(kernels(tmp_path / "model.onnx").values()) == {"MatMulNBits"}


def test_four_bits_are_half_a_byte() -> None:
    for opset in (18, 21):
        case, _ = _small(-7, 7, 16, opset)
        model, _, _ = rewrite(case.model(), fold.fold_weight_quantization)
        weight = next(item for item in model.graph.initializer if item.name == "w")
        assert weight.data_type == onnx.TensorProto.INT4
        assert len(weight.raw_data) == 3 * 32 // 2


def test_int4_tables_are_looked_up_as_such() -> None:
    text = "(int64[2,2] ids) => (float[2,2,32] y) { v = DequantizeLinear<axis=0>(w, s)  y = Gather(v, ids) }"
    table = integers(6, 32, low=-7, high=7).astype(ml_dtypes.int4)
    case = Case(lookup.look_up_blocks, text, {"w": table, "s": steps(6)}, {"ids": np.array([[1, 5], [0, 2]])}, opset=21)
    after, count, _ = rewrite(case.model(), case.function)
    assert count == 1
    assert np.array_equal(run(after, case.feeds)[0], run(case.model(), case.feeds)[0])


@pytest.mark.parametrize("axis", [None, 1])
def test_tables_with_other_scales(axis: int | None) -> None:
    """One scale, or one a column."""
    where = "" if axis is None else f"<axis={axis}>"
    text = f"(int64[2,2] ids) => (float[2,2,3] y) {{ v = DequantizeLinear{where}(w, s, z)  y = Gather(v, ids) }}"
    shape = () if axis is None else (3,)
    arrays = {"w": integers(6, 3), "s": steps(*shape).astype(np.float32), "z": integers(*shape, seed=1)}
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    case = Case(lookup.look_up_integers, text, arrays, {"ids": np.array([[1, 5], [0, 2]])})
    after, count, _ = rewrite(case.model(), case.function)
    assert count == 1
    assert [node.op_type for node in after.graph.node] == ["Gather", "DequantizeLinear"]
    assert np.array_equal(run(after, case.feeds)[0], run(case.model(), case.feeds)[0])


def test_reduced_activations_are_clipped() -> None:
    text = (
        "(float[5,4] x) => (float[5,4] y) "
        "{ y = graphprune.FakeQuantize<quant_min=0, quant_max=127, axis=-1, group=0>(x, xs, z) }"
    )
    case = Case(fold.clip_reduced_ranges, text, {"z": np.array(60, np.int32)}, {"x": random(5, 4) * 3})
    after, count, _ = rewrite(case.model(), case.function)
    assert count == 1
    want = (np.clip(np.rint(case.feeds["x"] / np.float32(0.02)) + 60, 0, 127) - 60) * np.float32(0.02)
    assert np.array_equal(run(after, case.feeds)[0], want)


def test_activations_of_four_bits_are_refused() -> None:
    text = (
        "(float[5,4] x) => (float[5,4] y) "
        "{ y = graphprune.FakeQuantize<quant_min=0, quant_max=15, axis=-1, group=0>(x, xs, z) }"
    )
    case = Case(fold.clip_reduced_ranges, text, {"z": np.array(6, np.int32)})
    with pytest.raises(LoweringError, match=r"0\.\.15; onnxruntime has activations of 8 bits"):
        rewrite(case.model(), case.function)


def test_a_format_that_the_opset_lacks_is_refused_with_the_one_that_has_it() -> None:
    text = (
        "(float[1,2,4,4] x) => (float[1,3,3,3] y) "
        "{ v = graphprune.FakeQuantize<quant_min=-7, quant_max=7, axis=0, group=0>(w, s, z)  y = Conv(x, v) }"
    )
    arrays = {"w": random(3, 2, 2, 2), "s": steps(3), "z": np.zeros(3, np.int32)}
    for opset in (18, 21):
        case = Case(fold.fold_weight_quantization, text, arrays, opset=opset)
        model, _, _ = rewrite(case.model(), case.function)
        if opset == 21:
            assert rewrite(model, blocks.check_formats)[1] == 1
            continue
        with pytest.raises(LoweringError, match=r"w is stored as int4 and used by Conv, .* set opset=21"):
            rewrite(model, blocks.check_formats)


def test_a_weight_quantized_by_two_operators_alike_is_stored_once() -> None:
    text = (
        "(float[5,4] x) => (float[5,3] y) { p = QuantizeLinear<axis=1>(w, s, z)  a = DequantizeLinear<axis=1>(p, s, z) "
        "q = QuantizeLinear<axis=1>(w, t, z)  c = DequantizeLinear<axis=1>(q, t, z) "
        "m = MatMul(x, a)  n = MatMul(x, c)  y = Add(m, n) }"
    )
    scale = steps(3)
    for other, stored in ((scale, ["w"]), (scale * 2, ["w_quantized", "w_quantized_2"])):
        arrays = {"w": random(4, 3) * 0.3, "s": scale, "t": other, "z": np.zeros(3, np.int8)}
        case = Case(fold.fold_weight_quantization, text, arrays, {"x": random(5, 4)})
        after, count, _ = rewrite(case.model(), case.function)
        assert count == 2
        names = sorted(item.name for item in after.graph.initializer if len(item.dims) == 2)
        assert names == stored
        assert np.array_equal(run(after, case.feeds)[0], run(case.model(), case.feeds)[0])


_NOT_HERE = (
    # a Relu whose quantizer has numbers below zero
    (moves.lift_quantize, "(float[5,4] x) => (uint8[5,4] y) { r = Relu(x)  y = QuantizeLinear(r, xs, xz) }"),
    # a value that something else uses in float
    (
        moves.lift_quantize,
        "(float[5,4] x) => (uint8[4,5] y, float[4,5] z) "
        "{ t = Transpose<perm=[1,0]>(x)  y = QuantizeLinear(t, xs, xz)  z = Neg(t) }",
    ),
    # another scale
    (
        moves.cancel_quantize_pairs,
        "(uint8[2,4] q) => (uint8[2,4] y) { d = DequantizeLinear(q, xs, xz)  r = QuantizeLinear(d, ys, xz)  y = Identity(r) }",
    ),
    # the mean over other dimensions
    (
        moves.pool_means,
        "(uint8[1,2,4,4] q) => (uint8[1,2,4] y) "
        "{ d = DequantizeLinear(q, xs, xz)  m = ReduceMean<keepdims=0>(d, axes)  y = QuantizeLinear(m, ys, yz) }",
    ),
    # two values of the same scale are two
    (
        moves.share_quantize,
        "(float[5,4] x, float[5,4] z) => (uint8[5,4] a, uint8[5,4] c) "
        "{ a = QuantizeLinear(x, xs, xz)  c = QuantizeLinear(z, xs, xz) }",
    ),
    # a convolution whose result stays in float takes a float bias
    (
        layers.quantize_biases,
        "(uint8[1,2,4,4] q) => (float[1,3,3,3] y) "
        "{ d = DequantizeLinear(q, xs, xz)  v = DequantizeLinear<axis=0>(w, s)  y = Conv(d, v, b) }",
    ),
    # ConvInteger has one zero-point for all channels
    (
        convolutions.convolve_integers,
        "(uint8[1,2,4,4] q) => (float[1,3,3,3] y) "
        "{ d = DequantizeLinear(q, xs, xz)  v = DequantizeLinear<axis=0>(w, s, z)  y = Conv(d, v) }",
    ),
)


@pytest.mark.parametrize(("function", "text"), _NOT_HERE, ids=[item[0].__name__ for item in _NOT_HERE])
def test_near_misses_are_left(function: object, text: str) -> None:
    arrays = {
        "axes": np.array([3]), "w": integers(3, 2, 2, 2), "s": steps(3), "z": integers(3, seed=3), "b": random(3),
    }  # fmt: skip
    assert rewrite(Case(function, text, arrays).model(), function)[1] == 0  # type: ignore[arg-type]


@given(bits=st.sampled_from([4, 8]), rows=st.integers(1, 5), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_packing_comes_back(bits: int, rows: int, columns: int, seed: int) -> None:
    numbers = np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns))
    packed = blocks.pack(numbers, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (rows, columns if bits == 8 else -(-columns // 2))
    assert np.array_equal(blocks.unpack(packed, bits, columns), numbers)


def test_zeros_of_groups_are_found() -> None:
    values = np.array([[3, 1, 5, 5], [0, 2, 7, 6]], np.int8)
    stored = StoredWeight(values, np.array([[3, 5], [2, 7]]), np.ones((2, 2)))
    assert stored.zeros.tolist() == [[True, False, True, True], [False, True, True, False]]


def test_a_model_that_onnxruntime_refuses_is_named(tmp_path: Path) -> None:
    case = Case(fold.fold_weight_quantization, "(float[5,4] x) => (float[5,4] y) { y = graphprune.FakeQuantize(x) }")
    onnx.save_model(case.model(), tmp_path / "model.onnx")
    with pytest.raises(LoweringError, match=r"onnxruntime cannot load model\.onnx"):
        kernels(tmp_path / "model.onnx")


def test_kernels_of_a_weight_in_float_and_integers(tmp_path: Path) -> None:
    """A weight that one operator multiplies as a float counts as one of a float kernel."""
    product = "d = DequantizeLinear(q, xs, xz)  v = DequantizeLinear<axis=1>(w, s, z)  y = MatMul(d, v)"
    other = "u = DequantizeLinear<axis=1>(w, s, z)  a = Abs(u)"
    arrays = {"w": integers(4, 3), "s": steps(3), "z": np.zeros(3, np.int8)}
    for text, kind in (
        (f"(uint8[5,4] q) => (float[5,3] y) {{ {product} }}", "MatMulIntegerToFloat"),
        (f"(uint8[5,4] q) => (float[5,3] y, float[4,3] a) {{ {product} {other} }}", "Abs"),
    ):
        onnx.save_model(Case(fold.fold_weight_quantization, text, arrays).model(), tmp_path / "model.onnx")
        assert kernels(tmp_path / "model.onnx") == {"w": kind}


def test_the_table_of_formats() -> None:
    table = Onnx.capabilities()
    for name in ("int8", "uint8", "int4", "uint4", "int8 per group", "int4 per group", "dynamic uint8", "fp32"):
        assert table[name] is Support.EXPLOITED
    assert (table["fp16"], table["bf16"]) == (Support.STORED, Support.STORED)


def test_16_bit_floats(tmp_path: Path) -> None:
    program = run_passes(traced("mlp"), "cast-mixed{dtype=float16}")
    manifest = gp.export(program, "onnx", tmp_path / "out", tolerance=4 * 2.0**-11).manifest
    assert {site.stored for site in manifest.sites} == {"float16"}
    assert manifest.passes["fold-weight-casts"] == 3
    manifest = gp.export(run_passes(traced("mlp"), "cast-mixed{dtype=bfloat16}"), "onnx", tmp_path / "wider").manifest
    assert {site.stored for site in manifest.sites} == {"bfloat16"}


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(LoweringError, match=r"form='integers' is not known.*integer"):
        Onnx(form="integers")
    assert set(FORMS) == {"qdq", "integer", "float"}
