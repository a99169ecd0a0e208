"""The side of NNCF: quantizes a BERT in its own environment and writes what OpenVINO runs.

    python -P nncf_worker.py --layers 12 --out FOLDER     # -P: the file openvino.py beside it is not the package

``FOLDER`` gets ``float/model.xml`` and ``int8/model.xml``; versions go to standard output as a line of JSON. The model has the same seed
as ``measuring.bert``, and the samples are those of ``quantization.bench_int8``.
"""

# ruff: noqa: E402 - standard output is put aside before the libraries are imported

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("NNCF_CI", "1")  # it reports its use over the network otherwise, and so does openvino
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
ANSWERS = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)

import nncf
import numpy as np
import openvino
import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification


def main() -> None:
    """Quantize and write."""
    parser = argparse.ArgumentParser()
    for name, value in {"layers": 12, "hidden": 768, "length": 128, "samples": 8, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=options.layers, hidden_size=options.hidden, intermediate_size=4 * options.hidden,
        num_attention_heads=options.hidden // 64, attn_implementation="sdpa",
    )  # fmt: skip
    example = torch.ones(1, options.length, dtype=torch.int64)
    model = BertForSequenceClassification(config).eval()
    dense = openvino.convert_model(model, example_input={"input_ids": example, "attention_mask": example})
    generator = np.random.default_rng(0)
    ids = [generator.integers(0, 30000, (1, options.length)) for _ in range(options.samples)]
    data = nncf.Dataset([{"input_ids": item, "attention_mask": np.ones_like(item)} for item in ids])
    openvino.save_model(dense, options.out / "float" / "model.xml", compress_to_fp16=False)
    small = nncf.quantize(dense, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=options.samples)
    openvino.save_model(small, options.out / "int8" / "model.xml", compress_to_fp16=False)
    print(
        json.dumps({module.__name__: module.__version__ for module in (nncf, openvino, torch, transformers)}),
        file=ANSWERS,
    )


if __name__ == "__main__":
    main()
