"""A recipe: pipeline and target as data, in YAML, as pipeline text, or as Python objects; all three are equal."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graphprune.errors import RecipeError, suggest
from graphprune.pipeline.base import Pass
from graphprune.pipeline.expressions import substitute
from graphprune.pipeline.registry import make_pass, make_target
from graphprune.pipeline.target import Target
from graphprune.pipeline.text import parse_pipeline

Step = Pass | str | Mapping[str, object]


class _TargetFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    options: dict[str, Any] = Field(default_factory=dict)


class _RecipeFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    version: int = 1
    variables: dict[str, bool | int | float | str] = Field(default_factory=dict)
    pipeline: str | list[str | dict[str, dict[str, Any] | None]]
    target: str | _TargetFile | None = None


@dataclass(frozen=True)
class Recipe:
    """What to do to a model.

    Attributes:
        passes: The pipeline.
        target: Where to lower to, if it says.
        variables: Values that the file named; kept so that it can be written again.
    """

    passes: tuple[Pass, ...]
    target: Target | None = None
    variables: Mapping[str, object] = field(default_factory=dict)

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
        return cls(_passes(steps, {}))

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
        try:
            data = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
            problem = getattr(error, "problem", None) or str(error)
            hint = "; indent with spaces" if "\\t" in problem else ""
            hint = "; a recipe is plain data, tags are not allowed" if "tag" in problem else hint
            raise RecipeError(f"{where}{problem}{hint}") from None
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
        steps = [content.pipeline] if isinstance(content.pipeline, str) else content.pipeline
        target = None
        if content.target is not None:
            entry = content.target if isinstance(content.target, _TargetFile) else _TargetFile(name=content.target)
            options = substitute(entry.options, variables, "target")
            target = make_target(entry.name, options, "target")  # type: ignore[arg-type]
        return cls(_passes(steps, variables), target, variables)

    def text(self) -> str:
        """The pipeline as text."""
        return ",".join(str(step) for step in self.passes)

    def to_yaml(self) -> str:
        """The recipe as YAML, variables put in."""
        data: dict[str, object] = {"version": 1, "pipeline": [_plain(step) for step in self.passes]}
        if self.target is not None:
            options = {key: _data(value) for key, value in vars(self.target).items()}
            data["target"] = {"name": self.target.name, "options": options}
        return yaml.dump(data, Dumper=_Dumper, sort_keys=False)

    def __str__(self) -> str:
        return self.text()


def read_value(text: str) -> object:
    """Read one value as a recipe would: 0.8 is a number, true a bool, 4x1 and 2:4 are texts.

    Raises:
        RecipeError: It is no YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise RecipeError(f"{text!r} cannot be read as a YAML value") from None


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and reads numbers as YAML 1.2 does: 2:4 is a text, 1e-3 a number."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key is a list or mapping", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Safe YAML that puts a text in quotes where YAML 1.1 or 1.2 would read a number."""


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$")
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(_NUMBERS[0], re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
    _side.add_implicit_resolver(_NUMBERS[1], _FLOAT, list("-+0123456789."))
_Loader.add_constructor(_NUMBERS[0], lambda loader, node: int(node.value))  # 010 is ten


def _passes(steps: Sequence[object], variables: Mapping[str, object]) -> tuple[Pass, ...]:
    passes: list[Pass] = []
    for step in steps:
        where = f"pipeline[{len(passes)}]"
        if isinstance(step, Pass):
            passes.append(step)
        elif isinstance(step, str):
            for name, options in parse_pipeline(str(substitute(step, variables, where))):
                passes.append(make_pass(name, options, f"pipeline[{len(passes)}]"))
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


def _explain(error: ValidationError) -> str:
    problem = max(error.errors(), key=lambda item: (item["type"] == "extra_forbidden", len(item["loc"])))
    path = ""
    for part in problem["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not (part.startswith(("list[", "dict[", "_Target")) or part in ("str", "bool", "int", "float")):
            path += f".{part}" if path else part
    if problem["type"] == "extra_forbidden":
        owner, _, key = path.rpartition(".")
        return f"unknown key {path!r}{suggest(key, (_TargetFile if owner else _RecipeFile).model_fields)}"
    return f"{path or 'recipe'}: {problem['msg']}, not {problem['input']!r}"
