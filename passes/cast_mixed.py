"""Mixed precision as part of the graph, without autocast: products run in 16 bits, everything delicate in float32.

Before: ``layer_norm(linear(x, w, b))``.  After: ``layer_norm(to(linear(to(x, bf16), to(w, bf16), to(b, bf16)), f32))``; a value is cast
once for all that read it.  Weights stay float32 (the optimizer's copy) and their gradients arrive in float32; masks go before the
cast, so zeros stay zero.  With ``store=true``, for inference: weights that only casts read are stored in 16 bits, bitwise the
same outputs, and embedding tables too.  Outputs keep their dtype.  Each product rounds its operands and its result: about 2^-9 of
their size in bfloat16, 2^-12 in float16.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from graphprune.errors import PassError, RecipeError, suggest
from graphprune.ir.blocks import base_of
from graphprune.ir.casting import insert_casts, store_weights
from graphprune.ir.precision import (
    DTYPES,
    FOLLOWERS,
    PRODUCTS,
    Candidate,
    changed_later,
    dtypes_of,
    find_candidates,
    is_quantized,
    name_of,
    plan,
)
from graphprune.ir.program import Program
from graphprune.ir.selection import matching
from graphprune.ir.sites import users_of_value
from graphprune.pipeline.base import Coverage, Pass, PassResult


@dataclass(frozen=True)
class CastMixed(Pass):
    """Run linear layers, convolutions, matrix products and attention in 16 bits, and what lies between them.

    Normalizations, softmax, reductions, exponentials, powers and the loss stay in float32, and so do residual streams that only
    those read. Put it last: passes for masks may come before or after it, ``fold-conv-bn`` and quantizers before it. With
    float16, small gradients vanish unless the loss is scaled (``torch.amp.GradScaler``), and values above 65504 overflow.

    Attributes:
        dtype: ``bfloat16`` or ``float16``.
        keep: Operators to keep in float32 beyond those, by name, such as ``scaled_dot_product_attention`` or ``gelu``.
        store: Store weights in 16 bits where nothing reads them in float32: half the file, and no optimizer copy any more.
        select: Globs or ``re:`` expressions over modules and parameters of products to run in 16 bits; empty takes all. A product
            without a weight goes by its module.
        exclude: Names to leave in float32, in the same form.
        ops: Products to take, such as ``linear``; empty takes all.
    """

    name = "cast-mixed"

    dtype: str = "bfloat16"
    keep: tuple[str, ...] = ()
    store: bool = False
    select: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise PassError(f"dtype={self.dtype!r} is no 16-bit float format{suggest(self.dtype, DTYPES)}")

    def run(self, program: Program) -> PassResult:
        """Insert casts, and store weights in 16 bits where asked for."""
        dtype = DTYPES[self.dtype]
        _check_names("keep", self.keep, PRODUCTS | FOLLOWERS | {"embedding"})
        _check_names("ops", self.ops, PRODUCTS | {"embedding"})
        _check_dtypes(program)
        candidates = find_candidates(program, embeddings=self.store)
        left_out = self._left_out(program, candidates)
        chosen = [item for item in candidates if item.node not in left_out]
        if not chosen and not any(item.width is dtype for item in candidates):
            found = (
                "; ".join(sorted(set(left_out.values())))
                or "the model has no matrix products, convolutions or attention"
            )
            raise PassError(f"nothing is left to run in {self.dtype}: {found}")
        stored = casts = followers = 0
        if chosen:
            products = {item.node for item in chosen}
            parameters = {name for name, _ in program.named_parameters(remove_duplicate=False)}
            narrow = plan(program.graph, products, dtype, self.keep, parameters)
            casts, followers = insert_casts(program, dtype, narrow), len(narrow) - len(products)
        if self.store:
            stored = len(store_weights(program, dtype))
        program.recompile()
        names = dict.fromkeys(item.name for item in chosen)
        reasons = {item.name: left_out[item.node] for item in candidates if item.node in left_out}
        stats = {"products": len(chosen), "followers": followers, "casts": casts, "weights-stored": stored}
        coverage = Coverage(tuple(names), {name: why for name, why in reasons.items() if name not in names})
        return PassResult(program, bool(chosen or stored), stats, coverage)

    def _left_out(self, program: Program, candidates: tuple[Candidate, ...]) -> dict[fx.Node, str]:
        """Why products stay as they are."""
        selected = (
            matching(candidates, self.select, "select", "product")
            if self.select
            else {item.name for item in candidates}
        )
        refused = matching(candidates, self.exclude, "exclude", "product")
        fixed = changed_later(program.graph)
        left_out: dict[fx.Node, str] = {}
        for item in candidates:
            reason = None
            if item.width in DTYPES.values():
                reason = f"runs in {str(item.width).removeprefix('torch.')} already"
            elif item.name in refused:
                reason = "excluded by name"
            elif item.name not in selected:
                reason = "not selected"
            elif self.ops and item.op not in self.ops:
                reason = f"operator {item.op} is not among ops"
            elif item.op in self.keep:
                reason = f"operator {item.op} is among keep"
            elif is_quantized(item.node):
                reason = "fake-quantized: it computes on integers once it is lowered, and in float32 until then"
            elif base_of(item.node) in fixed:
                reason = "its result is changed in place and read afterwards"
            if reason is not None:
                left_out[item.node] = reason
        return left_out | _wide_tables(candidates, left_out)


def _wide_tables(candidates: tuple[Candidate, ...], left_out: Mapping[fx.Node, str]) -> dict[fx.Node, str]:
    """Embeddings whose table something else reads in float32: casting a whole table at each step would gain nothing."""
    narrow = {item.node for item in candidates if item.node not in left_out or "already" in left_out[item.node]}
    found = {}
    for item in candidates:
        table = item.node.args[0]
        if item.op == "embedding" and item.node in narrow and isinstance(table, fx.Node):
            others = [name_of(user) for user, _ in users_of_value(table) if user not in narrow]
            if others:
                found[item.node] = f"its table is read in float32 by {others[0]} too"
    return found


def _check_names(option: str, names: Iterable[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise RecipeError(f"{option}: {name!r} is no operator that could run in 16 bits{suggest(name, known)}")


def _check_dtypes(program: Program) -> None:
    """Refuse Programs that are not float32, or are not any more."""
    for node in program.graph.nodes:
        if node.op not in ("get_attr", "placeholder") or not dtypes_of(node):
            continue
        traced = dtypes_of(node)[0]
        now = program.tensor(str(node.target)).dtype if node.op == "get_attr" else traced
        if now is not traced:
            raise PassError(f"{node.target} is {now} and was traced as {traced}; call program.to({traced}) first")
        if traced not in (torch.float32, *DTYPES.values()):
            raise PassError(f"{node.target} is {traced}; mixed precision starts from float32: trace model.float()")
