"""Every pass of the ONNX target on a small graph: golden text, the same numbers, and nothing where there is nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from graphprune.targets.onnx_model import cleanup as cleanup
from graphprune.targets.onnx_model import integer_convolutions as convolutions
from graphprune.targets.onnx_model import integer_products as products
from graphprune.targets.onnx_model import quantized_layers as layers
from graphprune.targets.onnx_model import quantized_moves as moves
from graphprune.targets.onnx_model import weight_blocks as blocks
from graphprune.targets.onnx_model import weight_folds as fold
from graphprune.targets.onnx_model import weight_lookups as lookup
from graphprune.targets.onnx_model.bfloat16 import widen_bfloat16
from graphprune.targets.onnx_model.passes import FORMS, name_of
from tests.onnx_graphs import Case, integers, random, rewrite, run, steps, text_of

onnx = pytest.importorskip("onnx")

_X = {"x": random(5, 4)}
_PICTURE = {"x": random(1, 2, 4, 4)}
_IDS = {"ids": np.array([[1, 5], [0, 2]])}
_WEIGHT = {"w": integers(4, 3), "ws": steps(3), "wz": np.zeros(3, np.int8), "b": random(3)}
_KERNEL = {"w": integers(3, 2, 2, 2), "ws": steps(3), "wz": np.zeros(3, np.int8), "b": random(3, seed=1)}
_DQ = "d = DequantizeLinear(q, xs, xz)  v = DequantizeLinear<axis=1>(w, ws, wz)"
_CONV_DQ = "d = DequantizeLinear(q, xs, xz)  v = DequantizeLinear<axis=0>(w, ws, wz)"
_MEAN = {"axes": np.array([2, 3])}

CASES = (
    Case(cleanup.remove_identities, "(float[5,4] x) => (float[5,4] y) { a = Identity(x)  y = Neg(a) }", {}, _X),
    Case(
        cleanup.compose_transposes,
        "(float[2,3,4] x) => (float[3,2,4] y) "
        "{ a = Transpose<perm=[2,0,1]>(x)  c = Transpose<perm=[2,1,0]>(a)  y = Neg(c) }",
        {},
        {"x": random(2, 3, 4)},
    ),
    Case(
        cleanup.write_residuals_as_sums,
        "(float[5,4] x, float[5,4] z) => (float[5,4] y) { a = Add(x, z)  y = LayerNormalization<axis=-1>(a, g) }",
        {"g": random(4)},
        {**_X, "z": random(5, 4, seed=1)},
    ),
    Case(
        cleanup.divide_by_roots,
        "(float[5,4] x, float[5,1] z) => (float[5,4] y) { r = Sqrt(z)  i = Reciprocal(r)  y = Mul(x, i) }",
        {},
        {**_X, "z": np.abs(random(5, 1))},
        tolerance=1e-5,
    ),
    Case(
        fold.fold_weight_casts,
        "(float16[5,4] x, uint8[5,4] q) => (float16[5,3] y, float[5,4] z) { v = Cast<to=10>(w)  y = MatMul(x, v) "
        "o = Cast<to=2>(zero)  z = DequantizeLinear<axis=0>(q, s, o) }",
        {"w": random(4, 3), "s": steps(5), "zero": np.arange(5, dtype=np.int32)},
        {"x": random(5, 4).astype(np.float16), "q": np.arange(20, dtype=np.uint8).reshape(5, 4)},
        matches=2,
        tolerance=5e-3,  # onnxruntime multiplies in float32 and may leave the Cast to float16 out
    ),
    Case(
        fold.fold_weight_quantization,
        "(float[5,4] x) => (float[5,3] y) "
        "{ q = QuantizeLinear<axis=1>(w, ws, wz)  v = DequantizeLinear<axis=1>(q, ws, wz)  y = MatMul(x, v) }",
        {**_WEIGHT, "w": random(4, 3) * 0.3},
        _X,
    ),
    Case(
        fold.fold_weight_transposes,
        "(float[5,4] x) => (float[5,3] y) "
        "{ v = DequantizeLinear<axis=0>(w, ws, wz)  t = Transpose<perm=[1,0]>(v)  y = MatMul(x, t) }",
        {**_WEIGHT, "w": integers(3, 4)},
        _X,
    ),
    Case(
        lookup.look_up_integers,
        "(int64[2,2] ids) => (float[2,2,3] y) { v = DequantizeLinear<axis=0>(w, s, z)  y = Gather(v, ids) }",
        {"w": integers(6, 3), "s": steps(6), "z": integers(6, seed=1)},
        _IDS,
    ),
    Case(
        lookup.look_up_blocks,
        "(int64[2,2] ids) => (float[2,2,32] y) "
        "{ v = DequantizeLinear<axis=1, block_size=16>(w, s, z)  y = Gather(v, ids) }",
        {"w": integers(6, 32), "s": steps(6, 2), "z": np.zeros((6, 2), np.int8)},
        _IDS,
        opset=21,
    ),
    Case(
        moves.share_quantize,
        "(float[5,4] x) => (float[5,4] y) { p = QuantizeLinear(x, xs, xz)  q = QuantizeLinear(x, other, xz) "
        "c = DequantizeLinear(p, xs, xz)  d = DequantizeLinear(q, other, xz)  y = Add(c, d) }",
        {"other": np.array(0.02, np.float32)},
        _X,
    ),
    Case(
        moves.pool_means,
        "(uint8[1,2,4,4] q) => (uint8[1,2] y) "
        "{ d = DequantizeLinear(q, xs, xz)  m = ReduceMean<keepdims=0>(d, axes)  y = QuantizeLinear(m, ys, yz) }",
        _MEAN,
        {"q": integers(1, 2, 4, 4, low=0, high=255, dtype=np.uint8)},
        tolerance=1,
    ),
    Case(
        moves.lift_quantize,
        "(float[1,2,4,4] x) => (uint8[1,8] y) { r = Relu(x)  p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r) "
        "f = Flatten(p)  y = QuantizeLinear(f, ys, yz) }",
        {},
        _PICTURE,
        matches=3,
    ),
    Case(
        moves.sink_dequantize,
        "(uint8[2,4] q, float[3,6] x) => (float[4,2] y, float[3,4] z) { d = DequantizeLinear(q, xs, xz) "
        "y = Transpose<perm=[1,0]>(d)  v = DequantizeLinear<axis=0>(w, s)  t = Transpose<perm=[1,0]>(v)  z = MatMul(x, t) }",
        {"w": integers(4, 6), "s": steps(4)},
        {"q": integers(2, 4, low=0, high=255, dtype=np.uint8), "x": random(3, 6)},
        matches=2,
    ),
    Case(
        moves.cancel_quantize_pairs,
        "(uint8[2,4] q) => (float[2,4] y) "
        "{ d = DequantizeLinear(q, xs, xz)  r = QuantizeLinear(d, xs, xz)  y = DequantizeLinear(r, ys, xz) }",
        {},
        {"q": np.arange(8, dtype=np.uint8).reshape(2, 4) * 36},
    ),
    Case(
        layers.split_gemms,
        "(float[5,4] x) => (float[5,3] y) { v = DequantizeLinear<axis=1>(w, ws, wz)  y = Gemm(x, v, b) }",
        _WEIGHT,
        _X,
        tolerance=1e-6,
    ),
    Case(
        layers.split_all_gemms,
        f"(uint8[5,4] q) => (float[5,3] y) {{ {_DQ}  y = Gemm(d, v, b) }}",
        _WEIGHT,
        {"q": integers(5, 4, low=0, high=255, dtype=np.uint8)},
        tolerance=1e-5,
    ),
    Case(
        layers.quantize_biases,
        f"(uint8[5,4] q) => (float[5,3] y) {{ {_DQ}  y = Gemm(d, v, b) }}",
        _WEIGHT,
        {"q": integers(5, 4, low=0, high=255, dtype=np.uint8)},
        tolerance=3e-4,  # half a step of the bias
    ),
    Case(
        layers.dedicate_dequantize,
        "(uint8[2,4] q) => (float[2,4] y) { d = DequantizeLinear(q, xs, xz)  a = Neg(d)  c = Abs(d)  y = Add(a, c) }",
        {},
        {"q": integers(2, 4, low=0, high=255, dtype=np.uint8)},
    ),
    Case(
        blocks.pack_products,
        "(float[5,32] x) => (float[5,3] y) "
        "{ v = DequantizeLinear<axis=0, block_size=16>(w, s, z)  p = MatMul(x, v)  y = Add(p, b) }",
        {"w": integers(32, 3), "s": steps(2, 3), "z": integers(2, 3, seed=2), "b": random(3)},
        {"x": random(5, 32)},
        tolerance=0.05,  # x is rounded to int8
        opset=21,
    ),
    Case(
        blocks.pack_weight_only,
        "(float[5,20] x) => (float[5,3] y) { v = DequantizeLinear<axis=1>(w, ws, wz)  p = MatMul(x, v)  y = Sum(p, b) }",
        {**_WEIGHT, "w": integers(20, 3)},
        {"x": random(5, 20)},
        tolerance=0.1,  # x is rounded to int8
    ),
    Case(
        products.multiply_dynamic,
        "(float[5,4] x) => (float[5,3] y) { q, s, z = DynamicQuantizeLinear(x)  d = DequantizeLinear(q, s, z) "
        "v = DequantizeLinear<axis=1>(w, ws, wz)  p = MatMul(d, v)  y = Add(p, b) }",
        _WEIGHT,
        _X,
        tolerance=1e-5,
    ),
    Case(
        products.multiply_quantized,
        "(uint8[5,4] q, uint8[4,3] r) => (uint8[5,3] y) { d = DequantizeLinear(q, xs, xz) "
        "v = DequantizeLinear(r, zs, zz)  p = MatMul(d, v)  y = QuantizeLinear(p, zs, zz) }",
        {},
        {
            "q": integers(5, 4, low=0, high=255, dtype=np.uint8),
            "r": integers(4, 3, low=0, high=255, dtype=np.uint8, seed=1),
        },
        tolerance=1,
    ),
    Case(
        products.multiply_integers,
        f"(uint8[5,4] q) => (float[5,3] y) {{ {_DQ}  y = MatMul(d, v) }}",
        {**_WEIGHT, "wz": integers(3, low=-5, high=5)},
        {"q": integers(5, 4, low=0, high=255, dtype=np.uint8)},
        tolerance=1e-5,
    ),
    Case(
        products.fuse_products,
        "(uint8[5,4] q) => (float[5,3] y) { i = MatMulInteger(q, w, xz)  c = Cast<to=1>(i)  s = Mul(xs, ws) "
        "m = Mul(c, s)  y = Add(m, b) }",
        _WEIGHT,
        {"q": integers(5, 4, low=0, high=255, dtype=np.uint8)},
        tolerance=1e-5,
    ),
    Case(
        convolutions.convolve_dynamic,
        "(float[1,2,4,4] x) => (float[1,3,3,3] y) { q, s, z = DynamicQuantizeLinear(x) "
        "d = DequantizeLinear(q, s, z)  v = DequantizeLinear<axis=0>(w, ws, wz)  y = Conv(d, v, b) }",
        _KERNEL,
        _PICTURE,
        tolerance=1e-5,
    ),
    Case(
        convolutions.convolve_quantized,
        f"(uint8[1,2,4,4] q) => (uint8[1,3,2,2] y) {{ {_CONV_DQ}  c = DequantizeLinear<axis=0>(i, bs) "
        "p = Conv<strides=[2,2]>(d, v, c)  y = QuantizeLinear(p, zs, zz) }",
        {**_KERNEL, "i": integers(3, dtype=np.int32), "bs": _KERNEL["ws"] * np.float32(0.02)},
        {"q": integers(1, 2, 4, 4, low=0, high=255, dtype=np.uint8)},
        tolerance=1,
    ),
    Case(
        convolutions.convolve_integers,
        f"(uint8[1,2,4,4] q) => (float[1,3,3,3] y) {{ {_CONV_DQ}  y = Conv(d, v, b) }}",
        _KERNEL,
        {"q": integers(1, 2, 4, 4, low=0, high=255, dtype=np.uint8)},
        tolerance=1e-5,
    ),
)
_ELSEWHERE = {
    fold.clip_reduced_ranges,
    blocks.check_formats,
    widen_bfloat16,
}  # in test_onnx_formats.py and test_target_onnx.py


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_text(case: Case, golden: Callable[[str, str], None]) -> None:
    before = case.model()
    after, count, _ = rewrite(before, case.function)
    assert count == case.matches
    golden(f"onnx_{case.name}", f"{text_of(before)}\n\nafter {name_of(case.function)}:\n\n{text_of(after)}")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_numbers(case: Case) -> None:
    after, _, _ = rewrite(case.model(), case.function)
    onnx.checker.check_model(after)
    for want, have in zip(run(case.model(), case.feeds), run(after, case.feeds), strict=True):
        assert have.dtype == want.dtype
        assert np.abs(have.astype(np.float64) - want.astype(np.float64)).max() <= case.tolerance


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_twice_is_once(case: Case) -> None:
    after, _, _ = rewrite(case.model(), case.function)
    again, count, _ = rewrite(after, case.function)
    assert (count, text_of(again)) == (0, text_of(after))


_FUNCTIONS = tuple(dict.fromkeys(item for passes in FORMS.values() for item in passes))


@pytest.mark.parametrize("function", _FUNCTIONS, ids=name_of)
def test_nothing_to_do(function: Callable[..., int]) -> None:
    text = "(float[5,4] x) => (float[5,3] y) { p = MatMul(x, w)  a = Add(p, b)  r = Relu(a)  y = Softmax(r) }"
    model = Case(function, text, {"w": random(4, 3), "b": random(3)}).model()
    after, count, _ = rewrite(model, function)
    assert (count, text_of(after)) == (0, text_of(rewrite(model, lambda draft: 0)[0]))


def test_every_pass_has_a_case() -> None:
    assert {case.function for case in CASES} | _ELSEWHERE == set(_FUNCTIONS)
