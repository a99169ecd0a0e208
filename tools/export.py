"""Lower a saved Program to a target: ``graphprune export`` as a script, for those who look for it among the tools.

python tools/export.py out/demo/program --target onnx --out out/onnx --option opset=18 --force
"""

from __future__ import annotations

import sys

from graphprune.cli import app

if __name__ == "__main__":
    app(["export", *sys.argv[1:]], prog_name="export.py")
