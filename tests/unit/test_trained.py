"""What a checkpoint was trained with, where it has changed since, is gone, or cannot be read."""

import shutil
from pathlib import Path

import pytest

from llmtrain import adapters, manifest, prompts, trained
from llmtrain.errors import ConfigError, TokenizerError
from tests.support import asked_runs
from tests.support.asked_runs import GPT, OTHER, OWN, asked, export_plainly, lora, rendered, train, tuned_tokenizer

fresh_encoders, base, work = asked_runs.fresh_encoders, asked_runs.base, asked_runs.work


def test_a_templates_file_that_is_gone(work: Path, base: Path):
    tuned_tokenizer(work / "tuned", OWN)
    (work / "other.jinja").write_text(OTHER)
    made = train(work, "chat", *lora(base), "data.format.template=other.jinja", f"data.dir={work}/shards")
    (work / "other.jinja").unlink()
    ids = asked(made, "hello")[0]
    assert ids == made.ids[: len(ids)]
    (made.model / prompts.TEMPLATE).unlink()
    with pytest.raises(TokenizerError, match=r"data\.format\.template=other\.jinja"):
        trained.format_of(made.model)


@pytest.mark.parametrize("model", ["gpt", "qlora"])
def test_a_templates_file_that_was_edited_since(work: Path, base: Path, model: str):
    tuned_tokenizer(work / "tuned", OWN)
    (work / "other.jinja").write_text(OTHER)
    settings = GPT if model == "gpt" else lora(base)
    made = train(work, "chat", *settings, "data.format.template=other.jinja", f"data.dir={work}/shards")
    (work / "other.jinja").write_text(OTHER.replace("[", "{{ '((' }}"))
    ids = asked(made, "hello")[0]
    assert ids == made.ids[: len(ids)]
    export_plainly(made.model, work / "exported", merge=model == "qlora")
    assert rendered(work / "exported") == ids
    assert (work / "exported" / prompts.TEMPLATE).read_text() == OTHER


def test_the_tokenizers_own_template_that_an_older_version_left_beside_a_model(work: Path):
    tuned_tokenizer(work / "tuned", OWN)
    (work / "other.jinja").write_text(OTHER)
    made = train(work, "chat", *GPT, "data.format.template=other.jinja")
    (made.model / prompts.TEMPLATE).write_text(OWN)
    ids = asked(made, "hello")[0]
    assert ids == made.ids[: len(ids)]


def test_a_template_that_is_gone_keeps_nobody_from_a_whole_model(
    work: Path, base: Path, caplog: pytest.LogCaptureFixture
):
    tuned_tokenizer(work / "tuned", None)
    (work / "other.jinja").write_text(OTHER)
    for settings, to in ((GPT, "whole"), (lora(base), "merged")):
        made = train(work, "chat", *settings, "data.format.template=other.jinja", f"data.dir={work}/{to}-shards")
        (work / "other.jinja").rename(work / "gone.jinja")
        (made.model / prompts.TEMPLATE).unlink()
        (made.model.parent / manifest.NAME).unlink()
        if to == "whole":
            export_plainly(made.model, work / to)
            told = "exported without the chat template that it was trained with: data.format.template=other.jinja"
            assert f"{told} ({made.run.config})" in caplog.text
            assert (work / to / "model.safetensors").is_file()
            shutil.rmtree(made.run.path)
        else:
            with pytest.raises(TokenizerError, match=r"--merge: data.format.template=other.jinja .*config.yaml.*bring"):
                export_plainly(made.model, work / to, merge=True)
        (work / "gone.jinja").rename(work / "other.jinja")


def test_a_configuration_that_cannot_be_read_is_not_passed_over(
    work: Path, base: Path, caplog: pytest.LogCaptureFixture
):
    tuned_tokenizer(work / "tuned", OWN)
    made = train(work, "chat", *lora(base))
    made.run.config.write_text(made.run.config.read_text() + "\nnew_section: {}\n")
    for ask in (trained.format_of, lambda model: adapters.find(model, trust_remote_code=False)):
        with pytest.raises(ConfigError, match=r"config\.yaml says what .* cannot read it: new_section="):
            ask(made.model)
    alone = work / "alone"
    shutil.copytree(made.model, alone)
    (alone / "config.yaml").write_text("somebody: else\n")
    assert trained.format_of(alone).kind == "text"
    assert adapters.find(alone, trust_remote_code=False).base.quantisation == "none"
    assert caplog.text.count(f"{alone}/config.yaml: not taken for a run's configuration") == 1
    (alone / "llmtrain").mkdir()
    shutil.copy(made.run.config, alone / "llmtrain")
    with pytest.raises(ConfigError, match=f"{alone}/llmtrain/config.yaml says what"):
        trained.format_of(alone)
