"""Fine-tune with compression: graphprune train ner as a script, with the flags of the scripts that people have."""

from __future__ import annotations

import sys

from graphprune.cli import app

if __name__ == "__main__":
    app(["train", "ner", *sys.argv[1:]], prog_name="run_ner.py")
