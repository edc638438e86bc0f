"""transformers gives the ids of training, also with a class that takes the vocabulary alone from tokenizer.json."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

from launcher.sharding import tokenize
from llmtrain import adapters, export, prompts, transformers_ids
from llmtrain.adapters import Adapter, TokenizerPlace
from llmtrain.config import data_sections as schema
from llmtrain.config.model_sections import QLoRAModel
from llmtrain.errors import TokenizerError
from tests.support import asked_runs
from tests.support.asked_runs import CHAT, GPT, export_plainly, lora, rendered, train, tuned_tokenizer
from tests.support.bases import write_tokenizer
from tests.support.data import python_sources, shared

fresh_encoders, base, work = asked_runs.fresh_encoders, asked_runs.base, asked_runs.work
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def llama_tokenizer(folder: Path, template: str | None = None, name: str = "LlamaTokenizer") -> Path:
    """As of Llama 2: with a normaliser, which transformers' class of that name leaves out."""
    tokenizer: Any = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([path.read_text() for path in python_sources(2)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    return folder


def loaded(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


@pytest.mark.parametrize("model", ["gpt", "qlora"])
def test_a_class_that_splits_its_own_way_is_not_shipped(
    work: Path, base: Path, model: str, capsys: pytest.CaptureFixture[str]
):
    tuned = llama_tokenizer(work / "tuned", ZEPHYR)
    made = train(work, "chat", *(GPT if model == "gpt" else lora(base)))
    settings = prompts.read_settings(made.data.tokenizer)
    assert settings == prompts.read_settings(tuned)  # the shards stay what they were
    text = ZEPHYR.replace("\n", "")
    wrong = loaded(tuned)(text).input_ids
    to = work / "exported"
    export_plainly(made.model, to, merge=model == "qlora")
    assert "verified   transformers' tokenizer gives the ids of training" in capsys.readouterr().out
    for folder in (to, made.model) if model == "gpt" else (to,):
        whole = loaded(folder).apply_chat_template(CHAT["messages"], return_dict=False)
        begins = [1] if made.ids[0] == 1 and whole[0] != 1 else []
        assert [*begins, *whole][: len(made.ids)] == made.ids
        assert loaded(folder)(text).input_ids != wrong
        changed = prompts.read_settings(folder)
        assert changed["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert (changed["padding_side"], changed["eos_token"]) == ("left", "</s>")


def test_nor_where_samples_are_text(work: Path):
    llama_tokenizer(work / "tuned")
    made = train(work, "text", *GPT)
    assert prompts.read_settings(made.model)["tokenizer_class"] == "PreTrainedTokenizerFast"
    text = "two  spaces</s> and an end"
    theirs = loaded(made.model)(text, add_special_tokens=False).input_ids
    assert theirs == tokenize.Encoder(made.data.tokenizer, fast=False).encode_special(text).tolist()


def test_settings_stay_where_nothing_differs(work: Path):
    for name in ("GPT2Tokenizer", "TokenizersBackend", None):
        folder = work / str(name)
        write_tokenizer(folder)
        settings = {**prompts.read_settings(folder), "tokenizer_class": name}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        assert transformers_ids.settings_needed(folder, "gpt2") == {}
        assert transformers_ids.wrong_texts(folder, schema.TextFormat()) == []


def test_exporting_says_where_ids_differ(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder = llama_tokenizer(work / "a")
    told: list[str] = []
    monkeypatch.setattr(export.log, "warning", told.append)
    export.check_tokenizer(folder, schema.TextFormat())
    assert "gives other ids than training saw for" in told[0]
    assert "verified" not in capsys.readouterr().out


def test_a_chat_is_compared_where_samples_are_chats(work: Path):
    folder = tuned_tokenizer(work / "a", ZEPHYR)
    own = schema.ChatFormat(kind="chat")
    assert transformers_ids.wrong_texts(folder, own) == []
    assert rendered(folder)
    other = own.model_copy(update={"template": ZEPHYR.replace("<|", "[")})  # not the one beside it
    assert len(transformers_ids.wrong_texts(folder, other)) == 1
    assert transformers_ids.wrong_texts(folder, schema.TextFormat()) == []


def test_a_tokenizer_of_the_hub_is_the_repositorys_own(work: Path):
    """A folder stands for a repository: transformers reads both in the same way."""
    for folder in (llama_tokenizer(work / "llama"), tuned_tokenizer(work / "tuned", None)):
        for kind in ("folder", "hub"):
            chosen = {"folder": {"path": str(folder)}, "hub": {"name": str(folder)}}[kind]
            config = schema.DataSection.model_validate({"tokenizer": {"kind": kind, **chosen}})
            tokenize.prepare(config, work / kind / folder.name, [])
        adapter = Adapter(work, QLoRAModel(kind="qlora", base="none", quantisation="none"), TokenizerPlace(str(folder)))
        (work / "alone" / folder.name).mkdir(parents=True)
        adapters.write_tokenizer(adapter, work / "alone" / folder.name)
        ids = [
            tokenize.Encoder(work / kind / folder.name, fast=False).encode_special(f"a  b</s>c {folder}\n").tolist()
            for kind in ("folder", "hub", "alone")
        ]
        assert ids[0] == ids[1] == ids[2]


@pytest.mark.parametrize("token", ["</s>", {"content": "</s>", "lstrip": False}])
@pytest.mark.parametrize("settings", [{"tokenizer_class": "PreTrainedTokenizerFast"}, {"eos_token": None}, None])
def test_an_end_that_the_older_file_names(work: Path, token: Any, settings: dict[str, Any] | None):
    source = tuned_tokenizer(work / "tuned", None)  # which has <|endoftext|> as well
    (source / "tokenizer_config.json").unlink()
    if settings is not None:
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "special_tokens_map.json").write_text(json.dumps({"eos_token": token, "bos_token": "<s>"}))
    config = schema.DataSection(tokenizer=schema.FolderTokenizer(kind="folder", path=str(source)))
    tokenize.prepare(config, work / "out", [])
    encoder = tokenize.Encoder(work / "out", fast=False)
    assert encoder.token(encoder.eos_id) == "</s>"
    assert prompts.read_own(work / "out")[1]["bos_token"] == "<s>"
    assert loaded(work / "out").eos_token == "</s>"
    shutil.rmtree(work / "out")
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))  # which comes first
    tokenize.prepare(config, work / "out", [])
    encoder = tokenize.Encoder(work / "out", fast=False)
    assert encoder.token(encoder.eos_id) == "<|end|>"
    (source / "special_tokens_map.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"special_tokens_map\.json: not JSON"):
        tokenize.prepare(config, work / "out", [])


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "GPT2TokenizerFast", None])
def test_gpt2s_own_tokenizer_delays_no_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str | None):
    """transformers takes seconds to import; and its ids are those of the file, as is known without it."""
    shutil.copytree(shared("gpt2"), tmp_path / "gpt2")
    (tmp_path / "gpt2/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind} if kind else {}))
    if kind is not None:
        own = Tokenizer.from_file(str(tmp_path / "gpt2/tokenizer.json"))
        assert transformers_ids.differing(own, loaded(tmp_path / "gpt2")) == []
    loads: list[Path] = []
    monkeypatch.setattr(transformers_ids, "_load", lambda folder, _: loads.append(folder))
    assert transformers_ids.settings_needed(tmp_path / "gpt2", "gpt2") == {}
    assert not loads
    changed = json.loads((tmp_path / "gpt2/tokenizer.json").read_text())
    changed["pre_tokenizer"]["use_regex"] = False
    (tmp_path / "gpt2/tokenizer.json").write_text(json.dumps(changed))
    transformers_ids.settings_needed(tmp_path / "gpt2", "gpt2")
    assert loads
