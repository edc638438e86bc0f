"""Where a base is looked for, and what is said of one that is not there."""

import json
from pathlib import Path

import pytest

from launcher.sharding import tokenize
from llmtrain import adapters, base_facts, log
from llmtrain.config import data_sections, load_config
from llmtrain.errors import CheckpointError, ModelError, TokenizerError


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(log, "warning", lines.append)
    return lines


def look(base: Path | str) -> None:
    base_facts.check_place(*load_config(None, ["model.kind=qlora", f"model.base={base}", "data.packing=bestfit"]))


def test_a_misspelt_folder_is_said_before_the_hub_is_asked(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    for there in ("base", tmp_path / "base", "org/name"):
        look(there)
    assert said == []
    look("bse")
    assert said == [
        f'model.base="bse" (command line): no folder bse here (looked from {tmp_path}/); taken as a name on the Hub'
    ]
    for gone in ("./bse", "../bse", tmp_path / "bse", "~/bse"):
        with pytest.raises(ModelError, match=r'model.base=".* \(command line\): no folder .*bse here; give a fold'):
            look(gone)
    base_facts.check_place(*load_config(None))


def test_a_tokenizer_that_cannot_be_loaded_names_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = data_sections.DataSection(tokenizer=data_sections.HubTokenizer(kind="hub", name="bse"))
    with pytest.raises(TokenizerError, match=r"data\.tokenizer\.name=bse: .*the base's own \(model\.base\)$"):
        tokenize.prepare(config, tmp_path / "tokenizer", [])


def test_an_adapter_whose_base_is_gone_says_so_before_anything_else(tmp_path: Path):
    """Not that the shards are gone, which may be true too."""
    (tmp_path / adapters.ADAPTER_CONFIG).write_text(json.dumps({"base_model_name_or_path": f"{tmp_path}/base"}))
    with pytest.raises(CheckpointError, match=f"the adapter's base is {tmp_path}/base, and no such folder is here"):
        adapters.find(tmp_path, trust_remote_code=False)
    (tmp_path / "base").mkdir()
    assert adapters.find(tmp_path, trust_remote_code=False).base.base == f"{tmp_path}/base"
    (tmp_path / adapters.ADAPTER_CONFIG).write_text('{"base_model_name_or_path": null}')
    with pytest.raises(CheckpointError, match="cannot be read as an adapter's"):
        adapters.find(tmp_path, trust_remote_code=False)
