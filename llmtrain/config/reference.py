"""docs/settings.md, written from the JSON schema: every setting on one page."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from llmtrain.config.model_sections import QLORA_DEFAULTS
from llmtrain.config.schema import RunConfig

Schema = Mapping[str, Any]

_HUGE = 2**53
"""A limit that nobody meets is not worth telling."""

_INTRODUCTION = """# Every setting

A configuration is a YAML file of the sections below; every key is optional. On the command line the same keys are
`section.key=value`, and may lie deeper (`optim.schedule.warmup_steps=700`). A run's own `config.yaml` holds all of
them with their values. Where the last column says "yes", a run that is resumed may have another value than it began
with.

(Written by `llmtrain schema --markdown > docs/settings.md`; a test compares it with the code.)
"""


def settings_page() -> str:
    """Markdown: a heading for each section, and for each kind of what has several."""
    schema = RunConfig.model_json_schema()
    lines = [_INTRODUCTION]
    for name, section in schema["properties"].items():
        lines += _described(name, section, schema["$defs"], 2)
    return "\n".join(lines)


def _described(path: str, property: Schema, defs: Schema, level: int) -> Iterator[str]:
    """A section, or the kinds that stand for one; what lies inside it follows under headings of its own."""
    kinds = _kinds(property)
    if not kinds:
        yield from _table(path, f"{'#' * level} `{path}`", _resolve(_references(property)[0], defs), defs, level)
    for kind, reference in kinds.items():
        yield from _table(path, f"{'#' * level} `{path}`, `kind: {kind}`", _resolve(reference, defs), defs, level)


def _table(path: str, heading: str, section: Schema, defs: Schema, level: int) -> Iterator[str]:
    properties: Schema = section["properties"]
    yield heading + "\n"
    if about := properties.get("kind", {}).get("description") or section.get("description"):
        yield _one_line(about) + "\n"
    inside = {name: each for name, each in properties.items() if _is_section(each)}
    plain = {name: each for name, each in properties.items() if name not in inside and not _is_constant(each)}
    if plain:
        yield "| key | value | default | meaning | may change |"
        yield "|---|---|---|---|---|"
    for name, each in plain.items():
        default = _code(each["default"]) if "default" in each else "(needed)"
        if f"{path}.{name}" in QLORA_DEFAULTS:
            default += f"; qlora: {_code(QLORA_DEFAULTS[f'{path}.{name}'])}"
        may_change = "yes" if each.get("may_change_on_resume") else ""
        yield f"| `{name}` | {_type(each)} | {default} | {_cell(each.get('description', ''))} | {may_change} |"
    if plain:
        yield ""
    for name, each in inside.items():
        if about := each.get("description"):
            yield f"`{path}.{name}`, below: {_one_line(about)} By default {_code(each['default'])}.\n"
    for name, each in inside.items():
        yield from _described(f"{path}.{name}", each, defs, level + 1)


def _kinds(property: Schema) -> Mapping[str, str]:
    """What `kind` may be, each with the reference to its section; of a list, those of its items."""
    holder = property.get("items", property)
    found: Mapping[str, str] = holder.get("discriminator", {}).get("mapping", {})
    return {kind: found[kind] for kind in sorted(found, key=lambda kind: _order(holder, found[kind]))}


def _order(holder: Schema, reference: str) -> int:
    return [each["$ref"] for each in holder["oneOf"]].index(reference)


def _is_section(property: Schema) -> bool:
    return bool(_references(property) or _kinds(property))


def _references(property: Schema) -> list[str]:
    """Of a section that is one of a kind, or of null."""
    return [each["$ref"] for each in property.get("anyOf", [property]) if "$ref" in each]


def _is_constant(property: Schema) -> bool:
    """A `kind`, which the heading says."""
    return "const" in property


def _resolve(reference: str, defs: Schema) -> Schema:
    return defs[reference.removeprefix("#/$defs/")]


def _type(property: Schema) -> str:
    if "anyOf" in property:
        return " or ".join(_type(each) for each in property["anyOf"])
    if "enum" in property:
        return ", ".join(f"`{value}`" for value in property["enum"])
    if "const" in property:
        return f"`{property['const']}`"
    if property.get("type") == "array":
        return "a list" + (f" of: {_type(property['items'])}" if "items" in property else "")
    name = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true, false", "null": "null"}
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {property[key]:g}" for key, sign in signs.items() if abs(property.get(key, _HUGE)) < _HUGE]
    return " ".join([name.get(property.get("type", ""), "any"), ", ".join(limits)]).strip()


def _code(value: Any) -> str:
    return f"`{json.dumps(value, ensure_ascii=False)}`".replace("|", "\\|")


def _cell(text: str) -> str:
    return _one_line(text).replace("|", "\\|")


def _one_line(text: str) -> str:
    return " ".join(text.split())
