"""Schemes, scales and zero points."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphprune.errors import PassError, RecipeError
from graphprune.quant import (
    ACTIVATION_UINT8,
    WEIGHT_INT8,
    MinMax,
    QuantDtype,
    Scheme,
    choose_qparams,
    dequantize,
    dynamic_qparams,
    fake_quantize,
    parse_scheme,
    quantize,
    quantize_range,
)

SCHEMES = [
    parse_scheme(f"{kind}:tensor{reduced}")
    for kind in ("int8:symmetric", "int8:affine", "uint8:affine")
    for reduced in ("", ":reduced")
] + [parse_scheme(f"{kind}:tensor") for kind in ("int4:symmetric", "int4:affine", "uint4:affine")]
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def test_presets():
    assert (WEIGHT_INT8.qmin, WEIGHT_INT8.qmax, WEIGHT_INT8.axis) == (-127, 127, 0)
    assert (ACTIVATION_UINT8.qmin, ACTIVATION_UINT8.qmax, ACTIVATION_UINT8.axis) == (0, 255, None)
    assert Scheme(QuantDtype.INT8, symmetric=False).qmin == -128


def test_ranges():
    expected = {
        "int8:symmetric": (-127, 127),
        "int8:affine": (-128, 127),
        "uint8:affine": (0, 255),
        "int8:symmetric:reduced": (-64, 64),
        "int8:affine:reduced": (-64, 63),
        "uint8:affine:reduced": (0, 127),
        "int4:symmetric": (-7, 7),
        "int4:affine": (-8, 7),
        "uint4:affine": (0, 15),
    }
    found = {str(scheme).replace(":tensor", ""): (scheme.qmin, scheme.qmax) for scheme in SCHEMES}
    assert found == expected
    assert [kind.bits for kind in QuantDtype] == [8, 8, 4, 4]
    assert QuantDtype.INT4.torch_dtype == torch.int8
    assert QuantDtype.UINT4.torch_dtype == torch.uint8


@st.composite
def schemes(draw):
    dtype = draw(st.sampled_from(QuantDtype))
    group = draw(st.none() | st.integers(1, 100).map(lambda half: 2 * half))
    return Scheme(
        dtype,
        symmetric=dtype.signed and draw(st.booleans()),
        axis=draw(st.sampled_from([0, 1]) if group else st.none() | st.integers(0, 9)),
        group=group,
        reduced=dtype.bits == 8 and draw(st.booleans()),
    )


@given(schemes())
def test_scheme_text(scheme):
    assert parse_scheme(str(scheme)) == scheme
    assert parse_scheme(f" {str(scheme).upper()} ") == scheme


def test_scheme_texts_of_old_and_new_kind():
    assert str(WEIGHT_INT8) == "int8:symmetric:channel"
    assert parse_scheme("int8:symmetric:axis0") == WEIGHT_INT8
    assert parse_scheme("int4:affine:axis1:group64") == Scheme(QuantDtype.INT4, False, 1, 64)
    assert parse_scheme("int8:symmetric:channel:reduced") == Scheme(QuantDtype.INT8, True, 0, reduced=True)


def test_scheme_refusals():
    with pytest.raises(RecipeError, match="cannot be symmetric"):
        parse_scheme("uint8:symmetric:tensor")
    with pytest.raises(RecipeError, match="did you mean 'int8:symmetric:channel'"):
        parse_scheme("int8:symetric:channel")
    for text, message in {
        "uint4:symmetric:tensor": "uint4 has no numbers below 0.* use int4",
        "int4:symmetric:tensor:group32": "needs a channel axis of 0 or 1, got none",
        "int4:symmetric:axis2:group32": "needs a channel axis of 0 or 1, got 2",
        "int4:symmetric:channel:group7": "not an even number.*packs two",
        "int4:symmetric:channel:group0": "not an even number",
        "int4:symmetric:channel:reduced": "int4 cannot be reduced",
        "int8:symmetric:channel:reduced:group8": "unknown quantization scheme",
        "int16:symmetric:tensor": "unknown quantization scheme",
    }.items():
        with pytest.raises(RecipeError, match=message):
            parse_scheme(text)
    with pytest.raises(RecipeError, match="negative"):
        Scheme(QuantDtype.INT8, symmetric=True, axis=-1)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@given(values=st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1, max_size=20))
def test_roundtrip_within_half_a_scale(scheme, values):
    x = torch.tensor(values)
    scale, zero_point = choose_qparams(x.min(), x.max(), scheme)
    assert scale.dtype == torch.float32
    assert zero_point.dtype == torch.int32
    assert bool(scale.isfinite())
    assert float(scale) > 0
    assert scheme.qmin <= int(zero_point) <= scheme.qmax
    if scheme.symmetric:
        assert int(zero_point) == 0
    q = quantize(x, scale, zero_point, scheme)
    assert q.dtype == scheme.dtype.torch_dtype
    assert scheme.qmin <= int(q.min())
    assert int(q.max()) <= scheme.qmax
    back = dequantize(q, scale, zero_point)
    error = (back.double() - x.double()).abs()
    assert bool((error <= float(scale) * 0.5 * (1 + 1e-4)).all())
    assert torch.equal(fake_quantize(x, scale, zero_point, scheme), back)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@given(low=FLOATS, high=FLOATS)
def test_zero_is_exact_whatever_the_range(scheme, low, high):
    low, high = sorted((low, high))
    scale, zero_point = choose_qparams(torch.tensor(low), torch.tensor(high), scheme)
    zeros = torch.tensor([0.0, -0.0])
    assert quantize(zeros, scale, zero_point, scheme).tolist() == [int(zero_point)] * 2
    assert fake_quantize(zeros, scale, zero_point, scheme).tolist() == [0.0, 0.0]


@given(st.integers(0, 2**16), st.sampled_from([0, 1]))
def test_masks_survive(seed, axis):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(6, 8, generator=generator) < 0.4
    weight = torch.randn(6, 8, generator=generator) * mask
    scheme = Scheme(QuantDtype.INT8, symmetric=True, axis=axis)
    scale, zero_point = choose_qparams(*MinMax().tensor_range(weight, scheme), scheme)
    assert scale.shape == (weight.shape[axis],)
    assert not zero_point.any()
    q = quantize(weight, scale, zero_point, scheme)
    assert bool((q[~mask] == 0).all())
    assert bool((fake_quantize(weight, scale, zero_point, scheme)[~mask] == 0).all())
    largest = q.abs().amax(1 - axis)
    assert bool(((largest == 127) | (largest == 0)).all())


def test_degenerate_and_extreme_ranges():
    zero = torch.zeros(())
    for scheme in SCHEMES:
        scale, zero_point = choose_qparams(zero, zero, scheme)
        assert float(scale) == 1.0
        assert int(zero_point) == (0 if scheme.symmetric else scheme.qmin)
        most = torch.tensor(torch.finfo(torch.float32).max)
        assert bool(choose_qparams(-most, most, scheme)[0].isfinite())
        tiny = torch.tensor(1e-45)
        assert float(choose_qparams(-tiny, tiny, scheme)[0]) == torch.finfo(torch.float32).tiny
    scale, zero_point = choose_qparams(torch.tensor(2.0), torch.tensor(5.1), ACTIVATION_UINT8)
    assert float(scale) == pytest.approx(0.02)
    assert int(zero_point) == 0


def test_rounding_saturation_and_dtype():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1e9, -1e9, math.inf, -math.inf])
    one, zero = torch.tensor(1.0), torch.tensor(0)
    q = quantize_range(x, one, zero, qmin=-127, qmax=127)
    assert q.dtype == torch.int32
    assert q.tolist() == [0, 2, 2, 0, -2, 127, -127, 127, -127]
    half = torch.tensor([0.25, 1.0]).bfloat16()
    assert fake_quantize(half, torch.tensor(0.5), torch.tensor(3), ACTIVATION_UINT8).dtype == torch.bfloat16


def test_qparams_refusals():
    for low, high in ((1.0, 0.0), (math.nan, 1.0), (0.0, math.inf)):
        with pytest.raises(PassError, match="finite low <= high"):
            choose_qparams(torch.tensor(low), torch.tensor(high), ACTIVATION_UINT8)
    with pytest.raises(PassError, match="low is of shape"):
        choose_qparams(torch.zeros(2), torch.zeros(3), WEIGHT_INT8)
    with pytest.raises(PassError, match="give an axis"):
        quantize(torch.ones(2, 2), torch.ones(2), torch.zeros(2), ACTIVATION_UINT8)
    with pytest.raises(PassError, match="along axis 0"):
        quantize(torch.ones(2, 2), torch.ones(3), torch.zeros(3), WEIGHT_INT8)


def test_qparams_shape():
    assert ACTIVATION_UINT8.qparams_shape((2, 3)) == ()
    assert WEIGHT_INT8.qparams_shape((5, 3, 2, 2)) == (5,)
    assert parse_scheme("int4:symmetric:channel:group4").qparams_shape((5, 12)) == (5, 3)
    assert parse_scheme("int4:symmetric:axis1:group4").qparams_shape((12, 5)) == (3, 5)
    with pytest.raises(PassError, match=r"dimension 1 of a weight of shape \(5, 10\) has 10 .* group 4"):
        parse_scheme("int4:symmetric:channel:group4").qparams_shape((5, 10))
    with pytest.raises(PassError, match="2-D"):
        parse_scheme("int4:symmetric:channel:group4").qparams_shape((5, 4, 1))
    with pytest.raises(PassError, match="no axis 0"):
        WEIGHT_INT8.qparams_shape(())


@given(st.sampled_from(SCHEMES), st.sampled_from([0, 1]), st.sampled_from([2, 4, 6]), st.integers(0, 2**16))
def test_groups_equal_slices(plain, axis, group, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 24, generator=generator) * (torch.rand(12, 24, generator=generator) < 0.7)
    scheme = Scheme(plain.dtype, plain.symmetric, axis, group, plain.reduced)
    low, high = MinMax().tensor_range(x, scheme)
    scale, zero_point = choose_qparams(low, high, scheme)
    assert scale.shape == zero_point.shape == scheme.qparams_shape(x.shape)
    q = quantize(x, scale, zero_point, scheme)
    assert q.dtype == scheme.dtype.torch_dtype
    assert int(q.min()) >= scheme.qmin
    assert int(q.max()) <= scheme.qmax
    fake = fake_quantize(x, scale, zero_point, scheme)
    assert torch.equal(fake, dequantize(q, scale, zero_point, axis, group))
    across = Scheme(plain.dtype, plain.symmetric, axis, reduced=plain.reduced)
    for index in range(x.shape[1 - axis] // group):
        piece, part = x.narrow(1 - axis, index * group, group), scale.select(1 - axis, index)
        assert torch.equal(
            fake.narrow(1 - axis, index * group, group),
            fake_quantize(piece, part, zero_point.select(1 - axis, index), across),
        )
    assert bool((fake[x == 0] == 0).all())
    full = scale.repeat_interleave(group, 1 - axis)
    assert bool(((x - fake).abs() <= full * 0.5 * (1 + 1e-4)).all())


@given(st.sampled_from(SCHEMES), st.integers(0, 2**16))
def test_fake_quantize_twice_is_once(scheme, seed):
    x = torch.randn(200, generator=torch.Generator().manual_seed(seed)) * 10 ** (seed % 7 - 3)
    scale, zero_point = choose_qparams(x.min(), x.max(), scheme)
    once = fake_quantize(x * 1.5, scale, zero_point, scheme)  # some saturate
    assert torch.equal(fake_quantize(once, scale, zero_point, scheme), once)


def test_group_refusals():
    scheme = parse_scheme("int4:symmetric:channel:group4")
    with pytest.raises(PassError, match="group that divides"):
        quantize(torch.ones(2, 6), torch.ones(2, 2), torch.zeros(2, 2), scheme)
    with pytest.raises(PassError, match=r"shape \(2, 2\), got \(2,\)"):
        fake_quantize(torch.ones(2, 8), torch.ones(2), torch.zeros(2), scheme)
    with pytest.raises(PassError, match="axis 0 or 1"):
        dequantize(torch.ones(2, 8), torch.ones(()), torch.zeros(()), None, 4)


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=20))
def test_dynamic_qparams_by_the_formula_in_numpy(values):
    x = np.array(values, dtype=np.float32)
    low, high = min(x.min(), np.float32(0)), max(x.max(), np.float32(0))
    width = (high - low) / np.float32(255)
    scale, zero_point = dynamic_qparams(torch.from_numpy(x))
    assert scale.dtype == torch.float32
    assert zero_point.dtype == torch.int32
    assert 0 <= int(zero_point) <= 255
    if width < np.finfo(np.float32).tiny:
        return
    assert float(scale) == width
    assert int(zero_point) == np.rint(np.clip(-low / width, 0, 255))


def test_dynamic_qparams_of_nothing():
    for x in (torch.zeros(3, 2), torch.zeros(0, 2), torch.tensor([-0.0])):
        assert [float(part) for part in dynamic_qparams(x)] == [1.0, 0.0]
    assert dynamic_qparams(torch.ones(2).bfloat16())[0].dtype == torch.float32


def test_dynamic_qparams_equal_onnxruntime():
    pytest.importorskip("onnxruntime")
    session = _dynamic_session()
    generator = torch.Generator().manual_seed(0)
    cases = [torch.zeros(4), torch.tensor([0.5, 1.5, 2.5, 255.0]), torch.tensor([-127.5, 127.5]), torch.tensor([-3.0])]
    for index in range(200):
        shift = torch.randn((), generator=generator)
        cases.append(torch.randn(37, generator=generator) * 10.0 ** (index % 9 - 4) + shift)
    for x in cases:
        q, scale, zero_point = session.run(None, {"x": x.numpy()})
        ours = dynamic_qparams(x)
        assert (float(ours[0]), int(ours[1])) == (float(scale), int(zero_point))
        assert quantize(x, *ours, ACTIVATION_UINT8).tolist() == q.tolist()


def _dynamic_session():
    import onnxruntime
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero_point"])],
        "dynamic",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [
            helper.make_tensor_value_info("q", TensorProto.UINT8, ["n"]),
            helper.make_tensor_value_info("scale", TensorProto.FLOAT, []),
            helper.make_tensor_value_info("zero_point", TensorProto.UINT8, []),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
