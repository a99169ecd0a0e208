"""What the tests of the report share: a small artifact with all that a page shows, and a reader of pages."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import torch

import graphprune as gp
from graphprune.artifact.comparison import Benchmark, BenchmarkSettings, Case, Timed
from graphprune.artifact.contenders import describe
from graphprune.artifact.manifest import Manifest
from tests.traced import traced

PIPELINE = "insert-masks{pattern=4x1,sparsity=0.5,schedule=cubic,warm_up=0,cool_down=0.4,frequency=2,include_last=true}"

LEVELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
"""Symbols of a picture's cells: shares of zeros, from none to all."""


def make_artifact(folder: Path) -> Path:
    """An mlp, pruned by a session of 20 steps, with a stated metric."""
    torch.manual_seed(0)
    program = gp.transform(traced("mlp"), PIPELINE).train()
    optimizer = torch.optim.SGD(program.parameters(), lr=0.01)
    with gp.training.Session(program, optimizer, total_steps=20) as session:
        for step in range(20):
            loss = program(torch.randn(8, 16)).square().mean() + 1 / (1 + step)
            loss.backward()
            session.record(loss=loss)
            optimizer.step()
            optimizer.zero_grad()
    gp.export(program.eval(), "onnx", folder, metrics={"accuracy": 0.8712345})
    return folder


def make_benchmark(path: Path, folder: Path, seconds: tuple[float, float] = (0.004, 0.001)) -> Benchmark:
    """Measurements of an artifact, called ``ours``, against a twin in another format."""
    ours = describe(folder, Manifest.read(folder), "ours")
    other = type(ours)(
        **{**vars(ours), "name": "dense", "folder": "dense", "sparse": False, "pattern": "", "sparsity": 0.0}
    )
    timed = (Timed("dense", (seconds[0],) * 3, 0.0, 10**8), Timed("ours", (seconds[1],) * 3, 0.1, 10**8))
    benchmark = Benchmark(
        BenchmarkSettings("dense", threads=2, rounds=3, warmup=1, machine="a <machine>"),
        (other, ours),
        (Case(2, 16, {"x": (2, 16)}, timed),),
        ("a note & more",),
    )
    benchmark.save(path)
    return benchmark


class Page(HTMLParser):
    """A page as a test reads it.

    Attributes:
        figures: Exact value and text of every ``data`` element, by its key.
        tags: Every element with its attributes, in order.
        text: All text outside of style and script.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.figures: dict[str, tuple[str, str]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self._figure: tuple[str, str] | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        self._open.append(tag)
        if tag == "data":
            self._figure = (found["data-key"] or "", found["value"] or "")
            self.figures[self._figure[0]] = (self._figure[1], "")

    def handle_endtag(self, tag: str) -> None:
        if tag == "data":
            self._figure = None
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("style", "script"):
            return
        self.text += data
        if self._figure is not None:
            key, value = self._figure
            self.figures[key] = (value, self.figures[key][1] + data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of every element of a kind."""
        return [found for name, found in self.tags if name == tag]
