"""A tiny BERT with its tokenizer and a few sentences, for ``graphprune train glue`` on several processes.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.distributed_glue fsdp train glue ...

is ``graphprune train glue ...`` with an accelerate that shards on CPUs too, which it does on accelerators only; ``fail`` in place of
``fsdp`` is one whose second process fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.task_data import tiny_tokenizer

ROOT = Path(__file__).parents[1]
_PLACES = ("river", "city", "boat")
_COLORS = ("red", "blue", "small", "long")


def write_files(folder: Path) -> None:
    """A model without a head and without dropout, and 48 sentences in two classes."""
    from transformers import BertConfig, BertModel

    tokenizer = tiny_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        f"the {color} {place} is near the {other} {end}\t{'good' if color == other else 'bad'}"
        for color in _COLORS
        for place in _PLACES
        for other, end in zip(_COLORS, (*_PLACES, "boat"), strict=True)
    ]
    (folder / "train.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    (folder / "dev.tsv").write_text("\n".join(["sentence\tlabel", *rows[::6]]) + "\n")


def command(folder: Path, name: str, *flags: str) -> list[str]:
    """Words of ``python -m graphprune train glue``, without Python's own."""
    words = f"train glue --model_name_or_path {folder}/model --train_file {folder}/train.tsv --validation_file {folder}/dev.tsv"
    words += (
        f" --output_dir {folder}/{name} --do_train --do_eval --use_cpu --max_seq_length 16 --seed 1 --save_strategy no"
    )
    words += " --learning_rate 1e-3 --num_train_epochs 2 --lr_scheduler_type linear --logging_steps 4"
    return [*words.split(), *flags]


def start(words: list[str], processes: int = 1, *how: str, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    """Run the command line in its own process, or in several under torchrun."""
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        "--local-addr",
        "127.0.0.1",
    ]
    arguments = [
        *(launcher if processes > 1 else []),
        "-m",
        "tests.distributed_glue" if how else "graphprune",
        *how,
        *words,
    ]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=timeout
    )


def shard_on_cpus() -> None:
    """Let accelerate take CPU processes for FSDP, as it takes GPUs; and gather checkpoints as ordinary tensors."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    from graphprune.ir.sharding import whole

    made: Any = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        if getattr(self, "fsdp_plugin", None) is not None:
            self.distributed_type = DistributedType.FSDP

    def gather(self: Any, model: torch.nn.Module, unwrap: bool = True) -> dict[str, torch.Tensor]:
        return {name: whole(value.detach()).clone() for name, value in model.state_dict().items()}

    AcceleratorState.__init__ = init  # type: ignore[method-assign]
    Accelerator.get_state_dict = gather  # type: ignore[method-assign,assignment]


def fail_in_the_second() -> None:
    """Let the second process fail after the first step, where the first one waits for its gradients."""
    from transformers import Trainer

    from graphprune.errors import GraphPruneError

    step = Trainer.training_step

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if os.environ["RANK"] == "1" and self.state.global_step == 1:
            raise GraphPruneError("the second process failed")
        return step(self, *args, **kwargs)

    Trainer.training_step = failing  # type: ignore[method-assign]


if __name__ == "__main__":
    {"fsdp": shard_on_cpus, "fail": fail_in_the_second}[sys.argv.pop(1)]()
    from graphprune.cli import main

    main()
