"""Runs in a process of another environment, which take turns with ours."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any


class Worker:
    """A process that makes runs on demand and says what they took; ``inc_worker.py`` and ``ipex_worker.py`` are two. Used with ``with``.

    Args:
        command: Its command line.
        threads: Threads that it may use.

    Attributes:
        ready: What it said first.

    Raises:
        RuntimeError: It ended; the message has the last lines that it wrote to standard error.
    """

    def __init__(self, command: Sequence[str | Path], threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory()  # the library writes a workspace where it runs
        self._errors = Path(self._folder.name, "errors.txt")
        with self._errors.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                cwd=self._folder.name, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, text=True, encoding="utf-8",
            )  # fmt: skip
        try:
            self.ready = self._read()
        except RuntimeError:
            self.__exit__(None, None, None)
            raise

    def run(self, name: str) -> dict[str, Any]:
        """Make a run and return what it took."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"run": name}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; reading tells why
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            last = "\n".join(self._errors.read_text(encoding="utf-8").splitlines()[-5:])
            raise RuntimeError(f"the worker ended with status {status}:\n{last}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()
