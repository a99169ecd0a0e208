"""The sparse-cpu target: an Inductor package whose sparse linear layers run in kernels of our own."""

from graphprune.targets.sparse_cpu.target import SparseCpu as SparseCpu
