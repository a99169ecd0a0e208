"""The recipe that is being written, as plain data, and its YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import yaml

from graphprune.importing.fields import Ledger

Options = dict[str, object]


@dataclass
class Step:
    """One pass: its name and the options that differ from its defaults."""

    name: str
    options: Options = field(default_factory=dict)

    def plain(self) -> object:
        """As a recipe has it."""
        return {self.name: self.options} if self.options else self.name


@dataclass
class StageDraft:
    """One stage."""

    name: str
    steps: list[Step] = field(default_factory=list)
    training: Options = field(default_factory=dict)
    distillation: Options | None = None
    train: bool = True


@dataclass
class RecipeDraft:
    """All of a recipe. A single stage is written as a pipeline."""

    variables: dict[str, object] = field(default_factory=dict)
    stages: list[StageDraft] = field(default_factory=list)

    def plain(self) -> Options:
        """The recipe as data, what all stages share written once."""
        data: Options = {"version": 1}
        if self.variables:
            data["variables"] = dict(self.variables)
        if len(self.stages) <= 1 and all(stage.train for stage in self.stages):
            stage = self.stages[0] if self.stages else StageDraft("main")
            return (
                data
                | _shared(stage.training, stage.distillation)
                | {"pipeline": [step.plain() for step in stage.steps]}
            )
        shared = {
            key: value
            for key, value in self.stages[0].training.items()
            if all(stage.training.get(key) == value for stage in self.stages)
        }
        teaching = self.stages[0].distillation
        same = teaching is not None and all(stage.distillation == teaching for stage in self.stages)
        data |= _shared(shared, teaching if same else None)
        data["stages"] = [_stage(stage, shared, same) for stage in _named(self.stages)]
        return data


def _shared(training: Mapping[str, object], distillation: Options | None) -> Options:
    data: Options = {"training": dict(training)} if training else {}
    return data if distillation is None else {**data, "distillation": dict(distillation)}


def _stage(stage: StageDraft, shared: Mapping[str, object], same: bool) -> Options:
    own = {key: value for key, value in stage.training.items() if key not in shared}
    steps = [step.plain() for step in stage.steps]
    data = {"name": stage.name, "pipeline": steps} | _shared(own, None if same else stage.distillation)
    return data if stage.train else {**data, "train": False}


def _named(stages: list[StageDraft]) -> list[StageDraft]:
    """The stages with names that a recipe takes, each once."""
    used: set[str] = set()
    for stage in stages:
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", stage.name).lstrip("_.-") or "stage"
        unique = next(text for text in (name, *(f"{name}-{number}" for number in range(2, 1000))) if text not in used)
        used.add(unique)
        stage.name = unique
    return stages


class _Dumper(yaml.SafeDumper):
    """What is short stands in one line; one object twice is written twice."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _collection(dumper: _Dumper, data: dict[str, object] | list[object]) -> yaml.Node:
    inner = list(data.values()) if isinstance(data, dict) else data
    short = (
        len(str(data)) <= _WIDTH - _INDENT
        and not any(isinstance(item, dict) for item in inner)
        and "version" not in data
    )
    if isinstance(data, dict):
        return dumper.represent_mapping("tag:yaml.org,2002:map", data.items(), flow_style=short)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=short)


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else []


_WIDTH, _INDENT = 120, 24
_Dumper.add_representer(dict, _collection)
_Dumper.add_representer(list, _collection)


def drop_unused(draft: RecipeDraft, ledger: Ledger) -> None:
    """Take away variables that nothing refers to, since to set them would change nothing."""
    kept: set[str] = set()
    texts = [str(stage) for stage in draft.stages]
    while texts:
        found = {
            word for text in texts for inside in _INSIDE.findall(text) for word in re.findall(r"[A-Za-z_]\w*", inside)
        }
        fresh = found & {*draft.variables} - kept
        kept |= fresh
        texts = [str(draft.variables[name]) for name in fresh]
    unused = [name for name in draft.variables if name not in kept]
    if unused:
        ledger.note(f"no variables any more, their values were put in: {', '.join(unused)}")
    draft.variables = {name: value for name, value in draft.variables.items() if name in kept}


_INSIDE = re.compile(r"\$\{([^{}]*)\}")


def write_draft(draft: RecipeDraft, source: str, kind: str, ledger: Ledger) -> str:
    """The recipe's YAML, under a comment that says where it comes from, what to know, and what is missing."""
    lines = [f"Imported from {source} ({_KINDS[kind]})."]
    lines += [f"Note: {note}" for note in ledger.notes]
    lines += [f"Not carried: {entry}" for entry in ledger.entries]
    head = "".join(f"# {' '.join(line.split())}\n" for line in lines)
    return head + yaml.dump(draft.plain(), Dumper=_Dumper, sort_keys=False, width=_WIDTH, allow_unicode=True)


_KINDS = {"inc": "Neural Compressor", "sparseml": "SparseML"}
