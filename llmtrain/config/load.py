"""Read the YAML file and the command line's `section.key=value`; report every mistake at once."""

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

import pydantic
from pydantic import BaseModel
from pydantic_core import ErrorDetails

from llmtrain.config import yaml_lines
from llmtrain.config.schema import RunConfig
from llmtrain.config.section import MAY_CHANGE
from llmtrain.errors import ConfigError

COMMAND_LINE = "command line"
_LENGTHS = ("steps", "epochs", "tokens")
AnySection = TypeVar("AnySection", bound=BaseModel)


@dataclass
class Origins:
    """Where each setting was written, for error messages."""

    places: dict[yaml_lines.Path, str] = field(default_factory=dict)

    def of(self, path: yaml_lines.Path) -> str:
        """`configs/gpt2.yaml:14`, `command line` or `default`; of the nearest enclosing key that was written.

        On the command line a section is only written with a key below it.
        """
        for end in range(len(path), 0, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return next((place for below, place in self.places.items() if below[: len(path)] == path), "default")

    def describe(self, config: RunConfig, dotted: str) -> str:
        """`train.micro_batch_size=6 (configs/gpt2.yaml:14)`."""
        path = tuple(dotted.split("."))
        value: Any = config
        for name in path:
            value = getattr(value, name)
        return f"{dotted}={_show(value)} ({self.places.get(path, 'default')})"


def split_settings(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """A command line's configuration file, if one is named, and its overrides.

    Raises:
        ConfigError: it names several files.
    """
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise ConfigError([f"one configuration file at most, not {' and '.join(files)}"])
    return (files[0] if files else None), [word for word in words if "=" in word]


def load_config(file: str | Path | None, overrides: Sequence[str] = ()) -> tuple[RunConfig, Origins]:
    """The configuration of `file` (None: all defaults) with `section.key=value` overrides applied.

    Raises:
        ConfigError: lists everything that is wrong, each with its place and what is allowed.
    """
    return load_section(RunConfig, file, overrides)


def load_section(
    root: type[AnySection], file: str | Path | None, overrides: Sequence[str] = ()
) -> tuple[AnySection, Origins]:
    """The same for a file that holds another section, such as a cluster's profile.

    Raises:
        ConfigError: lists everything that is wrong, each with its place and what is allowed.
    """
    origins = Origins()
    values: dict[str, Any] = {}
    problems: list[str] = []
    if file is not None:
        values, lines = _read_file(Path(file))
        origins.places = {path: f"{file}:{line}" for path, line in lines.items() if path}
    for override in overrides:
        try:
            _apply_override(values, override, origins)
        except ValueError as error:
            problems.append(f"{override} ({COMMAND_LINE}): {error}")
    try:
        config = root.model_validate(values)
    except pydantic.ValidationError as error:
        problems += [_explain(e, values, origins, root) for e in error.errors()]
        raise ConfigError(problems) from None
    if problems:
        raise ConfigError(problems)
    return config, origins


def resolved_yaml(config: RunConfig) -> str:
    """The whole configuration, defaults included, as YAML that `load_config` reads back equal."""
    return yaml_lines.write(config.model_dump(mode="json"))


def json_schema() -> str:
    """The JSON schema of a configuration file, for editors."""
    schema = RunConfig.model_json_schema()
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=1) + "\n"


def with_precision(config: RunConfig, precision: str) -> RunConfig:
    """What `train.precision=auto` came to."""
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})


def auto_is_fp32(config: RunConfig) -> bool:
    """Whether `train.precision=auto` can only be fp32, whatever the machine is fast at."""
    return config.model.kind == "qlora" and config.model.compute_dtype == "fp32"


def fixed_differences(old: RunConfig, new: RunConfig) -> list[tuple[str, str, str]]:
    """(key, old value, new value) of every difference that a resumed run must not have."""

    def walk(a: Any, b: Any, path: str) -> Iterator[tuple[str, str, str]]:
        if isinstance(a, BaseModel) and type(a) is type(b):
            for name, info in type(a).model_fields.items():
                extra = info.json_schema_extra
                if not (isinstance(extra, dict) and extra.items() >= MAY_CHANGE.items()):
                    yield from walk(getattr(a, name), getattr(b, name), f"{path}.{name}" if path else name)
        elif a != b:
            yield path, _show(a), _show(b)

    return list(walk(old, new, ""))


def _read_file(file: Path) -> tuple[dict[str, Any], dict[yaml_lines.Path, int]]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(file.parent.glob("*.yaml")) if file.parent.is_dir() else []
        known = "; there are: " + ", ".join(map(str, near)) if near else ""
        raise ConfigError([f"{file}: no such configuration file{known}"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{file}: cannot be read: {error}"]) from None
    try:
        values, lines = yaml_lines.read(text, str(file))
    except yaml_lines.YamlError as error:
        raise ConfigError([str(error)]) from None
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise ConfigError([f"{file}:1: must hold sections such as 'model:' and 'train:', not a {_kind(values)}"])
    return values, lines


def _apply_override(values: dict[str, Any], override: str, origins: Origins) -> None:
    """Set one `section.key=value` in `values`; the value is read as YAML."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted or dotted.startswith("-"):
        raise ValueError("not of the form section.key=value, e.g. train.steps=100")
    try:
        value, _ = yaml_lines.read(text, dotted)
    except yaml_lines.YamlError as error:
        raise ValueError(str(error)) from None
    *parents, last = (int(part) if part.isdigit() else part for part in dotted.split("."))
    target: Any = values
    for key in parents:
        if isinstance(target, list) and isinstance(key, int) and key < len(target):
            target = target[key]
        elif isinstance(target, dict):
            target = target.setdefault(key, {})
            if target is None:
                raise ValueError(f"'{key}' is null in the file and has no key below it")
        else:
            raise ValueError(f"there is no '{key}' to set something in")
    if not (isinstance(target, dict) or (isinstance(target, list) and isinstance(last, int) and last < len(target))):
        raise ValueError(f"there is no '{last}' to set here")
    holder: Any = target
    holder[last] = value
    origins.places[(*parents, last)] = COMMAND_LINE
    if parents == ["train"] and last in _LENGTHS and value is not None:
        for other in _LENGTHS:  # a length on the command line replaces the file's, in whatever unit
            if other != last and origins.of(("train", other)) != COMMAND_LINE:
                holder.pop(other, None)


def _explain(error: ErrorDetails, values: dict[str, Any], origins: Origins, root: type[BaseModel]) -> str:
    """One line: key, value, place, what is allowed, the nearest valid key."""
    path, model = _locate(error["loc"], values, root)
    dotted = ".".join(map(str, path))
    head = f"{dotted}={_show(error['input'])} ({origins.of(path)})"
    context = error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            return f"{head}: unknown key; {_nearest_key(path, model, root)}"
        case "literal_error":
            allowed = context["expected"].replace(" or ", ", ")
            return f"{head}: use one of {allowed}{_nearest_value(error['input'], allowed)}"
        case "union_tag_invalid":
            allowed = context["expected_tags"]
            return (
                f"{dotted}.kind={_show(context['tag'])} ({origins.of((*path, 'kind'))}): use one of "
                f"{allowed}{_nearest_value(context['tag'], allowed)}"
            )
        case "union_tag_not_found":
            return f"{head}: needs a key 'kind' that says what it is"
        case "missing":
            return f"{dotted} ({origins.of(path)}): missing; it has no default"
        case "value_error":
            return f"{dotted} ({origins.of(path)}): {context['error']}" if path else str(context["error"])
        case "model_type" | "model_attributes_type":
            return f"{head}: must be a section with keys below it, not a {_kind(error['input'])}"
        case "bool_type":
            return f"{head}: must be true or false"
        case "int_type" | "int_from_float":
            return f"{head}: must be a whole number, not a {_kind(error['input'])}"
        case "float_type":
            return f"{head}: must be a number, not a {_kind(error['input'])}"
        case "string_type" if error["input"] is None:
            return f"""{head}: must be text; for an empty one write '{dotted}=""' on the command line, "" in a file"""
        case "string_type":
            return f"{head}: must be text, not a {_kind(error['input'])} (put it in quotes)"
        case "list_type":
            return f"{head}: must be a list, e.g. [{_show(error['input'])}]"
        case _:
            message = error["msg"].replace("Input should", "must").replace("should", "must")
            return f"{head}: {message[:1].lower()}{message[1:]}"


def _locate(
    loc: tuple[int | str, ...], values: Any, root: type[BaseModel]
) -> tuple[yaml_lines.Path, type[BaseModel] | None]:
    """The path in the file that pydantic's `loc` means (it puts a union's tag between, and marks what is wrong with
    a key instead of its value), and the section it lies in."""
    path: list[str | int] = []
    model: Any = root
    loc = loc[:-1] if loc[-1:] == ("[key]",) else loc
    for position, part in enumerate(loc):
        here = values.get("kind") if isinstance(values, dict) else None
        tagged = [m for m in _models(model) if _tag(m) == part]
        if tagged and (part == here or (here is None and part not in (values or {}))):
            model = tagged[0]
            continue
        path.append(part)
        values = values[part] if _has(values, part) else None
        if position < len(loc) - 1:
            model = _field_type(model, part)
    section = _models(model)
    return tuple(path), section[0] if len(section) == 1 else None


def _has(values: Any, part: str | int) -> bool:
    if isinstance(values, dict):
        return part in values
    return isinstance(values, list) and isinstance(part, int) and part < len(values)


def _field_type(model: Any, part: str | int) -> Any:
    if isinstance(part, int):
        return model
    for section in _models(model):
        if part in section.model_fields:
            return section.model_fields[part].annotation
    return None


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The configuration sections that an annotation (optional, list, union) can hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _tag(model: type[BaseModel]) -> str | None:
    kind = model.model_fields.get("kind")
    return get_args(kind.annotation)[0] if kind and get_args(kind.annotation) else None


def _nearest_key(path: yaml_lines.Path, model: type[BaseModel] | None, root: type[BaseModel]) -> str:
    name = str(path[-1])
    prefix = ".".join(map(str, path[:-1]))
    siblings = list((model or root).model_fields)
    near = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if near:
        return f"did you mean {prefix + '.' if prefix else ''}{near[0]}?"
    everywhere: dict[str, str] = {}
    for dotted in _all_keys(root):
        everywhere.setdefault(dotted.rsplit(".", 1)[-1], dotted)
    near = difflib.get_close_matches(name, everywhere, n=1, cutoff=0.75)
    known = f"'{prefix}' has: " if prefix else f"the {'sections' if root is RunConfig else 'keys'} are: "
    meant = f"did you mean {everywhere[near[0]]}? " if near else ""
    return meant + known + ", ".join(siblings)


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        yield f"{prefix}{name}"
        for inner in _models(info.annotation):
            yield from _all_keys(inner, f"{prefix}{name}.")


def _nearest_value(value: Any, allowed: str) -> str:
    choices = [word.strip("' ") for word in allowed.split(",")]
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def _show(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False) if not isinstance(value, BaseModel) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _kind(value: Any) -> str:
    names = {dict: "section", list: "list", str: "text", bool: "truth value", type(None): "null"}
    return names.get(type(value), "number")
