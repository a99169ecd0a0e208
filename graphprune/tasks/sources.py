"""Where the splits of a task come from: files, or a dataset of the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphprune.errors import GraphPruneError, RecipeError, suggest
from graphprune.tasks.data_settings import DataSettings
from graphprune.tasks.extra import require_train_extra
from graphprune.tasks.files import read_table
from graphprune.tasks.tables import Table

if TYPE_CHECKING:
    from datasets.arrow_dataset import Dataset

_GLUE = "nyu-mll/glue"
_SPLITS = {  # of hub datasets: ours
    "train": "train",
    "validation": "validation",
    "validation_matched": "validation",
    "validation_mismatched": "validation_mismatched",
    "test": "test",
    "test_matched": "test",
    "test_mismatched": "test_mismatched",
}


class Sources:
    """The tables of all splits, each read when it is first asked for.

    Args:
        settings: What to read.
        columns: Whether files with other endings than JSON's and CSV's hold CoNLL columns.
        glue: Whether ``task_name`` alone names data, of GLUE.

    Raises:
        RecipeError: The settings name no data.
    """

    def __init__(self, settings: DataSettings, *, columns: bool = False, glue: bool = False):
        self._settings = settings
        self._columns = columns
        self._files = {
            name: path
            for name, path in (
                ("train", settings.train_file),
                ("validation", settings.validation_file),
                ("test", settings.test_file),
            )
            if path is not None
        }
        if not self._files and not settings.dataset_name and not (glue and settings.task_name):
            named = "--dataset_name, --task_name," if glue else "--dataset_name"
            raise RecipeError(f"no data: give {named} or --train_file and --validation_file")
        self._loaded: dict[str, Table] = {}
        self._hub: Mapping[str, Dataset] | None = None

    def splits(self) -> tuple[str, ...]:
        """Names of the splits there are, training first: of ``train``, ``validation``, ``validation_mismatched``, ..."""
        there = tuple(self._files) or tuple(self._from_hub())
        return tuple(sorted({*there, *(("validation",) if self._held_back(there) else ())}, key=_order))

    def table(self, split: str) -> Table:
        """Examples of a split, as many as the settings allow.

        Raises:
            GraphPruneError: There is no such split, or it cannot be read.
        """
        if split not in self._loaded:
            self._load(split)
        return self._loaded[split]

    def _load(self, split: str) -> None:
        there = tuple(self._files) or tuple(self._from_hub())
        percent = self._settings.validation_split_percentage
        if self._held_back(there) and percent is not None and split in ("train", "validation"):
            parts = self._whole("train").parted(percent)
            for name, part in zip(("train", "validation"), parts, strict=True):
                self._loaded[name] = part.first(self._settings.limit(name))
            return
        if split not in there:
            raise GraphPruneError(f"the data has no split {split!r}{suggest(split, there)}")
        self._loaded[split] = self._whole(split).first(self._settings.limit(split))

    def _held_back(self, there: tuple[str, ...]) -> bool:
        return bool(self._settings.validation_split_percentage) and "train" in there and "validation" not in there

    def _whole(self, split: str) -> Table:
        if self._files:
            return read_table(self._files[split], columns=self._columns)
        settings = self._settings
        return of_dataset(f"{settings.dataset_name or settings.task_name} ({split})", self._from_hub()[split])

    def _from_hub(self) -> Mapping[str, Dataset]:
        if self._hub is None:
            name, config = self._settings.dataset_name, self._settings.dataset_config_name
            if name is None:
                name, config = _GLUE, self._settings.task_name
            loaded = load_hub(name, config)
            self._hub = {_SPLITS[split]: loaded[split] for split in _SPLITS if split in loaded}
            if not self._hub:
                raise GraphPruneError(
                    f"dataset {name} has no split of train, validation or test; it has {', '.join(loaded)}"
                )
        return self._hub


def _order(split: str) -> tuple[int, str]:
    return (["train", "validation", "test"].index(split.split("_")[0]), split)


def load_hub(name: str, config: str | None) -> Mapping[str, Dataset]:
    """Load all splits of a dataset of the hub, of a folder of data files, or of one that ``save_to_disk`` wrote.

    Raises:
        GraphPruneError: It cannot be loaded; the reason is quoted.
    """
    require_train_extra("datasets")
    import datasets

    library: Any = datasets  # its functions are not annotated
    try:
        if (Path(name) / "dataset_dict.json").is_file():
            loaded = library.load_from_disk(name)
        else:
            loaded = library.load_dataset(name, config)
    except Exception as error:  # of the hub, the file system, pyarrow and third-party parsers
        called = name if config is None else f"{name} ({config})"
        reason = str(error).strip().split("\n")[0]
        raise GraphPruneError(
            f"dataset {called} cannot be loaded: {type(error).__name__}: {reason}; check the name and the network, or give "
            f"files with --train_file and --validation_file"
        ) from error
    return {str(split): part for split, part in loaded.items()}


def of_dataset(name: str, dataset: Dataset) -> Table:
    """A dataset as a table; integer columns of class labels keep their names.

    Raises:
        GraphPruneError: It is empty.
    """
    from datasets.features import ClassLabel

    if not len(dataset):
        raise GraphPruneError(f"{name} holds no examples")
    names: dict[str, tuple[str, ...]] = {}
    for column, feature in dataset.features.items():
        inner: Any = getattr(feature, "feature", feature)
        if isinstance(inner, ClassLabel):
            names[column] = tuple(inner.names)
    columns = {column: dataset[column][:] for column in dataset.column_names}
    return Table(name, columns, [f"row {row}" for row in range(len(dataset))], names)
