"""The measurements behind ``tools/bench.py``: each ``bench_*`` takes a ``Setting`` and yields ratios with their goals."""
