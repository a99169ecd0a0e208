"""Datasets in memory: made of columns, mapped without a cache on disk."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets.arrow_dataset import Dataset

_LISTS = {"texts": "string", "numbers": "int64"}


def make_dataset(columns: Mapping[str, Sequence[Any]], kinds: Mapping[str, Any]) -> Dataset:
    """A dataset of typed columns.

    Args:
        columns: Values by name, of one length.
        kinds: Type of each: a scalar type of Arrow (``string``, ``int64``, ``float32``), ``texts`` or ``numbers`` for lists,
            or a mapping of kinds for a structure.
    """
    import datasets

    library: Any = datasets  # its constructors are not annotated
    features = library.Features({name: _feature(library, kind) for name, kind in kinds.items()})
    made: Dataset = library.Dataset.from_dict(dict(columns), features=features)
    return made


def _feature(library: Any, kind: Any) -> Any:
    if isinstance(kind, Mapping):
        return {name: _feature(library, inner) for name, inner in kind.items()}
    return library.Sequence(library.Value(_LISTS[kind])) if kind in _LISTS else library.Value(kind)


def map_rows(
    dataset: Dataset, function: Callable[..., dict[str, Any]], *, key: str, processes: int | None = None
) -> Dataset:
    """Map batches of rows in memory; a progress bar on terminals only.

    Args:
        dataset: Rows.
        function: From columns and row numbers to new columns, of any number of rows.
        key: Says what ``function`` does; with the fingerprint of ``dataset`` it makes that of the result.
        processes: How many to use; None for this one.
    """
    with _bars_on_terminals():
        mapped: Dataset = dataset.map(
            function,
            batched=True,
            with_indices=True,
            remove_columns=dataset.column_names,
            keep_in_memory=True,
            load_from_cache_file=False,
            num_proc=processes,
            new_fingerprint=_derived(dataset, key),
            desc="tokenize",
        )
    return mapped


def add_numbers(dataset: Dataset, name: str) -> Dataset:
    """Add a column with the number of each row."""
    added: Dataset = dataset.add_column(name, list(range(len(dataset))), new_fingerprint=_derived(dataset, name))
    return added


def _derived(dataset: Dataset, key: str) -> str:
    return hashlib.sha256(f"{dataset._fingerprint} {key}".encode()).hexdigest()[:16]


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    from datasets.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
