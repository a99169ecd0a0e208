"""Prune a checkpoint that is larger than memory once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from graphprune.errors import GraphPruneError, SparsityError
from graphprune.ir.choosing import choose_masks, initial_scores
from graphprune.ir.masking import MaskedSite, masked_sites
from graphprune.ir.program import Program, attributes
from graphprune.ir.trace import trace
from graphprune.oneshot.batches import bind_batches
from graphprune.oneshot.names import match_names
from graphprune.oneshot.output import begin, finish
from graphprune.oneshot.plan import Plan, Stop, goal_of, make_plan
from graphprune.oneshot.progress import FOLDER, Keeper, load_live
from graphprune.oneshot.prune import Show, check_sites, steps_shown
from graphprune.oneshot.report import PrunedSite, PruneReport
from graphprune.oneshot.shards import Stored, copy_files, find_tensors, read_tensor
from graphprune.oneshot.skeleton import build_skeleton
from graphprune.oneshot.stored_weights import StoredWeights
from graphprune.oneshot.walk import Walker
from graphprune.oneshot.weights import Meter
from graphprune.pipeline.transform import transform


def prune_checkpoint(
    folder: Path | str,
    recipe: str,
    batches: Iterable[object],
    out: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    save_seconds: float = 300.0,
    progress: bool = False,
) -> PruneReport:
    """Prune a Hugging Face checkpoint once, reading each weight when it is needed.

    The model is traced without weights. Then the walk of ``prune`` goes through it: the result is bitwise that of ``prune`` in memory
    where the checkpoint has the dtype that is computed in. Pruned weights are rounded to the dtype of the checkpoint before
    later layers see them.

    Memory: weights, statistics of inputs (Hessians) and work space together take at most twice the bytes of one block of the
    model (its weights in ``dtype`` and the statistics of all its sites) and 2 MB, or the largest single tensor (an embedding)
    where that is more; ``PruneReport.peak_bytes`` counts them. A weight that is used several times, as in ALBERT, needs all
    weights between its first and its last use. Beside that there are the values that later layers need, for all batches, and
    what one batch computes between two pruned layers.

    It can be killed at any time: the same call goes on from the last state saved, and ends with bitwise the same files. A
    state holds the values that later layers need.

    Args:
        folder: Holds ``config.json`` and ``model.safetensors`` or shards with an index.
        recipe: Pipeline that inserts masks, all one-shot and not global, with criteria that need activations or no data.
        batches: As for ``prune``; the same at every call that goes on. Empty for criteria without data.
        out: Folder for the pruned checkpoint: files of the same names, with config, tokenizer and the like copied. New or empty,
            or what a killed run of the same request left.
        device: Where to compute.
        dtype: Float dtype to compute in.
        save_seconds: Least time between two states; 0 saves after every layer.
        progress: Show a progress bar.

    Returns:
        What was pruned, with the sparsity measured on the written files.

    Raises:
        GraphPruneError: A folder or file does not fit, or the request is another one than the one to go on with.
        SparsityError: As for ``prune``; also for criteria with gradients and for global scope, which need the whole model.
        TraceError: The model cannot be traced, or a batch does not fit it.
    """
    source, target = Path(folder), Path(out)
    index = find_tensors(source)
    model, buffers = build_skeleton(source)
    keys = match_names(model, index)
    program = _masked(model, recipe, dtype)
    sites = check_sites(program)
    for site in masked_sites(program):
        _check_streamed(site)
    needy = [site.decision.criterion for site in sites if site.criterion.needs_data]
    data = [_cast(batch, dtype) for batch in bind_batches(program, batches, needy)] if needy else []
    work = target / FOLDER
    meter = Meter()
    weights = StoredWeights(program, index, source, work, buffers, keys, device=torch.device(device), meter=meter)
    touched = {weights.index[key].file for site in sites for key in weights.keys(weights.checked(site.name))}
    state = begin(source, target, _request(program, source, index, data, dtype))
    weights.done.update(state.tokens)
    copy_files(source, work, sorted(name for name in touched if not (target / name).is_file()))
    keeper = Keeper(work, state, meter, save_seconds)
    with steps_shown(progress) as show:
        _choose_without_data(sites, weights, keeper, show)
        _walk(program, sites, weights, data, keeper, show)
    finish(source, target, index)
    return PruneReport(
        tuple(_measured(site, weights, target, state.tokens.get(site.name, 0)) for site in sites), len(data), state.peak
    )


def _masked(model: nn.Module, recipe: str, dtype: torch.dtype) -> Program:
    """The Program of a model without weights, with the masks of the recipe."""
    program: Program = trace(model).to(dtype)
    known = {str(node.target) for node in program.graph.find_nodes(op="get_attr")}
    program = transform(program, recipe, in_place=True).eval()
    masks = {f"{site.name}_mask" for site in masked_sites(program)}
    made = sorted(set(attributes(program)) - known - masks)
    if made:
        raise GraphPruneError(
            f"a pass of the recipe made {made[0]}, whose value depends on weights; prune a checkpoint with insert-masks alone and "
            f"run other passes on the result"
        )
    return program


def _check_streamed(site: MaskedSite) -> None:
    criterion, decision = site.criterion, site.decision
    if decision.locked:
        raise SparsityError(
            f"{site.name}: lock-masks looks at weights, which are read later here; prune the model in memory"
        )
    if criterion.needs_gradient or criterion.needs_samples:
        raise SparsityError(
            f"{site.name}: criterion {criterion} needs gradients through the whole model; load it and call "
            f"graphprune.oneshot.prune, or choose wanda, sparsegpt or magnitude"
        )
    if decision.share is None or decision.coupling:
        raise SparsityError(
            f"{site.name}: a checkpoint is pruned one weight after the other, so each needs its own sparsity and units: set "
            f"scope=local (not {decision.scope}) and a pattern of single layers (not {decision.pattern} of several)"
        )


def _cast(batch: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


def _request(
    program: Program,
    source: Path,
    index: Mapping[str, Stored],
    data: Sequence[Mapping[str, Tensor]],
    dtype: torch.dtype,
) -> str:
    """Hash of everything that decides the result."""
    found = hashlib.sha256(repr((program.history, str(dtype), sorted(index.items()))).encode())
    for name in sorted({place.file for place in index.values()}):
        status = (source / name).stat()
        found.update(repr((name, status.st_size, status.st_mtime_ns)).encode())
    for batch in data:
        for name, value in sorted(batch.items()):
            found.update(repr((name, tuple(value.shape), str(value.dtype))).encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@torch.no_grad()
def _choose_without_data(sites: Sequence[MaskedSite], weights: StoredWeights, keeper: Keeper, show: Show) -> None:
    """Prune sites whose criterion needs no data, one after the other."""
    todo = [site for site in sites if not site.criterion.needs_data and site.name not in weights.done]
    tick = show("without data", len(todo))
    for site in todo:
        weight = weights.read(site.name)
        shown = replace(site, weight=weight, mask=torch.ones_like(weight, dtype=torch.bool))
        (mask,) = choose_masks([shown], [goal_of(site)], initial_scores([shown]))
        weights.write(site, shown.logical_weight, mask)
        weights.drop()
        keeper.step({site.name: 0})
        tick()


def _walk(
    program: Program,
    sites: Sequence[MaskedSite],
    weights: StoredWeights,
    data: Sequence[Mapping[str, Tensor]],
    keeper: Keeper,
    show: Show,
) -> None:
    walked = [site for site in sites if site.criterion.needs_activations]
    plan = make_plan(program, walked, list(data[0]) if data else [])
    state = keeper.state
    if state.stops < len(plan.stops):
        walker = Walker(
            program, plan, weights, data, device=weights.device, meter=weights.meter, limit=_limit(plan, weights)
        )
        if state.file:
            walker.live = load_live(keeper.work, state, {node.name: node for node in plan.order}, weights.device)
            walker.done = state.stops
        tick = show(str(walked[0].criterion), len(plan.stops) - state.stops)

        def after(stop: Stop) -> None:
            keeper.step({site.name: walker.tokens[site.name] for site in stop.sites}, walker)
            tick()

        walker.run(after)
    keeper.end(len(plan.stops))


def _limit(plan: Plan, weights: StoredWeights) -> int:
    """Bytes of weights to hold at a time: as many as the largest stop takes anyway, with its statistic."""
    sizes = [0]
    for stop in plan.stops:
        statistic = stop.criterion.statistic(stop.sites[0].shape[1], "meta", groups=stop.groups)
        sizes.append(sum(weights.size(site.name) for site in stop.sites) + statistic.values.nbytes)
    return max(sizes)


def _measured(site: MaskedSite, weights: StoredWeights, target: Path, tokens: int) -> PrunedSite:
    key = weights.keys(site.name)[0]
    value = read_tensor(target, key, weights.index[key])
    zeros = value.numel() - int(torch.count_nonzero(value))
    decision = site.decision
    return PrunedSite(
        site.name, site.shape, decision.pattern, decision.criterion, zeros / max(1, value.numel()), tokens
    )
