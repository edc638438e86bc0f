"""What is wrong with a configuration, in words: key, value, where it was written, what to write instead."""

import difflib
import json
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

import pydantic
from pydantic import BaseModel
from pydantic_core import ErrorDetails

from llmtrain.config import yaml_lines
from llmtrain.config.other_names import MEANT
from llmtrain.config.schema import RunConfig
from llmtrain.config.section import IN_WORDS

COMMAND_LINE = "command line"


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

    def replace(self, path: yaml_lines.Path, inside: Iterable[yaml_lines.Path]) -> None:
        """Note what the command line says there; of what the file has below it nothing is left."""
        self.places = {place: said for place, said in self.places.items() if place[: len(path)] != path}
        self.places |= {(*path, *below): COMMAND_LINE for below in inside}

    def describe(self, config: RunConfig, dotted: str) -> str:
        """`train.micro_batch_size=6 (configs/gpt2.yaml:14)`."""
        path = tuple(dotted.split("."))
        value: Any = config
        for name in path:
            value = getattr(value, name)
        return f"{dotted}={show(value)} ({self.places.get(path, 'default')})"


def explain(error: ErrorDetails, values: dict[str, Any], origins: Origins, root: type[BaseModel]) -> str:
    """One line: key, value, place, what is allowed, the nearest valid key."""
    path, model, kinds = _locate(error["loc"], values, root)
    dotted = ".".join(map(str, path))
    head = f"{dotted}={show(error['input'])} ({origins.of(path)})"
    context = error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden":
            if model is not None and (of_another := _of_another_kind(path, model, kinds, values, origins)):
                return f"{head}: {of_another}"
            return f"{head}: unknown key; {_nearest_key(path, model, root)}"
        case "literal_error":
            allowed = context["expected"].replace(" or ", ", ")
            return f"{head}: use one of {allowed}{_nearest_value(error['input'], allowed)}"
        case "union_tag_invalid":
            allowed = context["expected_tags"]
            return (
                f"{dotted}.kind={show(context['tag'])} ({origins.of((*path, 'kind'))}): use one of "
                f"{allowed}{_nearest_value(context['tag'], allowed)}"
            )
        case "union_tag_not_found":
            return f"{head}: needs a key 'kind' that says what it is"
        case "missing":
            return f"{dotted} ({origins.of(path)}): missing; it has no default"
        case "value_error":
            return f"{dotted} ({origins.of(path)}): {context['error']}" if path else str(context["error"])
        case "model_type" | "model_attributes_type":
            return f"{head}: must be a section with keys below it, not a {kind_of(error['input'])}"
        case "bool_type":
            return f"{head}: must be true or false"
        case "int_type" | "int_from_float":
            return f"{head}: must be a whole number, not a {kind_of(error['input'])}"
        case "float_type":
            return f"{head}: must be a number, not a {kind_of(error['input'])}"
        case "string_type" if error["input"] is None:
            if rule := _why_not_empty(path, model):
                return f"{head}: must not be empty; {rule}"
            return f"""{head}: must be text; for an empty one write '{dotted}=""' on the command line, "" in a file"""
        case "string_type":
            quoted = f"""; write '{dotted}="..."' on the command line, "..." in a file"""
            is_word = not isinstance(error["input"], dict | list)
            return f"{head}: must be text, not a {kind_of(error['input'])}{quoted if is_word else ''}"
        case "string_pattern_mismatch" | "string_too_short" | "string_too_long":
            return f"{head}: {_rule_of_text(error)}"
        case "too_short":
            return f"{head}: needs {context['min_length']} or more entries, not {context['actual_length']}"
        case "too_long":
            return f"{head}: takes {context['max_length']} entries at most, not {context['actual_length']}"
        case "list_type":
            return f"{head}: must be a list, e.g. [{show(error['input'])}]"
        case _:
            message = error["msg"].replace("Input should", "must").replace("should", "must")
            return f"{head}: {message[:1].lower()}{message[1:]}"


def _rule_of_text(error: ErrorDetails) -> str:
    context = error.get("ctx", {})
    match error["type"]:
        case "string_pattern_mismatch":
            return IN_WORDS.get(context["pattern"], f"must match the pattern {context['pattern']}")
        case "string_too_short":
            least = context["min_length"]
            return "must not be empty" if least == 1 else f"must have at least {least} characters"
        case "string_too_long":
            return f"must have at most {context['max_length']} characters, not {len(error['input'])}"
        case _:
            return error["msg"]


def _why_not_empty(path: yaml_lines.Path, model: type[BaseModel] | None) -> str | None:
    """What keeps a setting from being an empty text; None where nothing does."""
    try:
        if model is not None:
            model.model_validate({path[-1]: ""})
    except pydantic.ValidationError as error:
        return next((_rule_of_text(each) for each in error.errors() if each["loc"] == path[-1:]), None)
    return None


def _locate(
    loc: tuple[int | str, ...], values: Any, root: type[BaseModel]
) -> tuple[yaml_lines.Path, type[BaseModel] | None, list[type[BaseModel]]]:
    """The path in the file that pydantic's `loc` means (it puts a union's tag between, and marks what is wrong with
    a key instead of its value), the section it lies in, and the sections that might stand there instead."""
    path: list[str | int] = []
    model: Any = root
    kinds: list[type[BaseModel]] = []
    loc = loc[:-1] if loc[-1:] == ("[key]",) else loc
    for position, part in enumerate(loc):
        here = values.get("kind") if isinstance(values, dict) else None
        tagged = [m for m in _models(model) if _tag(m) == part]
        if tagged and (part == here or (here is None and part not in (values or {}))):
            kinds, model = _models(model), tagged[0]
            continue
        path.append(part)
        values = values[part] if _has(values, part) else None
        if position < len(loc) - 1:
            kinds, model = [], _field_type(model, part)
    section = _models(model)
    return tuple(path), section[0] if len(section) == 1 else None, kinds


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


def _of_another_kind(
    path: yaml_lines.Path,
    model: type[BaseModel],
    kinds: list[type[BaseModel]],
    values: dict[str, Any],
    origins: Origins,
) -> str | None:
    """Of a key that belongs to a section of another `kind`: to which, and what to write; None of any other key."""
    name, holder, prefix = str(path[-1]), path[:-1], ".".join(map(str, path[:-1]))
    others = [kind for kind in kinds if name in kind.model_fields]
    if not others:
        return None
    belongs = f"{name} belongs to kind: {' or '.join(map(str, map(_tag, others)))}, not {_tag(model)}"
    section: Any = values
    for part in holder:
        section = section[part]
    # What the file has stays where the command line sets one key of a section: only a whole one replaces it.
    given_now = {key for key in section if origins.of((*holder, key)) == COMMAND_LINE}
    if given_now and name not in given_now:
        meant = model
    elif name in given_now and "kind" not in given_now and len(given_now) < len(section):
        meant = others[0]
    else:
        return f"{belongs}; leave it out, or set {prefix}.kind={_tag(others[0])}"
    fields = {key: info for key, info in meant.model_fields.items() if key != "kind"}
    kept = yaml_lines.write_inline({"kind": _tag(meant), **{key: section[key] for key in fields if key in section}})
    needed = "".join(f", {key}: ..." for key, info in fields.items() if info.is_required() and key not in section)
    return f"{belongs}; write {shlex.quote(f'{prefix}={kept[:-1]}{needed}' + '}')}"


def _nearest_key(path: yaml_lines.Path, model: type[BaseModel] | None, root: type[BaseModel]) -> str:
    name = str(path[-1])
    prefix = ".".join(map(str, path[:-1]))
    siblings = list((model or root).model_fields)
    if root is RunConfig and name in MEANT:
        return f"here that is {MEANT[name]}"
    near = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if near:
        return f"did you mean {prefix + '.' if prefix else ''}{near[0]}?"
    everywhere: dict[str, str] = {}
    here = ".".join(part for part in path[:-1] if isinstance(part, str))
    for dotted in _all_keys(root):
        holder, _, key = dotted.rpartition(".")
        if holder != here:  # of the same section, but of another kind of it
            everywhere.setdefault(key, dotted)
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


def show(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False) if not isinstance(value, BaseModel) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def kind_of(value: Any) -> str:
    names = {dict: "section", list: "list", str: "text", bool: "truth value", type(None): "null"}
    return names.get(type(value), "number")
