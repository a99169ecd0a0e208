"""A teacher's logits on disk: computed once for a data set, and read on later runs without loading the teacher.

A cache is a folder named by a key of the teacher (config and weights), the data (the contents of its input columns), the tokenizer
and the maximum length; another teacher, other data or another tokenizer have another folder. It holds ``key.json`` and one Arrow
file for some thousand rows. A run that was interrupted goes on behind the last whole file; a damaged one is computed again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graphprune.artifact.files import written
from graphprune.errors import GraphPruneError
from graphprune.ir.program import device_of
from graphprune.training.entries import token_mask
from graphprune.training.fingerprints import input_columns, key_of, of_data, of_teacher, of_tokenizer
from graphprune.training.teacher_checks import Tokenizer
from graphprune.training.teacher_shards import (
    OutputKind,
    Precision,
    Shard,
    find_shards,
    kind_of,
    padded,
    unpadded,
    write_shard,
)
from graphprune.training.teaching import ROW, accepted, load_teacher, run_in_eval

LOGITS = ("logits", "start_logits", "end_logits")
_KEY = "key.json"
Collate = Callable[[list[dict[str, Any]]], Mapping[str, Tensor]]


class TeacherCache:
    """Logits of one teacher about one data set. Made by ``TeacherCache.of``; called with a batch, it gives them back.

    Attributes:
        folder: Where it lies.
        rows: Rows of the data set.
        config: The teacher's config, as far as it was saved; ``id2label`` says what its logits mean.
        computed: Rows that ``of`` had to compute; 0 where all were there.
    """

    def __init__(self, folder: Path, rows: int, shard_rows: int, config: Mapping[str, Any]) -> None:
        self.folder, self.rows, self.shard_rows = folder, rows, shard_rows
        self.config = SimpleNamespace(**config)
        self.computed = 0
        self._paths: dict[int, Path] = {}
        self._shards: dict[int, Shard] = {}

    @classmethod
    def of(
        cls,
        root: Path | str,
        teacher: nn.Module | str | Path,
        data: Any,
        *,
        tokenizer: Tokenizer | None = None,
        max_length: int | None = None,
        load: Callable[[str], nn.Module] = load_teacher,
        collate: Collate | None = None,
        batch_size: int = 8,
        precision: Precision = "float32",
        shard_rows: int = 1024,
        device: torch.device | str | None = None,
        show: bool = True,
    ) -> TeacherCache:
        """Open the cache of a teacher and a data set; compute what it lacks.

        Where ``torch.distributed`` runs, each process computes its part of the files, and all wait for the last.

        Args:
            root: Folder of caches.
            teacher: A model; or a folder or hub id, which is loaded only where something must be computed.
            data: Tokenized examples: a ``datasets.Dataset``, or a sequence of mappings. Columns that no model takes are left out.
            tokenizer: Of the data.
            max_length: Of the data, for the key.
            load: How to load a folder or hub id.
            collate: Rows to a batch; None pads with the tokenizer, or stacks where there is none. With the student's own collator
                and batch size, and rows padded to one length, the teacher sees the very shapes that it would see in training, and
                its logits are the same to the bit.
            batch_size: Rows that the teacher sees at once.
            precision: Of the stored numbers; ``float16`` halves the size and rounds to three digits.
            shard_rows: Rows of a file, for a new cache.
            device: Where the teacher computes; None = where it is.
            show: A progress bar on standard error.

        Raises:
            GraphPruneError: The data set is empty or not tokenized, the teacher cannot be found, or a file cannot be written.
        """
        columns = input_columns(data, tokenizer)
        fingerprint, config = of_teacher(teacher)
        parts = {
            "teacher": fingerprint,
            "data": of_data(data, columns),
            "tokenizer": of_tokenizer(tokenizer),
            "max_length": str(max_length),
            "precision": precision,
        }
        folder = Path(root) / key_of(parts)
        made = cls(folder, len(data), _layout(folder, parts, len(data), shard_rows, config), config)
        rank, world = _process()
        own = [number for number in made.missing() if number % world == rank]
        if own:
            model = teacher if isinstance(teacher, nn.Module) else load(str(teacher))
            work = _Work(
                model.to(device) if device is not None else model, columns, collate or _padding(tokenizer), batch_size
            )
            made.computed = made._compute(own, work, data, precision, show and rank == 0)
        if world > 1:
            torch.distributed.barrier()
        if still := made.missing():
            raise GraphPruneError(
                f"{folder} lacks the files {still[:5]} although they were just written; check the disk"
            )
        return made

    # -- reading ------------------------------------------------------------------------------------------------------

    def missing(self) -> list[int]:
        """Numbers of files that are not there, or damaged."""
        count = -(-self.rows // self.shard_rows)
        self._paths, self._shards = find_shards(self.folder, count), {}
        return [
            number
            for number in range(count)
            if number not in self._paths or self._shard(number).rows != len(self._range(number))
        ]

    def add_rows(self, data: Any) -> Any:
        """The data set with the column ``teacher_row``; shuffle, filter and select it afterwards as you like.

        Args:
            data: The one that the cache was made of.

        Returns:
            A new ``datasets.Dataset``, or a list of mappings.

        Raises:
            GraphPruneError: It has another number of rows.
        """
        if len(data) != self.rows:
            raise GraphPruneError(
                f"the data set has {len(data)} rows, the teacher's cache {self.rows}; number the rows before others are left out"
            )
        if hasattr(data, "add_column"):
            return data.add_column(ROW, np.arange(self.rows))
        return [{**data[index], ROW: index} for index in range(self.rows)]

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The teacher's logits about a batch, on the device of its rows, padded as the batch is.

        Args:
            inputs: A batch with ``teacher_row``, and with its attention mask where there is padding.

        Raises:
            GraphPruneError: The batch does not say which rows it holds, or they have other tokens.
        """
        if ROW not in inputs:
            raise GraphPruneError(
                f"the batch has no column {ROW!r}, so its rows cannot be found in the teacher's cache; add it with "
                f"cache.add_rows(data), and let the collator and the Trainer keep it"
            )
        index = torch.as_tensor(inputs[ROW])
        numbers: list[int] = index.reshape(-1).tolist()
        if wrong := [number for number in numbers if not 0 <= number < self.rows]:
            raise GraphPruneError(f"row {wrong[0]} is not in the teacher's cache, which has {self.rows} rows")
        where = [divmod(number, self.shard_rows) for number in numbers]
        mask = token_mask(inputs)
        found = {}
        for name, kind in self._shard(where[0][0]).kinds.items():
            rows = [self._shard(shard).row(name, place) for shard, place in where]
            found[name] = padded(rows, kind, mask, numbers, name).to(index.device)
        return found

    def _shard(self, number: int) -> Shard:
        if number not in self._shards:
            self._shards[number] = Shard(self._paths[number])
        return self._shards[number]

    def _range(self, number: int) -> range:
        return range(number * self.shard_rows, min((number + 1) * self.shard_rows, self.rows))

    # -- writing ------------------------------------------------------------------------------------------------------

    def _compute(self, own: Sequence[int], work: _Work, data: Any, precision: Precision, show: bool) -> int:
        total = sum(len(self._range(number)) for number in own)
        with _bar(show, total) as advance:
            for number in own:
                for stale in self.folder.glob(f"{number:05d}-*.arrow"):
                    stale.unlink()
                rows, kinds = work.run(data, self._range(number), advance)
                write_shard(self.folder, number, rows, kinds, precision)
        return total


class _Work:
    """Runs the teacher over rows."""

    def __init__(self, teacher: nn.Module, columns: Sequence[str], collate: Collate, batch_size: int) -> None:
        self.teacher, self.columns, self.collate, self.batch_size = teacher, columns, collate, batch_size

    @torch.no_grad()
    def run(
        self, data: Any, indices: range, advance: Callable[[int], None]
    ) -> tuple[dict[str, list[np.ndarray[Any, Any]]], dict[str, OutputKind]]:
        """Outputs of some rows, flat and without padding."""
        found: dict[str, list[np.ndarray[Any, Any]]] = {}
        kinds: dict[str, OutputKind] = {}
        for start in range(indices.start, indices.stop, self.batch_size):
            real = list(range(start, min(start + self.batch_size, indices.stop)))
            filled = real + real[-1:] * (
                self.batch_size - len(real)
            )  # one shape for all batches: the same kernels, the same bits
            rows = [{name: row[name] for name in self.columns} for row in (data[index] for index in filled)]
            batch = {name: value.to(device_of(self.teacher)) for name, value in self.collate(rows).items()}
            output = run_in_eval(self.teacher, accepted(self.teacher, batch))
            values = {name: output[name] for name in LOGITS if output.get(name) is not None}
            if not values:
                raise GraphPruneError(f"the teacher returns none of {', '.join(LOGITS)}; there is nothing to keep")
            for name, value in values.items():
                kinds[name] = kind_of(name, value)
                found.setdefault(name, []).extend(unpadded(value, kinds[name], token_mask(batch))[: len(real)])
            advance(len(real))
        return found, kinds


def _layout(folder: Path, parts: Mapping[str, str], rows: int, shard_rows: int, config: Mapping[str, Any]) -> int:
    """Rows of a file, from what was written when the cache was begun; a new cache is begun."""
    path = folder / _KEY
    try:
        return max(1, int(json.loads(path.read_text(encoding="utf-8"))["shard_rows"]))
    except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged: begun anew
        if _process()[0] == 0:
            with written(path) as temporary:
                content = {**parts, "rows": rows, "shard_rows": shard_rows, "config": config}
                temporary.write_text(json.dumps(content, indent=1, default=str), encoding="utf-8")
        return shard_rows


def _process() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _padding(tokenizer: Any) -> Collate:
    """Pad rows with a tokenizer; stack them where there is none."""

    def collate(rows: list[dict[str, Any]]) -> Mapping[str, Tensor]:
        if tokenizer is None:
            return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}
        padded_rows: Mapping[str, Tensor] = tokenizer.pad(rows, return_tensors="pt")
        return padded_rows

    return collate


@contextmanager
def _bar(show: bool, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), disable=not show) as progress:
        task = progress.add_task("teacher's logits", total=total)
        yield lambda count: progress.advance(task, count)
