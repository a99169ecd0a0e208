"""A recipe: pipeline and target as data, in YAML, as pipeline text, or as Python objects; all three are equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graphprune.errors import RecipeError, suggest
from graphprune.pipeline.base import Pass
from graphprune.pipeline.expressions import substitute
from graphprune.pipeline.plain_yaml import read_yaml, write_yaml
from graphprune.pipeline.registry import make_pass, make_target
from graphprune.pipeline.stages import DistillationSettings, Stage, TrainingSettings, merged
from graphprune.pipeline.target import Target
from graphprune.pipeline.text import parse_pipeline

Step = Pass | str | Mapping[str, object]
ONLY = "main"
"""Name of the stage of a recipe that has one pipeline."""
_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"


class _TargetFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    options: dict[str, Any] = Field(default_factory=dict)


_Pipeline = str | list[str | dict[str, dict[str, Any] | None]]


class _StageFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str = Field(pattern=_NAME)
    pipeline: _Pipeline
    training: dict[str, Any] | None = None
    distillation: dict[str, Any] | None = None
    train: bool = True


class _RecipeFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    version: int = 1
    variables: dict[str, bool | int | float | str] = Field(default_factory=dict)
    training: dict[str, Any] | None = None
    distillation: dict[str, Any] | None = None
    pipeline: _Pipeline | None = None
    stages: list[_StageFile] | None = None
    target: str | _TargetFile | None = None


@dataclass(frozen=True)
class Recipe:
    """What to do to a model.

    Attributes:
        stages: One after the other, each with its pipeline; at least one.
        target: Where to lower to, if it says.
        variables: Values that the file named; kept so that it can be written again.
    """

    stages: tuple[Stage, ...]
    target: Target | None = None
    variables: Mapping[str, object] = field(default_factory=dict)

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The pipeline of a recipe that has one.

        Raises:
            RecipeError: It has several stages.
        """
        if len(self.stages) > 1:
            names = ", ".join(stage.name for stage in self.stages)
            raise RecipeError(
                f"this recipe has {len(self.stages)} stages ({names}), which graphprune train runs one after the other; take the "
                f"pipeline of one with recipe.stage(name).passes"
            )
        return self.stages[0].passes

    def stage(self, name: str) -> Stage:
        """A stage by name.

        Raises:
            RecipeError: There is none of that name.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = [stage.name for stage in self.stages]
        raise RecipeError(f"there is no stage {name!r}{suggest(name, names)}; there are {', '.join(names)}")

    @classmethod
    def of(cls, source: Recipe | Step | Sequence[Step] | Path, /, **overrides: object) -> Recipe:
        """Make a recipe from any of its writings.

        Args:
            source: A recipe, a pass, pipeline text, a list of passes and texts, a parsed mapping, or a path to a YAML file.
            **overrides: Values for the recipe's variables; each must exist in it.

        Raises:
            RecipeError: Anything in it is malformed or unknown; names its path, such as
                ``pipeline[1].insert-masks.sparsity``.
        """
        if isinstance(source, Path):
            return cls.load(source, **overrides)
        if isinstance(source, Mapping):
            return cls._from_mapping(source, overrides)
        for name in overrides:
            raise RecipeError(f"variable {name!r} cannot be set: only a recipe file or mapping has variables")
        if isinstance(source, Recipe):
            return source
        steps: Sequence[Step] = [source] if isinstance(source, (Pass, str)) else source
        return cls((Stage(ONLY, _passes(steps, {}, "pipeline")),))

    @classmethod
    def load(cls, path: Path | str, /, **overrides: object) -> Recipe:
        """Read a YAML file.

        Raises:
            RecipeError: No such file, or not a recipe; names file, line and path.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"cannot read recipe {path}: {error}") from None
        try:
            return cls.parse(text, **overrides)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from None

    @classmethod
    def parse(cls, text: str, /, **overrides: object) -> Recipe:
        """Read YAML text.

        Raises:
            RecipeError: Not YAML, a tab, a tag, a repeated key, a wrong type, or anything unknown.
        """
        data = read_yaml(text)
        if not isinstance(data, Mapping):
            raise RecipeError(f"a recipe is a mapping with the key 'pipeline', not {type(data).__name__}")
        return cls._from_mapping(data, overrides)

    @classmethod
    def _from_mapping(cls, data: Mapping[str, object], overrides: Mapping[str, object]) -> Recipe:
        try:
            content = _RecipeFile.model_validate(dict(data))
        except ValidationError as error:
            raise RecipeError(_explain(error)) from None
        if content.version != 1:
            raise RecipeError(f"version: this is graphprune's recipe version 1, not {content.version}")
        for name in overrides:
            if name not in content.variables:
                raise RecipeError(f"variable {name!r} is not in the recipe{suggest(name, content.variables)}")
        variables = {**content.variables, **overrides}
        target = None
        if content.target is not None:
            entry = content.target if isinstance(content.target, _TargetFile) else _TargetFile(name=content.target)
            options = substitute(entry.options, variables, "target")
            target = make_target(entry.name, options, "target")  # type: ignore[arg-type]
        return cls(_stages(content, variables), target, variables)

    def text(self) -> str:
        """The pipeline as text, of a recipe that has one."""
        return ",".join(str(step) for step in self.passes)

    def to_yaml(self) -> str:
        """The recipe as YAML, variables put in."""
        data: dict[str, object] = {"version": 1}
        if len(self.stages) == 1 and self.stages[0].name == ONLY:
            data |= _plain_stage(self.stages[0])
        else:
            data["stages"] = [{"name": stage.name, **_plain_stage(stage)} for stage in self.stages]
        if self.target is not None:
            options = {key: _data(value) for key, value in vars(self.target).items()}
            data["target"] = {"name": self.target.name, "options": options}
        return write_yaml(data)

    def __str__(self) -> str:
        return self.text() if len(self.stages) == 1 else self.to_yaml()


def _stages(content: _RecipeFile, variables: Mapping[str, object]) -> tuple[Stage, ...]:
    """The stages of a file, with what it says for all of them merged in."""
    if (content.pipeline is None) == (content.stages is None):
        problem = "has neither" if content.pipeline is None else "has both"
        raise RecipeError(f"a recipe has either a pipeline or stages; this one {problem}")
    if content.pipeline is not None:
        files = [(ONLY, "", _StageFile(name=ONLY, pipeline=content.pipeline))]
    else:
        files = [(stage.name, f"stages[{index}].", stage) for index, stage in enumerate(content.stages or ())]
    names = [name for name, _, _ in files]
    if not names:
        raise RecipeError("stages: there is none; a recipe has at least one")
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"stages: the name {name!r} is given twice")
    return tuple(_stage(name, where, file, content, variables) for name, where, file in files)


def _stage(name: str, where: str, file: _StageFile, all_stages: _RecipeFile, variables: Mapping[str, object]) -> Stage:
    steps = [file.pipeline] if isinstance(file.pipeline, str) else file.pipeline
    training = _settings(TrainingSettings, merged(all_stages.training, file.training), variables, f"{where}training")
    distillation = None
    off = "distillation" in file.model_fields_set and file.distillation is None
    if not off and (all_stages.distillation is not None or file.distillation is not None):
        said = merged(all_stages.distillation, file.distillation)
        distillation = _settings(DistillationSettings, said, variables, f"{where}distillation")
    return Stage(name, _passes(steps, variables, f"{where}pipeline"), training, distillation, file.train)


_S = TypeVar("_S", TrainingSettings, DistillationSettings)


def _settings(cls: type[_S], data: Mapping[str, Any], variables: Mapping[str, object], where: str) -> _S:
    try:
        return cls.model_validate(substitute(data, variables, where))
    except ValidationError as error:
        raise RecipeError(_explain(error, where, cls)) from None


def _passes(steps: Sequence[object], variables: Mapping[str, object], where_all: str) -> tuple[Pass, ...]:
    passes: list[Pass] = []
    for step in steps:
        where = f"{where_all}[{len(passes)}]"
        if isinstance(step, Pass):
            passes.append(step)
        elif isinstance(step, str):
            for name, options in parse_pipeline(str(substitute(step, variables, where))):
                passes.append(make_pass(name, options, f"{where_all}[{len(passes)}]"))
        elif isinstance(step, Mapping) and len(step) == 1:
            ((name, options),) = step.items()
            replaced = substitute(options or {}, variables, f"{where}.{name}")
            if not isinstance(replaced, dict):
                raise RecipeError(f"{where}.{name}: options are a mapping, not {type(replaced).__name__}")
            passes.append(make_pass(str(name), replaced, where))
        else:
            raise RecipeError(
                f"{where}: a step is a pass, a text such as 'fold-masks', or a mapping of one name to its options"
            )
    return tuple(passes)


def _plain(step: Pass) -> object:
    options = {key: _data(value) for key, value in step.options().items()}
    return {step.name: options} if options else step.name


def _data(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return [_data(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _plain_stage(stage: Stage) -> dict[str, object]:
    data: dict[str, object] = {"pipeline": [_plain(step) for step in stage.passes]}
    if stage.training.said():
        data["training"] = stage.training.said()
    if stage.distillation is not None:
        data["distillation"] = stage.distillation.said()
    return data if stage.train else {**data, "train": False}


def _explain(error: ValidationError, where: str = "", model: type[BaseModel] | None = None) -> str:
    problem = max(error.errors(), key=lambda item: (item["type"] == "extra_forbidden", len(item["loc"])))
    path = where
    for part in problem["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not (
            part.startswith(("list[", "dict[", "tuple[", "_Target", "float", "int", "literal"))
            or part in ("str", "bool")
        ):
            path += f".{part}" if path else part
    if problem["type"] == "extra_forbidden":
        owner, _, key = path.rpartition(".")
        known = model or (_StageFile if owner.startswith("stages") else _TargetFile if owner else _RecipeFile)
        return f"unknown key {path!r}{suggest(key, known.model_fields)}"
    return f"{path or 'recipe'}: {problem['msg']}, not {problem['input']!r}"
