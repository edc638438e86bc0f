"""A trained model is asked as it was trained: the tokenizer, what it puts before a text, and the template of chats."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from llmtrain import adapters, files, generate, manifest, prompts, shards, trained
from llmtrain.config import load_config, resolved_yaml
from llmtrain.errors import CheckpointError, ConfigError
from llmtrain.evaluation import make_sampler
from llmtrain.manifest import TrainState
from llmtrain.world import World
from tests.support import asked_runs
from tests.support.asked_runs import CPU, GPT, OTHER, OWN, asked, export_plainly, lora, rendered, train, tuned_tokenizer

fresh_encoders, base, work = asked_runs.fresh_encoders, asked_runs.base, asked_runs.work


@pytest.fixture
def leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Go on in another folder than the one that training was started in."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    return lambda: monkeypatch.chdir(elsewhere)


KINDS = {
    "text": ("text", OWN, []),
    "instruction": ("instruction", OWN, []),
    "chat, the tokenizer's template": ("chat", OWN, []),
    "chat, the plain template": ("chat", None, []),
    "chat, a template of a file": ("chat", OWN, ["data.format.template=other.jinja"]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["gpt", "qlora"])
def test_a_prompt_is_what_training_had_before_the_answer(
    work: Path, leave: Callable[[], None], base: Path, model: str, kind: str
):
    format, template, settings = KINDS[kind]
    tuned_tokenizer(work / "tuned", template)
    (work / "other.jinja").write_text(OTHER)
    made = train(work, format, *(GPT if model == "gpt" else lora(base)), *settings)
    leave()
    ids, eos_id = asked(made, "hello")
    assert ids == made.ids[: len(ids)]
    tokenizer = Tokenizer.from_file(str(made.data.tokenizer / "tokenizer.json"))
    assert tokenizer.id_to_token(ids[0]) == "<s>"
    assert eos_id == tokenizer.token_to_id("<|end|>")
    rest = tokenizer.decode(made.ids[len(ids) :], skip_special_tokens=False)
    assert rest == {"text": " world<|end|>", "instruction": "hi<|end|>", "chat": "hi there<|end|>"}[format]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("chat")])
@pytest.mark.parametrize("model", ["gpt", "qlora"])
def test_an_exported_tokenizer_asks_as_samples_were_made(
    work: Path, leave: Callable[[], None], base: Path, model: str, kind: str
):
    from transformers import AutoModelForCausalLM

    _, template, settings = KINDS[kind]
    tuned_tokenizer(work / "tuned", template)
    (work / "other.jinja").write_text(OTHER)
    made = train(work, "chat", *(GPT if model == "gpt" else lora(base)), *settings)
    if model == "gpt":
        assert made.ids[: len(rendered(made.model))] == rendered(made.model)
    leave()
    to = work / "exported"
    export_plainly(made.model, to, merge=model == "qlora")
    assert rendered(to) == asked(made, "hello")[0]
    assert files.sha256(to / "tokenizer.json") == made.data.manifest.tokenizer.sha256
    ends: Any = AutoModelForCausalLM.from_pretrained(str(to)).generation_config.eos_token_id
    assert made.data.manifest.tokenizer.eos_id in (ends if isinstance(ends, list) else [ends])


def test_a_checkpoint_from_before_templates_lay_beside_models(work: Path, base: Path):
    tuned_tokenizer(work / "tuned", None)
    made = train(work, "chat", *GPT)
    (made.model / prompts.TEMPLATE).unlink()
    (made.model.parent / manifest.NAME).unlink()
    ids = asked(made, "hello")[0]
    assert ids == made.ids[: len(ids)]
    export_plainly(made.model, work / "exported")
    assert rendered(work / "exported") == ids


def test_templates_that_a_tokenizer_names_in_its_settings(work: Path):
    folder = tuned_tokenizer(work / "tuned", None)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": OWN}]
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": named}))
    made = train(work, "chat", *GPT)
    ids = asked(made, "hello")[0]
    assert ids == made.ids[: len(ids)]
    assert not (made.model / prompts.TEMPLATE).exists()  # it stands in the settings
    prompts.write_settings(folder, None, OTHER)
    assert prompts.read_own(folder)[0] == OTHER
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())


@pytest.mark.parametrize("kind", ["text", "instruction", "chat"])
def test_samples_while_training_begin_as_documents(work: Path, kind: str):
    tuned_tokenizer(work / "tuned", None)
    made = train(work, kind, *GPT, "evaluate.sample={prompt: hello, tokens: 1}")
    seen: list[list[int]] = []
    told: list[str] = []

    class Model:
        def text_generator(self) -> "Model":
            return self

        def next_logits(self, ids: Tensor) -> Tensor:
            seen.append(ids.tolist())
            return torch.zeros(512)

    class Meter:
        def sample(self, _: TrainState, prompt: str, text: str) -> None:
            told.append(prompt)

    world = World(rank=0, size=1, local_rank=0, device=CPU)
    make_sampler(made.config, made.data, cast(Any, Model()), world, cast(Any, Meter()))(TrainState())
    assert seen[0] == asked(made, "hello")[0] == made.ids[: len(seen[0])]
    tokenizer = Tokenizer.from_file(str(made.data.tokenizer / "tokenizer.json"))
    assert seen[0][0] == tokenizer.token_to_id("<s>")
    assert told == ["hello" if kind == "text" else tokenizer.decode(seen[0])]


@pytest.mark.parametrize("template", [OWN, None])
@pytest.mark.parametrize("model", ["gpt", "qlora"])
def test_a_system_prompt_begins_the_chat(work: Path, base: Path, model: str, template: str | None):
    tuned_tokenizer(work / "tuned", template)
    made = train(work, "chat", *(GPT if model == "gpt" else lora(base)))
    tokenizer = Tokenizer.from_file(str(made.data.tokenizer / "tokenizer.json"))
    text = tokenizer.decode(asked(made, "hello", system="Be short.")[0], skip_special_tokens=False)
    if template is None:
        assert text == "<s>### System:\nBe short.\n\n### User:\nhello\n\n### Assistant:\n"
    else:
        assert text == "<s><|system|>Be short.<|user|>hello<|assistant|>"


REFUSES = OWN.replace(
    "{% for", "{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}{% endif %}{% for", 1
)
DROPS = OWN.replace("<|{{", "{% if m['role'] != 'system' %}<|{{").replace("content'] }}", "content'] }}{% endif %}")


@pytest.mark.parametrize(
    ("kind", "template", "why"),
    [
        ("text", OWN, r"free text \(data.format.kind=text\), which has no system prompt; write it into --prompt"),
        ("instruction", OWN, r"instructions \(data.format.kind=instruction\), which has no system prompt"),
        ("chat", REFUSES, r"this model takes no system prompt \(the chat template fails: No system\)"),
        ("chat", DROPS, "this model's chat template leaves a system prompt out"),
    ],
)
def test_a_system_prompt_without_a_place_is_refused(work: Path, kind: str, template: str, why: str):
    """In silence it would be as if nothing had been asked of the model."""
    tuned_tokenizer(work / "tuned", template)
    made = train(work, kind, *GPT)
    assert asked(made, "Be short.")
    with pytest.raises(ConfigError, match=f"--system: .*{why}"):
        asked(made, "Be short.", system="Be short.")


@pytest.mark.parametrize(
    ("words", "why"), [(["--raw"], "--raw continues the prompt as it stands"), ([], "it is empty")]
)
def test_a_system_prompt_that_would_do_nothing_is_refused(
    work: Path, words: list[str], why: str, capsys: pytest.CaptureFixture[str]
):
    tuned_tokenizer(work / "tuned", OWN)
    made = train(work, "chat", *GPT)
    given = ["--prompt", "hello", "--tokens", "1", "--temperature", "0", "--seed", "0", "--device", "cpu"]
    with pytest.raises(SystemExit) as left:
        generate.main([str(made.model), *given, *words, "--system", "Be short." if words else ""])
    assert left.value.code == ConfigError.exit_code
    assert f"--system: {why}; leave --system out" in capsys.readouterr().err


def test_an_adapters_tokenizer_without_the_runs_data(work: Path, leave: Callable[[], None], base: Path):
    tuned = tuned_tokenizer(work / "tuned", OWN)
    made = train(work, "chat", *lora(base))
    leave()
    assert adapters.find(made.model, trust_remote_code=False).tokenizer.name == str(made.data.tokenizer)

    own = made.data.tokenizer / "tokenizer.json"
    own.write_text(own.read_text() + "\n")  # not the one that the manifest names
    assert adapters.find(made.model, trust_remote_code=False).tokenizer.name == str(tuned)
    own.write_text(own.read_text()[:-1])
    assert adapters.find(made.model, trust_remote_code=False).tokenizer.name == str(made.data.tokenizer)
    text = (made.data.path / shards.MANIFEST).read_text()
    (made.data.path / shards.MANIFEST).write_text(text.replace('"cut": 0', '"cut": 1'))  # of other data
    assert adapters.find(made.model, trust_remote_code=False).tokenizer.name == str(tuned)
    shutil.rmtree(made.data.path)
    assert (
        asked(made, "hello")[0]
        == Tokenizer.from_file(str(tuned / "tokenizer.json"))
        .encode("<s><|user|>hello<|assistant|>", add_special_tokens=False)
        .ids
    )

    shutil.rmtree(tuned)
    with pytest.raises(CheckpointError, match=r"data\.tokenizer\.path=tuned .*no such folder"):
        adapters.find(made.model, trust_remote_code=False)
    made.run.config.write_text(resolved_yaml(load_config(str(made.run.config), ["data.tokenizer={kind: train}"])[0]))
    with pytest.raises(CheckpointError, match="the tokenizer that was trained on it"):
        adapters.find(made.model, trust_remote_code=False)


def test_the_revision_of_a_tokenizer_on_the_hub(work: Path, base: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers import AutoTokenizer

    tuned_tokenizer(work / "tuned", OWN)
    made = train(work, "chat", *lora(base))
    shutil.rmtree(made.data.path)
    called: list[tuple[str, str | None]] = []
    load = AutoTokenizer.from_pretrained

    def from_pretrained(name: str, revision: str | None = None, **_: Any) -> Any:
        called.append((name, revision))
        return load(str(base))

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
    hub = "data.tokenizer={kind: hub, name: some/Instruct, revision: abc}"
    made.run.config.write_text(resolved_yaml(load_config(str(made.run.config), [hub])[0]))
    (work / "to").mkdir()
    adapters.write_tokenizer(adapters.find(made.model, trust_remote_code=False), work / "to")
    alone = work / "alone"
    shutil.copytree(made.model, alone)
    described = json.loads((alone / adapters.ADAPTER_CONFIG).read_text())
    described |= {"base_model_name_or_path": "some/Base", "revision": "def"}
    (alone / adapters.ADAPTER_CONFIG).write_text(json.dumps(described))
    adapters.write_tokenizer(adapters.find(alone, trust_remote_code=False), work / "to")
    assert called == [("some/Instruct", "abc"), ("some/Base", "def")]


def test_an_adapter_from_the_hub_is_asked_as_its_configuration_says(work: Path, base: Path):
    tuned = tuned_tokenizer(work / "tuned", OWN)
    made = train(work, "chat", *lora(base))
    received = work / "received"
    shutil.copytree(made.model, received)
    assert trained.format_of(received).kind == "text"
    assert adapters.find(received, trust_remote_code=False).tokenizer.name == str(base)
    (received / "llmtrain").mkdir()
    shutil.copy(made.run.config, received / "llmtrain")
    assert trained.format_of(received).kind == "chat"
    assert adapters.find(received, trust_remote_code=False).tokenizer.name == str(tuned)
    shutil.copy(made.model.parent / manifest.NAME, received / "llmtrain")
    assert adapters.find(received, trust_remote_code=False).tokenizer.name == str(made.data.tokenizer)


def test_an_adapter_that_was_exported_is_asked_as_its_run_is(work: Path, base: Path):
    tuned_tokenizer(work / "tuned", OWN)
    made = train(work, "chat", *lora(base))
    export_plainly(made.model, work / "exported")
    assert trained.format_of(work / "exported").kind == "chat"
    there, here = (adapters.find(folder, trust_remote_code=False) for folder in (made.model, work / "exported"))
    assert (here.base, here.tokenizer) == (there.base, there.tokenizer)


def test_a_bases_own_code_runs_for_its_run_alone(work: Path, base: Path):
    """Beside an adapter that was downloaded lies a stranger's configuration."""
    tuned_tokenizer(work / "tuned", OWN)
    made = train(work, "chat", *lora(base))
    made.run.config.write_text(
        made.run.config.read_text().replace("trust_remote_code: false", "trust_remote_code: true")
    )
    assert adapters.find(made.model, trust_remote_code=False).base.trust_remote_code
    export_plainly(made.model, work / "exported")
    assert not adapters.find(work / "exported", trust_remote_code=False).base.trust_remote_code
    assert adapters.find(work / "exported", trust_remote_code=True).base.trust_remote_code


def test_the_plain_template_beside_a_model_is_the_plain_template():
    format = load_config(None, [*GPT, "data.sources=[{kind: json, paths: [x]}]", "data.format.kind=chat"])[
        0
    ].data.format
    assert format.kind == "chat"
    for own, writes_prefix in {
        '{{ "<s>" }}' + prompts.PLAIN_TEMPLATE: False,
        '{{ "\\"<s>" }}' + prompts.PLAIN_TEMPLATE: False,
        "{{ bos_token }}" + prompts.PLAIN_TEMPLATE: True,
        '{{ "a" }}{{ "b" }}' + prompts.PLAIN_TEMPLATE: True,
    }.items():
        assert prompts.chat_template(format, own, {}).writes_prefix == writes_prefix, own
