"""Fine-tune with compression: graphprune train qa as a script, with the flags of the scripts that people have."""

from __future__ import annotations

import sys

from graphprune.cli import app

if __name__ == "__main__":
    app(["train", "qa", *sys.argv[1:]], prog_name="run_qa.py")
