"""The side of Intel Neural Compressor 2.6: runs in its own environment and answers JSON lines.

    python inc_worker.py --layers 12 --threads 2

The first line on standard output says that it is ready; then each line on standard input, ``{"run": NAME}``, runs one of
``plain`` (a training step of the plain model), ``step`` (one with the callbacks, no mask update in it) and ``update`` (one in
which all masks are updated), and is answered by ``{"seconds": ..., "update": ..., "sparsity": ...}``: seconds of the whole
step, of the call that updates the masks, and the sparsity of the weights after it. The clock runs here, so the pipe costs nothing.
"""

# ruff: noqa: E402 - standard output is put aside before the library is imported

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ANSWERS = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
os.dup2(2, 1)  # the library's own prints must not come between the answers

import neural_compressor
import torch
import transformers
from neural_compressor.training import WeightPruningConfig, prepare_compression
from transformers import BertConfig, BertForSequenceClassification

UPDATE, BETWEEN = 1, 2
"""One-shot at step 1, the only step with an update."""


class Side:
    """BERT with random weights twice: plain, and with Neural Compressor's pruning callbacks."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.plain = self._bert(options)
        self.pruned = self._bert(options)
        config = WeightPruningConfig(
            [{}],  # the default is one dictionary that all configurations of a process share
            pruning_type="snip_momentum", pattern="4x1", pruning_scope="global", target_sparsity=0.8,
            start_step=UPDATE, end_step=UPDATE, pruning_frequency=1, pruning_op_types=["Linear"],
            excluded_op_names=[],
        )  # fmt: skip
        self.callbacks = prepare_compression(self.pruned, config).callbacks
        (group,) = self.callbacks.callbacks_list
        (self.pruner,) = group.pruners
        self.optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-5, fused=True) for m in (self.plain, self.pruned)]
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 30000, (options.batch, options.length), generator=generator)
        labels = torch.zeros(options.batch, dtype=torch.int64)
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        self.callbacks.on_train_begin()
        self.step()

    @staticmethod
    def _bert(options: argparse.Namespace) -> torch.nn.Module:
        torch.manual_seed(0)
        config = BertConfig(
            num_hidden_layers=options.layers, hidden_size=options.hidden, intermediate_size=4 * options.hidden,
            num_attention_heads=max(1, options.hidden // 64), attn_implementation="sdpa",
        )  # fmt: skip
        return BertForSequenceClassification(config).train()

    @property
    def weights(self) -> int:
        """Weights that the masks cover."""
        return sum(mask.numel() for mask in self.pruner.masks.values())

    def plain_step(self) -> float:
        """Seconds of a plain training step."""
        start = time.perf_counter()
        self.plain(**self.batch).loss.backward()
        self.optimizers[0].step()
        self.optimizers[0].zero_grad()
        return time.perf_counter() - start

    def step(self, at: int = BETWEEN) -> tuple[float, float]:
        """Seconds of a step with callbacks, in the order of the library's examples, and of the mask update in it."""
        self.pruner.set_global_step(at)
        self.pruner.handled_global_step = -1
        start = time.perf_counter()
        self.callbacks.on_step_begin(0)
        update = time.perf_counter() - start
        self.pruned(**self.batch).loss.backward()
        self.callbacks.on_before_optimizer_step()
        self.optimizers[1].step()
        self.callbacks.on_after_optimizer_step()
        self.optimizers[1].zero_grad()
        self.callbacks.on_step_end()
        return time.perf_counter() - start, update

    def update(self) -> tuple[float, float]:
        """The same with a mask update."""
        self.pruner.current_sparsity_ratio = 0.0  # it takes no further update once ties have put it above its target
        before = self.pruner.completed_pruned_cnt
        result = self.step(UPDATE)
        if self.pruner.completed_pruned_cnt == before:
            raise RuntimeError("the masks were not updated")
        return result

    def sparsity(self) -> float:
        """Fraction of zeros in the masked weights."""
        kept = sum(int(torch.count_nonzero(module.weight)) for module in self.pruner.modules.values())
        return 1.0 - kept / self.weights


def main() -> None:
    """Answer until standard input ends."""
    parser = argparse.ArgumentParser()
    for name, value in {"layers": 12, "hidden": 768, "batch": 8, "length": 128, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    side = Side(options)
    runs: dict[str, Callable[[], tuple[float, float]]] = {
        "plain": lambda: (side.plain_step(), 0.0),
        "step": side.step,
        "update": side.update,
    }
    ready = {
        "ready": True,
        "sites": len(side.pruner.modules),
        "weights": side.weights,
        "threads": torch.get_num_threads(),
        "versions": {module.__name__: module.__version__ for module in (neural_compressor, torch, transformers)},
    }
    print(json.dumps(ready), file=ANSWERS)
    for line in sys.stdin:
        seconds, update = runs[json.loads(line)["run"]]()
        print(json.dumps({"seconds": seconds, "update": update, "sparsity": side.sparsity()}), file=ANSWERS)


if __name__ == "__main__":
    main()
