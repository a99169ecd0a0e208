"""The command ``graphprune prune``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from graphprune.commands.console import AsJson, note, quiet_stdout, show
from graphprune.errors import GraphPruneError, suggest

_DTYPES = ("float32", "bfloat16", "float16")


def prune(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder with config.json and safetensors weights, or a Hugging Face hub id.",
            show_default=False,
        ),
    ],
    pipeline: Annotated[
        str,
        typer.Option(
            "--pipeline", "-p", metavar="PIPELINE", help="Passes as text: insert-masks{...}.", show_default=False
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="OUT", help="Folder for the pruned checkpoint.", show_default=False),
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Calibration data: one text a line. Not needed for magnitude.", show_default=False
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Texts to draw from the file.")] = 128,
    length: Annotated[int, typer.Option(min=1, help="Most tokens of a text.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Dtype to compute in: float32, bfloat16, float16.")] = "float32",
    save_every: Annotated[
        float,
        typer.Option(min=0, metavar="SECONDS", help="Time between two saved states, from which a killed run goes on."),
    ] = 300.0,
    as_json: AsJson = False,
) -> None:
    """Prune a checkpoint once, without training; it may be larger than memory.

    Weights are read when they are needed and written into a checkpoint of the same form. When the run is killed, the same
    command goes on where it was.

    [bold]Examples[/]

      graphprune prune ./llama -o sparse/ --data texts.txt \\
        -p 'insert-masks{pattern=2:4,sparsity=0.5,criterion=sparsegpt,schedule=one-shot,scope=local}'
      graphprune prune ./my-bert -o sparse/ \\
        -p 'insert-masks{pattern=4x1,sparsity=0.5,criterion=magnitude,schedule=one-shot,scope=local}'
    """
    if dtype not in _DTYPES:
        raise GraphPruneError(f"--dtype {dtype} is unknown{suggest(dtype, _DTYPES)}")
    with quiet_stdout():
        import torch

        from graphprune.oneshot.checkpoint import prune_checkpoint
        from graphprune.oneshot.texts import read_texts, token_batches

        folder = _folder(model)
        batches = token_batches(folder, read_texts(data, samples, seed), length) if data is not None else []
        if batches:
            texts = sum(len(batch["input_ids"]) for batch in batches)
            note(f"{texts} texts, {sum(batch['input_ids'].numel() for batch in batches):,} tokens from {data}")
        try:
            place = torch.device(device)
            torch.empty(1, device=place)
        except (RuntimeError, AssertionError) as error:
            raise GraphPruneError(f"--device {device}: {(str(error).splitlines() or [''])[0]}") from error
        report = prune_checkpoint(
            folder,
            pipeline,
            batches,
            out,
            device=place,
            dtype=getattr(torch, dtype),
            save_seconds=save_every,
            progress=not as_json,
        )
    if as_json:
        typer.echo(json.dumps({**report.to_dict(), "out": str(out)}, indent=2))
    else:
        show(report)
        note(f"written to {out}")


def _folder(model: str) -> Path:
    """The folder of a checkpoint; one of the hub is fetched."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists() or ":" in model or model.startswith((".", "/", "~")) or model.count("/") > 1 or not model:
        raise GraphPruneError(
            f"no such checkpoint: {model} is no folder here; give a folder with config.json or a hub id"
        )
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # the hub's library raises many kinds: offline, no such model, no permission
        reason = (str(error).strip().splitlines() or [""])[0]
        raise GraphPruneError(
            f"no such checkpoint: {model!r} is neither a folder nor a model that the Hugging Face hub gives "
            f"({type(error).__name__}: {reason}); check the spelling, the network and HF_HUB_OFFLINE"
        ) from error
