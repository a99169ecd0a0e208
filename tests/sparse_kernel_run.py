"""Check the kernels of target sparse-cpu in this process, and print what is wrong as JSON: ``python -m tests.sparse_kernel_run``.

Which kernels it checks says the environment variable GRAPHPRUNE_SPARSE_CPU_ISA, which is read once a process.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from graphprune.errors import LoweringError
from graphprune.ir.sparse_operators import (
    ACTIVATIONS,
    PANEL,
    RESULTS,
    attention,
    pack,
    pack_bytes,
    sparse_linear,
    sparse_linear_int8,
)
from graphprune.sparsity.packed import pack_matrix
from graphprune.targets.sparse_cpu.building import load_kernels
from tests.sparse_kernel_layers import (
    FEATURES,
    SHAPES,
    STEP,
    TOKENS,
    ZERO,
    Floats,
    Integers,
    activate,
    bytes_of,
    expect_close,
    expect_equal,
    layers,
    rows_of,
)  # fmt: skip


def check_panels() -> None:
    """Rows go into panels and come out; what is left of a panel is zero."""
    for tokens, features in itertools.product((0, *TOKENS), FEATURES):
        x = torch.randn(tokens, features) * 3
        panels = pack(x)
        expect_equal(f"pack {x.shape}", rows_of(panels, tokens), x)
        assert panels.shape == (math.ceil(tokens / PANEL), features, PANEL)
        assert not bool(panels.transpose(1, 2).reshape(-1, features)[tokens:].any()), (
            f"{x.shape} is not padded with zeros"
        )
        grid = pack_bytes(x, STEP, ZERO)
        expect_equal(f"pack_bytes {x.shape}", rows_of(grid, tokens).long(), bytes_of(x))
        padding = rows_of(grid, grid.shape[0] * PANEL)[tokens:]
        assert bool((padding == ZERO).all()), f"bytes of {x.shape} are not padded with zeros"


def check_rounding() -> None:
    """Halves go to the even neighbor, and what is too large to the end, however large."""
    halves = torch.arange(-300.0, 300.0) + 0.5
    for scale, zero in itertools.product((1.0, 0.5, 0.07), (0, 3, 128, 255)):
        x = torch.cat([halves * scale, torch.tensor([3e38, -3e38, math.inf, -math.inf, 0.0, -0.0, 1e-40])]).unsqueeze(1)
        want = (torch.round(x / scale) + zero).clamp(0, 255).to(torch.uint8)
        expect_equal(f"scale={scale} zero_point={zero}", rows_of(pack_bytes(x, scale, zero), len(x)), want)


def check_strides() -> None:
    """Inputs whose memory is in another order, in two to four dimensions."""
    big = torch.randn(6, 14, 40)
    for x in (
        big.transpose(0, 1), big.transpose(1, 2), big.permute(2, 0, 1), big[::2], big[:, 1:, 3:], big[..., ::3], big[0],
        big[0, 0], big[:, :1].expand(6, 9, 40), big.unsqueeze(1), torch.randn(1, 1).expand(70, 5),
    ):  # fmt: skip
        flat = x.reshape(-1, x.shape[-1])
        expect_equal(f"pack of strides {x.stride()}", rows_of(pack(x), len(flat)), flat.contiguous())
        grid = rows_of(pack_bytes(x, STEP, ZERO), len(flat))
        expect_equal(f"pack_bytes of strides {x.stride()}", grid.long(), bytes_of(flat))


def check_strided_residuals() -> None:
    """A residual whose memory is in another order."""
    for layer in (Floats(70, 20, 30, 0.4, 4), Integers(70, 20, 30, 0.4, 4)):
        want = layer.run(True, layer.residual)
        expect_equal(layer.name, layer.run(True, layer.residual.t().contiguous().t()), want)


def check_floats() -> None:
    for layer in layers(Floats):
        expect_close(layer.name, layer.run(), layer.sums, layer.sums)


def check_float_epilogues() -> None:
    """Each activation with and without bias and residual, in the three forms of a result."""
    for (tokens, rows), block in itertools.product(((70, 37), (64, 16), (5, 48), (130, 3)), (1, 4)):
        layer = Floats(tokens, rows, 33, 0.3, block)
        for bias, residual, activation in itertools.product((False, True), (False, True), ACTIVATIONS):
            what = f"{layer.name} bias={bias} residual={residual} {activation}"
            given = layer.residual if residual else None
            have = layer.run(bias, given, activation)
            expect_close(what, have, layer.want(bias, residual, activation), layer.want(bias, residual, "none"))
            panels = layer.run(bias, pack(given) if given is not None else None, activation, "panels")
            assert panels.shape == (math.ceil(tokens / PANEL), rows, PANEL)
            expect_equal(f"{what} in panels", rows_of(panels, tokens), have)
            if not residual:
                grid = layer.run(bias, None, activation, "bytes", STEP, ZERO)
                assert grid.dtype is torch.uint8
                expect_equal(f"{what} in bytes", rows_of(grid, tokens).long(), bytes_of(have))


def check_activations() -> None:
    """Of numbers from the middle to far away, in which a layer of weight 1 changes nothing before them."""
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.logspace(-8, 6, 200), -torch.logspace(-8, 6, 200)]).unsqueeze(1)
    packed = pack_matrix(torch.ones(1, 1), 1)
    parts = (packed.values, packed.columns, packed.starts)
    for activation in ACTIVATIONS:
        y = sparse_linear(pack(x), *parts, None, None, (len(x),), 1, activation)
        error = (y.double() - activate(x.double(), activation)).abs()
        assert bool((error <= 2e-6 * x.abs().clamp(min=1e-3)).all()), f"{activation} is off by {float(error.max())}"


def check_bfloat16() -> None:
    """Weights of 16 bits are multiplied as the floats that they are."""
    for number, shape in enumerate(SHAPES[::3]):
        layer = Floats(*shape, 0.4, (1, 4)[number % 2])
        values, *rest = layer.parts
        layer.parts = (values.bfloat16().float(), *rest)
        want = layer.run(True, layer.residual, "relu")
        layer.parts = (values.bfloat16(), *rest)
        expect_equal(layer.name, layer.run(True, layer.residual, "relu"), want)


def check_integers() -> None:
    """Sums are exact, and so is the float that they become."""
    for layer in layers(Integers):
        expect_equal(layer.name, layer.run(), layer.floats)
        layer.scales.fill_(1.0)
        expect_equal(f"{layer.name} sums", layer.run().long(), layer.sums)


def check_integer_epilogues() -> None:
    """Bits of results without gelu; with it, bytes are those of the float result."""
    for (tokens, rows), block in itertools.product(((70, 37), (64, 16), (5, 48), (130, 3)), (1, 4)):
        layer = Integers(tokens, rows, 33, 0.3, block)
        for bias, residual, activation in itertools.product((False, True), (False, True), ACTIVATIONS):
            what = f"{layer.name} bias={bias} residual={residual} {activation}"
            given = layer.residual if residual else None
            have, want = layer.run(bias, given, activation), layer.want(bias, residual, activation)
            if activation in ("none", "relu"):
                expect_equal(what, have, want)
            expect_close(what, have, want.double(), layer.want(bias, residual, "none"))
            panels = layer.run(bias, pack(given) if given is not None else None, activation, "panels")
            expect_equal(f"{what} in panels", rows_of(panels, tokens), have)
            if not residual:
                grid = layer.run(bias, None, activation, "bytes", STEP, ZERO)
                expect_equal(f"{what} in bytes", rows_of(grid, tokens).long(), bytes_of(have))


def check_extremes() -> None:
    """The largest products that bytes have, in rows of 3,072: nothing saturates."""
    for block, (low, high) in itertools.product((1, 4), ((-128, -128), (127, 127), (-128, 127))):
        layer = Integers(20, 17, 3072, 1.0, block)
        layer.x = torch.where(torch.rand_like(layer.x) < 0.9, 100.0, -100.0)
        layer.weight = torch.where(torch.rand(layer.weight.shape) < 0.5, low, high).to(torch.int8)
        layer.pack(block)
        expect_equal(f"{layer.name} weights of {low} and {high}", layer.run(), layer.floats)


def check_corners() -> None:
    """No tokens, nothing but zeros, nothing but weights, columns up to the last that has a number."""
    for layer in (Floats(0, 20, 30, 0.4, 4), Integers(0, 20, 30, 0.4, 4), Floats(0, 20, 30, 0.4, 1)):
        for result, shape in (("rows", (0, 20)), ("panels", (0, 20, PANEL)), ("bytes", (0, 20, PANEL))):
            have = layer.run(True, None, "gelu", result, STEP, ZERO)
            assert have.shape == shape, f"{layer.name}: {result} are {have.shape}"
        assert layer.run(True, layer.residual).shape == (0, 20)
    for block, density in itertools.product((1, 4), (0.0, 1.0)):
        floats = Floats(70, 37, 50, density, block)
        expect_close(floats.name, floats.run(True), floats.want(True, False, "none"), floats.want(True, False, "none"))
        integers = Integers(70, 37, 50, density, block)
        expect_equal(integers.name, integers.run(True), integers.want(True, False, "none"))
        wide = Floats(3, 5, 2**16, 0.0, block)
        wide.weight[1, 2**16 - 1], wide.weight[4, 2**15] = 2.0, -4.0
        packed = pack_matrix(wide.weight, block)
        wide.parts = (packed.values, packed.columns, packed.starts)
        expect_equal(wide.name, wide.run().double(), wide.x.double() @ wide.weight.double().t())


def check_sizes() -> None:
    """Results in rows have the sizes of the tokens, however many."""
    layer = Floats(60, 20, 30, 0.4, 4)
    for sizes in ((60,), (1, 60), (60, 1), (3, 4, 5), (2, 3, 2, 5)):
        have = sparse_linear(pack(layer.x.view(*sizes, 30)), *layer.parts, None, None, sizes, 20)
        expect_equal(f"sizes {sizes}", have, layer.run().view(*sizes, 20))


def check_threads() -> None:
    """The same bits, whatever number of threads shares the work, and whatever number calls at the same time."""
    made: list[tuple[Any, tuple[Any, ...]]] = []
    for kind, tokens, block in itertools.product((Floats, Integers), (3, 64, 200), (1, 4)):
        made.append((kind(tokens, 150, 80, 0.2, block), (True, None, "gelu", "rows")))
        made.append((kind(tokens, 150, 80, 0.2, block), (True, None, "relu", "bytes", STEP, ZERO)))
    before = torch.get_num_threads()
    torch.set_num_threads(1)

    def of(layer: Any, options: tuple[Any, ...]) -> Tensor:
        result: Tensor = layer.run(*options)
        return rows_of(result, len(layer.x)) if result.dtype is torch.uint8 else result

    want = [of(*call) for call in made]
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        for call, right in zip(made, want, strict=True):
            expect_equal(f"{call[0].name} with {threads} threads", of(*call), right)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda call: of(*call), made * 12))
        for call, have, right in zip(made * 12, found, want * 12, strict=True):
            expect_equal(f"{call[0].name} among others", have, right)
    torch.set_num_threads(before)


def check_attention() -> None:
    """As torch's attention, for sizes on and off the borders of panels and registers, and every kind of mask."""
    for batch, heads, queries, keys, features in (
        (2, 3, 7, 9, 16), (1, 2, 64, 64, 64), (2, 2, 65, 130, 32), (1, 1, 5, 5, 96), (1, 2, 1, 200, 48), (3, 1, 20, 20, 64),
    ):  # fmt: skip
        q = torch.randn(batch, queries, heads, features).transpose(1, 2)
        k, v = (torch.randn(batch, keys, heads, features).transpose(1, 2) for _ in range(2))
        seen = torch.rand(batch, 1, 1, keys) > 0.3
        masks = {
            "no mask": None, "bool": seen, "expanded": seen.expand(batch, 1, queries, keys), "float": torch.randn(1, 1, queries, keys),
            "of each head": torch.rand(batch, heads, queries, keys) > 0.3, "by columns": (torch.rand(1, 1, keys, queries) > 0.3).mT,
        }  # fmt: skip
        for name, mask in masks.items():
            y = attention(q, k, v, mask, 0.2)
            want = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.2)
            blind = (
                None
                if mask is None or mask.dtype is not torch.bool
                else ~mask.expand(batch, heads, queries, keys).any(-1)
            )
            want = want if blind is None else want.masked_fill(blind.unsqueeze(-1), 0.0)
            expect_close(f"attention {q.shape} {k.shape} {name}", y, want, v)
            assert y.transpose(1, 2).is_contiguous()
            rounded = attention(q, k, v, mask, 0.2, False, True)
            assert (rounded - want).abs().max() <= 2**-6 * v.abs().max(), (
                f"bfloat16 attention {q.shape} {k.shape} {name}"
            )
        if queries == keys:
            want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2)
            expect_close(f"causal attention {q.shape}", attention(q, k, v, None, 0.2, True), want, v)
            rounded = attention(q, k, v, None, 0.2, True, True)
            assert (rounded - want).abs().max() <= 2**-6 * v.abs().max(), f"causal bfloat16 attention {q.shape}"
    q = torch.randn(1, 2, 5, 16)
    if load_kernels() == "avx512" and torch.cpu._is_avx512_bf16_supported():
        assert not torch.equal(attention(q, q, q, None, 1.0, False, True), attention(q, q, q, None, 1.0)), (
            "nothing is rounded"
        )
    for bfloat16 in (False, True):
        assert not bool(attention(q, q, q, torch.zeros(1, 1, 1, 5, dtype=torch.bool), 1.0, False, bfloat16).any())
        assert bool(attention(q, q, q * torch.nan, None, 1.0, False, bfloat16).isnan().all())
    assert attention(q[:, :, :0], q, q, None, 1.0).shape == (1, 2, 0, 16)
    if load_kernels() != "torch":
        wide = torch.randn(1, 2, 5, 17)
        _refused(attention, {"q": wide, "k": wide, "v": wide, "mask": None, "scale": 1.0}, ("multiples of 16", "17"))
        _refused(
            attention,
            {"q": q, "k": q, "v": q, "mask": torch.ones(5, dtype=torch.int64), "scale": 1.0},
            ("bool or float32",),
        )


def check_errors() -> None:
    """Arguments that do not fit are refused with their names."""
    for layer, operator in (
        (Floats(70, 20, 30, 0.4, 4), sparse_linear),
        (Integers(70, 20, 30, 0.4, 4), sparse_linear_int8),
    ):
        names = [item.name for item in operator._schema.arguments]
        panels = pack(layer.x) if operator is sparse_linear else pack_bytes(layer.x, STEP, ZERO)
        right = (panels, *layer.parts, layer.bias, layer.residual, (70,), 20)
        given = {**dict(zip(names, right, strict=False)), "activation": "none", "result": "rows"}
        operator(**given)
        values, columns, starts = layer.parts[:3]
        stored = values.shape[0]
        wrong: list[tuple[dict[str, Any], tuple[str, ...]]] = [
            ({"panels": panels.double()}, ("panels must be", "Double")),
            ({"panels": panels[0]}, ("panels must be", "3 dimensions")),
            ({"panels": panels.transpose(1, 2).contiguous().transpose(1, 2)}, ("panels must be contiguous",)),
            ({"panels": panels[:1]}, ("panels", "do not hold 70 tokens")),
            ({"panels": panels[..., :32].contiguous()}, ("panels", "do not hold 70 tokens")),
            ({"sizes": (300,)}, ("do not hold 300 tokens",)),
            ({"sizes": (-70,)}, ("-70",)),
            ({"values": values.double()}, ("values must be", "Double")),
            ({"values": values.flatten()}, ("values must be", "dimensions")),
            ({"values": values[:-1]}, (f"there are {stored - 1}", "columns")),
            ({"values": values[:, :2].contiguous()}, ("blocks of 2 rows have no kernel",)),
            ({"columns": columns.int()}, ("columns must be contiguous int16",)),
            ({"columns": columns[:-1]}, (f"there are {stored}", "columns")),
            ({"starts": starts.long()}, ("starts must be", "Long")),
            ({"starts": starts[:-1]}, (f"starts has {len(starts) - 1} entries",)),
            ({"rows": 40}, ("40",)),
            ({"rows": -4}, ("-4",)),
            ({"bias": layer.bias[:-1]}, ("bias has 19 entries for 20 rows",)),
            ({"bias": layer.bias.double()}, ("bias must be", "Double")),
            ({"residual": layer.residual[:-1]}, ("the residual", "does not fit the result", "[69, 20]", "[70, 20]")),
            ({"residual": layer.residual.double()}, ("the residual",)),
            ({"result": "bytes"}, ("the residual", "does not fit")),
            ({"activation": "swish"}, ("there is no activation swish",)),
            ({"result": "columns"}, ("there is no result columns",)),
        ]
        if operator is sparse_linear_int8:
            wrong += [
                ({"correction": layer.correction[:-1]}, ("correction", "20 entries")),
                ({"correction": layer.correction.long()}, ("correction must be", "Long")),
                ({"scales": layer.scales[:-1]}, ("scales", "20 entries")),
                ({"scales": layer.scales.double()}, ("scales must be", "Double")),
            ]
        for change, words in wrong:
            _refused(operator, {**given, **change}, words)
    _refused(pack, {"x": torch.zeros(3, 4, dtype=torch.float64)}, ("activations must be float32", "Double"))
    _refused(pack, {"x": torch.tensor(1.0)}, ("activations must be float32",))
    _refused(pack_bytes, {"x": torch.zeros(3, 4).long(), "scale": 1.0, "zero_point": 0}, ("activations", "Long"))


def check_packed_that_are_damaged() -> None:
    """Beginnings of block rows that are not those of the blocks: nothing outside of them is read."""
    for layer, operator in (
        (Floats(70, 20, 30, 0.4, 4), sparse_linear),
        (Integers(70, 20, 30, 0.4, 4), sparse_linear_int8),
    ):
        panels = pack(layer.x) if operator is sparse_linear else pack_bytes(layer.x, STEP, ZERO)
        for at, value in ((-1, 10**6), (0, -(10**6)), (2, 10**6), (1, -5)):
            starts = layer.parts[2].clone()
            starts[at] = value
            parts = {"values": layer.parts[0], "columns": layer.parts[1], "starts": starts}
            more = {"correction": layer.correction, "scales": layer.scales} if isinstance(layer, Integers) else {}
            rest = {"bias": None, "residual": None, "sizes": (70,), "rows": 20}
            _refused(operator, {"panels": panels, **parts, **more, **rest}, ("starts",))


def _refused(operator: Any, arguments: dict[str, Any], words: tuple[str, ...]) -> None:
    said = None
    try:
        operator(**arguments)
    except RuntimeError as error:
        said = str(error)
    assert said is not None, f"{operator} takes what it should refuse with {words}"
    assert all(word in said for word in words), f"{said} does not say {words}"


def check_large() -> None:
    """Memory of large results goes to others when they are gone, and not before."""
    x = torch.randn(2**12 + 3, 64)  # a result of more than 256 KiB
    want = [pack(x[:64] + number) for number in range(6)]
    kept = [pack(x + number) for number in range(4)]
    del kept[:2]
    kept += [pack(x + number) for number in (4, 5)]  # both in what the first two left
    assert all(torch.equal(y[:1], w) for y, w in zip(kept, want[2:], strict=True)), "a result changed"
    del kept
    assert torch.equal(pack(x[: 2**12 - 64])[:1], want[0])
    pack(torch.zeros(2**20 + 3, 64))  # more than is kept in all
    assert torch.equal(pack(x)[:1], want[0])


EXACT: tuple[Callable[[], None], ...] = (
    check_panels, check_rounding, check_strides, check_strided_residuals, check_floats, check_float_epilogues,
    check_activations, check_bfloat16, check_integers, check_integer_epilogues, check_extremes, check_corners, check_sizes, check_threads,
    check_attention, check_large,
)  # fmt: skip
"""What holds for the meaning of the operators, with torch alone too."""
REFUSALS: tuple[Callable[[], None], ...] = (check_errors, check_packed_that_are_damaged)
"""What the compiled kernels check."""
assert RESULTS == ("rows", "panels", "bytes")


def main() -> None:
    try:
        isa = load_kernels()
    except LoweringError as error:
        print(json.dumps({"error": str(error)}))
        return
    failures = {}
    for check in (*EXACT, *(REFUSALS if isa != "torch" else ())):
        torch.manual_seed(0)
        try:
            check()
        except Exception as error:
            failures[check.__name__] = f"{type(error).__name__}: {error}"
        else:
            failures[check.__name__] = ""
    print(json.dumps({"isa": isa, "failures": failures}))


if __name__ == "__main__":
    with torch.no_grad():
        main()
