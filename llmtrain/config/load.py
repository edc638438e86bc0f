"""Read the YAML file and the command line's `section.key=value`; report every mistake at once."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from pydantic import BaseModel

from llmtrain import access_tokens
from llmtrain.config import yaml_lines
from llmtrain.config.explain import COMMAND_LINE, Origins, explain, kind_of
from llmtrain.config.schema import RunConfig
from llmtrain.errors import ConfigError

_COMPLETION_ONLY = "data.format.completion_only"
_LENGTHS = ("steps", "epochs", "tokens")
AnySection = TypeVar("AnySection", bound=BaseModel)


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


def load_written(file: Path) -> RunConfig:
    """The configuration of a file that `resolved_yaml` wrote, such as a run folder's: many times faster.

    Raises:
        ConfigError: as `load_config`.
    """
    with contextlib.suppress(ConfigError, pydantic.ValidationError):
        return RunConfig.model_validate(_read_file(file, is_written=True)[0])
    return load_config(file)[0]  # says what is wrong, and in which line


def load_to_start(file: str | Path | None, overrides: Sequence[str] = ()) -> tuple[RunConfig, Origins]:
    """The same of what a person starts, which rules apply to that are younger than some run folders.

    `load_config` is without them: RUN/config.yaml of an older version has to stay readable.

    Raises:
        ConfigError: lists everything that is wrong, each with its place and what is allowed.
    """
    config, origins = load_config(file, overrides)
    if config.hub.repo is not None and access_tokens.found_in(resolved_yaml(config)):
        raise ConfigError(
            [
                f"{origins.describe(config, 'hub.repo')}: the configuration goes to the Hub, and something like an "
                "access token, or an address with a password or a signature, stands in it; take it out"
            ]
        )
    if config.evaluate.task.samples and not getattr(config.data.format, "completion_only", True):
        asks, learns = (origins.describe(config, key) for key in ("evaluate.task.samples", _COMPLETION_ONLY))
        raise ConfigError(
            [
                f"{asks} asks prompts and compares completions, which {learns} does not tell apart; leave one of them "
                "out (a run that began with both goes on with evaluate.task.samples=0)"
            ]
        )
    return config, origins


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
        problems += [explain(e, values, origins, root) for e in error.errors()]
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
    """With what `train.precision=auto` came to."""
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})


def _read_file(file: Path, is_written: bool = False) -> tuple[dict[str, Any], dict[yaml_lines.Path, int]]:
    if file.exists() and not file.is_file() and not file.is_dir():
        raise ConfigError([f"{file}: a run reads its configuration more than once, so it has to be a regular file"])
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(file.parent.glob("*.yaml")) if file.parent.is_dir() else []
        known = "; there are: " + ", ".join(map(str, near)) if near else ""
        raise ConfigError([f"{file}: no such configuration file{known}"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{file}: cannot be read: {error}"]) from None
    try:
        values, lines = yaml_lines.read(text, str(file), is_written)
    except yaml_lines.YamlError as error:
        raise ConfigError([str(error)]) from None
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise ConfigError([f"{file}:1: must hold sections such as 'model:' and 'train:', not a {kind_of(values)}"])
    return values, lines


def _apply_override(values: dict[str, Any], override: str, origins: Origins) -> None:
    """Set one `section.key=value` in `values`; the value is read as YAML."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted or dotted.startswith("-"):
        raise ValueError("not of the form section.key=value, e.g. train.steps=100")
    try:
        value, lines = yaml_lines.read(text, dotted)
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
    origins.replace((*parents, last), [(), *lines])
    if parents == ["train"] and last in _LENGTHS and value is not None:
        for other in _LENGTHS:  # a length on the command line replaces the file's, in whatever unit
            if other != last and origins.of(("train", other)) != COMMAND_LINE:
                holder.pop(other, None)
