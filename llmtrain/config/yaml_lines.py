"""YAML with line numbers and without YAML 1.1's surprises.

PyYAML's safe loader reads `3e-4` as a string, `off` as False, `1_000` as a number and `12:30` as
base 60. This loader knows the scalars of YAML 1.2's core schema only, refuses a key that stands
twice in one mapping, and remembers where each value was written.
"""

import re
from typing import Any

import yaml
from yaml.constructor import SafeConstructor

Path = tuple[str | int, ...]
_MOST_VALUES = 100_000
"""Nine lines of nine aliases each stand for 400 million."""
_MOST_FAST = 20_000
"""Characters: in a million of them brackets nest so deeply that libyaml's recursion ends the process."""


class YamlError(ValueError):
    """Not YAML, or not a mapping of settings. The text names file, line and column."""


class _CoreLoader(yaml.SafeLoader):
    pass


_CoreLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
):
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


_FastLoader: Any = type(
    "_FastLoader",
    (yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader,),
    {"yaml_implicit_resolvers": _CoreLoader.yaml_implicit_resolvers},
)
"""libyaml's parser, some twenty times faster. In what people write it takes a tab for a space, and the like."""


class _CoreDumper(yaml.SafeDumper):
    """Puts quotes around a text that the loader would take for something else, such as "1e5"."""


_CoreDumper.yaml_implicit_resolvers = {
    first: [
        *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
        *_CoreLoader.yaml_implicit_resolvers.get(first, []),
    ]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_CoreLoader.yaml_implicit_resolvers}
}


def write(value: Any) -> str:
    """YAML that `read` reads back equal, and readers of YAML 1.1 too."""
    return yaml.dump(value, Dumper=_CoreDumper, sort_keys=False, allow_unicode=True)


def write_inline(value: Any) -> str:
    """The same on one line, as for the command line."""
    text = yaml.dump(
        value, Dumper=_CoreDumper, sort_keys=False, allow_unicode=True, default_flow_style=True, width=10**6
    )
    return text.rstrip("\n")


def read(text: str, name: str, is_written: bool = False) -> tuple[Any, dict[Path, int]]:
    """Parse `text`; returns the plain value and the line (from 1) of every key and list item in it.

    Args:
        is_written: by `write`, and perhaps changed since. What is wrong with it may be told in other words.

    Raises:
        YamlError: `text` is not YAML, has several documents, or a mapping has the same key twice.
    """
    lines: dict[Path, int] = {}
    loader = _FastLoader if is_written and len(text) <= _MOST_FAST else _CoreLoader
    try:
        node = yaml.compose(text, Loader=loader)
        value = None if node is None else _construct(node, (), lines, name)
    except RecursionError:
        raise YamlError(f"{name}: nested too deeply, or an alias (*) stands within what it names") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise YamlError(f"{where}: {error.problem or error}") from error
    except yaml.YAMLError as error:
        raise YamlError(f"{name}: {error}") from error
    return value, lines


def _construct(node: yaml.Node, path: Path, lines: dict[Path, int], name: str) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if len(lines) > _MOST_VALUES:
        raise YamlError(f"{name}: more than {_MOST_VALUES:,} values, aliases (*) counted each time")
    if not node.tag.startswith("tag:yaml.org,2002:") or "python" in node.tag:
        raise YamlError(f"{name}:{node.start_mark.line + 1}: the tag {node.tag} is not allowed")
    match node:
        case yaml.MappingNode():
            result: dict[str, Any] = {}
            for key_node, value_node in node.value:
                line = key_node.start_mark.line + 1
                if not isinstance(key_node, yaml.ScalarNode):
                    raise YamlError(f"{name}:{line}: a key must be a plain word")
                key = str(key_node.value)
                if key in result:
                    raise YamlError(f"{name}:{line}: the key '{key}' stands twice in the same section")
                lines[(*path, key)] = line
                result[key] = _construct(value_node, (*path, key), lines, name)
            return result
        case yaml.SequenceNode():
            return [_construct(item, (*path, i), lines, name) for i, item in enumerate(node.value)]
        case _:
            try:
                return SafeConstructor().construct_object(node)
            except (yaml.YAMLError, ValueError) as error:
                raise YamlError(f"{name}:{node.start_mark.line + 1}: {error}") from error
