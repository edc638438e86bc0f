"""Configurations as run folders hold them: read fast, and as exactly as what a person wrote."""

import json
from pathlib import Path

import pytest
import yaml

from llmtrain.config import load_config, resolved_yaml, yaml_lines
from llmtrain.config.load import load_written
from llmtrain.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [
    "1e5",
    "yes",
    "0o17",
    "1_000",
    "12:30",
    "null",
    "~",
    "",
    " a ",
    "a: b # c",
    "é\u2028\U0001f642",
    "a\n\tb\n\n",
    "%",
]


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_a_run_folders_configuration_is_what_it_was_written_from(tmp_path: Path, file: Path):
    for text in TEXTS:
        config, _ = load_config(file, [f"evaluate.sample.prompt={json.dumps(text)}"])
        (tmp_path / "config.yaml").write_text(resolved_yaml(config), encoding="utf-8")
        assert load_written(tmp_path / "config.yaml") == config


def test_without_the_parser_that_knows_our_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`llmtrain status` of 2,000 runs took 15 s, nearly all of it there."""
    (tmp_path / "config.yaml").write_text(resolved_yaml(load_config(None)[0]))
    monkeypatch.setattr(yaml_lines, "_CoreLoader", None)
    assert load_written(tmp_path / "config.yaml") == load_config(None)[0]


@pytest.mark.skipif(not yaml.__with_libyaml__, reason="PyYAML was built without libyaml")
def test_libyaml_parses_it():
    assert issubclass(yaml_lines._FastLoader, yaml.CSafeLoader)


@pytest.mark.parametrize(
    "text",
    [
        "train: {stepz: 3}\n",
        "train:\n  steps: 3\n  steps: 4\n",
        "a: [\n",
        "- a\n",
        "a: !!python/none\n",
        "\0",
        "[" * 10**6,
    ],
)
def test_what_is_wrong_with_one_is_told_as_ever(tmp_path: Path, text: str):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as told:
        load_config(file)
    with pytest.raises(ConfigError) as found:
        load_written(file)
    assert found.value.problems == told.value.problems
    file.unlink()
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_written(file)
