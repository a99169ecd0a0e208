"""Run lowered models in processes of their own, each with the Python whose environment has their runtime.

Some runtimes cannot share an environment with what lowers to them. The environment variable ``GRAPHPRUNE_<TARGET>_PYTHON``, such as
``GRAPHPRUNE_DEEPSPARSE_PYTHON``, names the Python of an environment that has graphprune and the runtime; everything that runs or
reads artifacts of that target then does so there. Requests and answers are lines of JSON, arrays travel as npz files.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from graphprune.errors import GraphPruneError, LoweringError
from graphprune.pipeline.registry import make_target
from graphprune.pipeline.target import Run, StoredWeight, Target

Arrays = Mapping[str, np.ndarray]


def variable(target: str) -> str:
    """The environment variable that names the Python of a target's own environment."""
    return f"GRAPHPRUNE_{target.upper().replace('-', '_')}_PYTHON"


def interpreter(target: str) -> str | None:
    """The Python that ``GRAPHPRUNE_<TARGET>_PYTHON`` names; None where it is not set.

    Raises:
        LoweringError: It names no file.
    """
    path = os.environ.get(variable(target))
    if path and not Path(path).is_file():
        raise LoweringError(
            f"{variable(target)}={path} is no file; name the Python of the environment that has {target}"
        )
    return path or None


class Remote:
    """A lowered model in a process of its own.

    Attributes:
        python: The Python that it runs in.
    """

    def __init__(self, target: Target, folder: Path, *, python: str | None = None, threads: int | None = None):
        """Start the process and load the model.

        Args:
            target: What the artifact was lowered to.
            folder: The artifact.
            python: Path of a Python; None takes ``interpreter``'s, or else the running one.
            threads: Threads of the runtime; None leaves its default.

        Raises:
            LoweringError: The process ends, or the model cannot be loaded in it.
        """
        self.python = python or interpreter(target.name) or sys.executable
        self._scratch = tempfile.TemporaryDirectory(prefix="graphprune-")
        self._errors = (Path(self._scratch.name) / "stderr").open("w+")
        self._process = subprocess.Popen(
            [self.python, "-m", "graphprune.pipeline.remote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._target, self._folder = target, Path(folder)
        try:
            self._ask(
                "open",
                target=target.name,
                options=json.loads(json.dumps(vars(target), default=str)),
                folder=str(self._folder.resolve()),
                threads=threads,
            )
        except BaseException:
            self.close()
            raise

    def run(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Outputs by name."""
        given, wanted = self._file("inputs"), self._file("outputs")
        np.savez(given, allow_pickle=False, **dict(inputs))
        self._ask("run", inputs=str(given), outputs=str(wanted))
        return _read(wanted)

    def time(self, inputs: Arrays, calls: int = 1) -> list[float]:
        """Seconds of each of some calls in a row, measured in the process.

        Returns when the runtime's threads sleep: many spin after a call, onnxruntime's for 40 ms, and would take the processor from
        whatever is timed next.
        """
        given = self._file("timed")
        np.savez(given, allow_pickle=False, **dict(inputs))
        return [float(item) for item in self._ask("time", inputs=str(given), calls=calls)]

    def weights(self, layouts: Mapping[str, str]) -> dict[str, StoredWeight]:
        """As ``Target.weights``."""
        path = self._file("weights")
        names = self._ask("weights", layouts=dict(layouts), outputs=str(path))
        arrays = _read(path)
        return {
            name: StoredWeight(*(arrays.get(f"{index}.{part}") for part in _PARTS))  # type: ignore[arg-type]
            for index, name in enumerate(names)
        }

    def peak_memory(self) -> int:
        """Bytes of memory that the process has held at most, the model and its runtime among them."""
        return int(self._ask("memory"))

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            with contextlib.suppress(BrokenPipeError):
                assert self._process.stdin is not None
                self._process.stdin.close()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(BrokenPipeError):
                assert stream is not None
                stream.close()
        self._scratch.cleanup()

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not issubclass(kind, Exception):
            self._process.kill()  # interrupted: whoever did that does not want to wait for the call that runs
        self.close()

    def _file(self, name: str) -> Path:
        return Path(self._scratch.name) / f"{name}.npz"

    def _ask(self, request: str, **arguments: object) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps({"request": request, **arguments}) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise LoweringError(
                f"{self._folder}: the process of target {self._target.name} ended: {self._last_words()}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise LoweringError(answer["error"])
        return answer["value"]

    def _last_words(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        lines = [line for line in self._errors.read().splitlines() if line.strip()]
        if lines and "No module named" in lines[-1] and "graphprune" in lines[-1]:
            return f"{self.python} has no graphprune; install it there: {self.python} -m pip install graphprune"
        return f"{lines[-1] if lines else 'nothing was said'} (exit code {self._process.returncode}, {self.python})"


@contextlib.contextmanager
def opened(target: Target, folder: Path, threads: int | None = None) -> Iterator[Run]:
    """A lowered model to run: in this process, or in that of ``interpreter`` where one is named.

    Raises:
        LoweringError: The runtime is not installed, or the folder holds no model.
    """
    if interpreter(target.name) is None:
        yield target.open(folder, threads)
    else:
        with Remote(target, folder, threads=threads) as remote:
            yield remote.run


def stored_weights(target: Target, folder: Path, layouts: Mapping[str, str]) -> dict[str, StoredWeight]:
    """``Target.weights``, read where the runtime is."""
    if interpreter(target.name) is None:
        return target.weights(folder, layouts)
    with Remote(target, folder) as remote:
        return remote.weights(layouts)


_PARTS = ("values", "zero_point", "scale")


def _read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


class _Server:
    """The other end: one model, and what is asked of it."""

    target: Target
    folder: Path
    model: Run

    def open(self, target: str, options: Mapping[str, object], folder: str, threads: int | None) -> None:
        os.environ.pop(variable(target), None)  # this is it
        self.target, self.folder = make_target(target, options), Path(folder)
        self.model = self.target.open(self.folder, threads)

    def run(self, inputs: str, outputs: str) -> None:
        np.savez(outputs, allow_pickle=False, **self.model(_read(Path(inputs))))

    def time(self, inputs: str, calls: int) -> list[float]:
        arrays, seconds = _read(Path(inputs)), []
        for _ in range(calls):
            start = time.perf_counter()
            self.model(arrays)
            seconds.append(time.perf_counter() - start)
        _wait_until_idle()
        return seconds

    def weights(self, layouts: Mapping[str, str], outputs: str) -> list[str]:
        found = self.target.weights(self.folder, layouts)
        parts = {
            f"{index}.{part}": getattr(weight, part)
            for index, weight in enumerate(found.values())
            for part in _PARTS
            if getattr(weight, part) is not None
        }
        np.savez(outputs, allow_pickle=False, **parts)
        return list(found)

    def memory(self) -> int:
        with contextlib.suppress(OSError, ValueError, StopIteration):  # on Linux ru_maxrss begins at the parent's size
            lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
            return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _wait_until_idle(interval: float = 0.01, limit: float = 1.0) -> None:
    """Wait until this process uses less than a tenth of a processor; at most ``limit`` seconds."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        before = time.process_time()
        time.sleep(interval)
        if time.process_time() - before < interval / 10:
            return


def serve() -> None:
    """Answer requests on standard input until it ends; whatever libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server = _Server()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": getattr(server, request.pop("request"))(**request)}
        except GraphPruneError as error:
            answer = {"error": str(error)}
        except Exception as error:  # a runtime fails in ways of its own, and the other end tells the user
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
