"""Flags of older scripts, in the words of today's: commands that people have keep working."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from graphprune.errors import RecipeError

RENAMED = {
    "--do_prune": "--apply_pruning",
    "--pruning_pattern": "--pattern",
    "--pruning_type": "--pruning_approach",
    "--no_cuda": "--use_cpu",
    "--evaluation_strategy": "--eval_strategy",
    "--per_gpu_train_batch_size": "--per_device_train_batch_size",
    "--per_gpu_eval_batch_size": "--per_device_eval_batch_size",
    "--num_warmup_steps": "--warmup_steps",
    "--use_auth_token": "--token",
    "--max_length": "--max_seq_length",
    "--max_seq_len": "--max_seq_length",
    "--distill_teacher": "--teacher_model_name_or_path",
    "--batch_size": "--per_device_train_batch_size",
}
"""Neural Compressor's and SparseML's scripts, and transformers before 5."""


def translate(argv: Sequence[str]) -> list[str]:
    """Write older flags as today's.

    ``--warmup_ratio 0.05`` is ``--warmup_steps 0.05``: below 1 it is a fraction. ``--save_onnx_model`` is ``--export_target onnx``.

    Raises:
        RecipeError: A ratio that is no number in [0, 1).
    """
    return list(_words(argv))


def _words(argv: Sequence[str]) -> Iterator[str]:
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        flag = flag if not flag.startswith("--") else flag.replace("-", "_").replace("__", "--", 1)
        if flag == "--warmup_ratio":
            yield "--warmup_steps"
            yield _ratio(value if equals else next(words, ""))
        elif flag == "--save_onnx_model":
            yield from ("--export_target", "onnx")
        elif flag in RENAMED:
            yield RENAMED[flag] + equals + value
        else:
            yield (flag + equals + value) if flag.startswith("--") else word


def _ratio(text: str) -> str:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise RecipeError(f"--warmup_ratio {text or 'without a value'}: it is a fraction of training, in [0, 1)")
    return text
