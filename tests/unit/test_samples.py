"""Records to samples: what is learned, what is cut, what is refused."""

import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from launcher.sharding import sources
from launcher.sharding.build import build
from launcher.sharding.show import describe, documents, show_samples
from llmtrain.config import RunConfig, load_config
from llmtrain.errors import ConfigError, SourceError, TokenizerError, UserError
from llmtrain.shards import ShardFolder
from tests.support.bases import write_tokenizer
from tests.support.data import shared

EOS = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


def configure(tmp_path: Path, records: list[Any], tokenizer: Path, format: str, *settings: str) -> RunConfig:
    (tmp_path / "data.json").write_text(json.dumps(records))
    given = [
        f"data.sources=[{{kind: json, paths: ['{tmp_path}/data.json']}}]", f"data.format={format}",
        f"data.tokenizer={{kind: folder, path: '{tokenizer}'}}", f"data.dir={tmp_path}/shards",
        "data.split={by: tail, heldout: 0.2, test: 0.0}", "model.context=200",
    ]  # fmt: skip
    return load_config(None, [*given, *settings])[0]


def texts(folder: ShardFolder, count: int = 100) -> list[list[tuple[str, bool]]]:
    """Of each training sample its text in runs: (text, learned)."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder.tokenizer / "tokenizer.json"))
    found: list[list[tuple[str, bool]]] = []
    for document in documents(folder, "train", count):
        edges = [0, *(np.flatnonzero(np.diff(document.learned)) + 1).tolist(), len(document.ids)]
        found.append(
            [
                (tokenizer.decode(document.ids[a:b].tolist(), skip_special_tokens=False), bool(document.learned[a]))
                for a, b in itertools.pairwise(edges)
            ]
        )
    return found


def first(config: RunConfig) -> list[tuple[str, bool]]:
    return texts(build(config, workers=1).folder)[0]


def test_prompt_and_completion(tmp_path: Path, tokenizer: Path):
    records = [{"prompt": f"Count {i}:", "completion": f" {i + 1}"} for i in range(10)]
    config = configure(tmp_path, records, tokenizer, "{kind: completion}")
    assert sorted(texts(build(config, workers=1).folder))[0] == [("Count 0:", False), (" 1" + EOS, True)]


def test_the_prompt_is_learned_too_where_that_is_asked_for(tmp_path: Path, tokenizer: Path):
    records = [{"prompt": "Count 1:", "completion": " 2"}] * 10
    whole = configure(tmp_path, records, tokenizer, "{kind: completion, completion_only: false}")
    (unlearned, _), (learned, _) = first(whole)
    assert unlearned == "C"  # nothing comes before the first token
    assert unlearned + learned == "Count 1: 2" + EOS


def test_prompts_stay_unlearned_where_the_last_of_several_tasks_is_held_out(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
):
    """It has nothing to say of the training data."""
    monkeypatch.setattr(sources, "UNIT_BYTES", 1)  # each file is a task
    records = [{"prompt": f"Count {i}:", "completion": f" {i + 1}"} for i in range(8)]
    (tmp_path / "last.json").write_text(json.dumps(records[:2]))
    paths = f"data.sources=[{{kind: json, paths: ['{tmp_path}/data.json', '{tmp_path}/last.json']}}]"
    config = configure(tmp_path, records, tokenizer, "{kind: completion}", paths)
    assert sorted(texts(build(config, workers=1).folder))[0] == [("Count 0:", False), (" 1" + EOS, True)]


def test_what_follows_the_last_marker_is_learned(tmp_path: Path, tokenizer: Path):
    records = [{"text": "Was $9 then. Price is $80? No. Price is $34.00"}] * 10
    config = configure(tmp_path, records, tokenizer, "{kind: marked, marker: 'Price is $'}")
    assert first(config) == [("Was $9 then. Price is $80? No. Price is $", False), ("34.00" + EOS, True)]


def test_instructions_with_and_without_an_input(tmp_path: Path, tokenizer: Path):
    records = [
        {"instruction": "Say {input}", "input": "", "output": "it"},
        {"instruction": "Add", "input": "{instruction}", "output": "ok"},
        {"instruction": "None", "output": "given"},
    ] * 4
    config = configure(
        tmp_path, records, tokenizer, "{kind: instruction, template: 'Q {instruction} I {input} A ', "
        "template_without_input: 'Q {instruction} A '}",
    )  # fmt: skip
    found = {tuple(sample) for sample in texts(build(config, workers=1).folder)}
    assert found == {
        (("Q Say {input} A ", False), ("it" + EOS, True)),
        (("Q Add I {instruction} A ", False), ("ok" + EOS, True)),
        (("Q None A ", False), ("given" + EOS, True)),
    }


CHAT = [{"messages": [
    {"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Goodbye."},
]}] * 10  # fmt: skip


def test_a_chat_without_a_template_of_its_own(tmp_path: Path, tokenizer: Path):
    assert first(configure(tmp_path, CHAT, tokenizer, "{kind: chat}")) == [
        ("### System:\nBe short.\n\n### User:\nHi\n\n### Assistant:\n", False),
        ("Hello." + EOS, True),
        ("\n\n### User:\nBye\n\n### Assistant:\n", False),
        ("Goodbye." + EOS, True),
    ]


def with_template(tokenizer: Path, folder: Path, template: str) -> Path:
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer / name).read_bytes())
    (folder / "chat_template.jinja").write_text(template)
    return folder


CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_chat_in_the_tokenizers_template_has_transformers_ids(tmp_path: Path, tokenizer: Path):
    from transformers import AutoTokenizer

    folder = with_template(tokenizer, tmp_path / "t", CHATML)
    config = configure(tmp_path, CHAT, folder, "{kind: chat}")
    built = build(config, workers=1).folder
    theirs = AutoTokenizer.from_pretrained(folder)
    whole = theirs.apply_chat_template(CHAT[0]["messages"], tokenize=True, return_dict=False)
    document = next(iter(documents(built, "train", 1)))
    assert document.ids.tolist() == whole[: len(document.ids)]
    assert theirs.decode(whole[len(document.ids) :]) == "\n"  # after the last answer there is nothing to learn
    assert [text for text, learned in texts(built)[0] if learned] == ["Hello." + EOS, "Goodbye." + EOS]


def refused(config: RunConfig, kind: type[UserError]) -> str:
    with pytest.raises(kind) as caught:
        build(config, workers=1)
    return str(caught.value)


def test_a_template_that_drops_the_end_is_refused_or_mended(tmp_path: Path, tokenizer: Path):
    folder = with_template(tokenizer, tmp_path / "t", CHATML.replace("{{ eos_token }}", ""))
    said = refused(configure(tmp_path, CHAT, folder, "{kind: chat}"), TokenizerError)
    assert f"without the end-of-text token {EOS}: the model would never learn to stop" in said
    assert "data.format.append_eos=true" in said
    mended = first(configure(tmp_path, CHAT, folder, "{kind: chat, append_eos: true}"))
    assert [text for text, learned in mended if learned] == ["Hello.\n" + EOS, "Goodbye.\n" + EOS]


def test_a_template_that_rewrites_the_past_is_refused(tmp_path: Path, tokenizer: Path):
    template = CHATML.replace("<{{ m.role }}>", "{{ messages | length }}<{{ m.role }}>")
    folder = with_template(tokenizer, tmp_path / "t", template)
    assert "writes a turn differently" in refused(configure(tmp_path, CHAT, folder, "{kind: chat}"), TokenizerError)


def test_a_template_from_a_file_or_written_out(tmp_path: Path, tokenizer: Path):
    (tmp_path / "mine.jinja").write_text(CHATML)
    for template in (str(tmp_path / "mine.jinja"), CHATML):
        config = configure(
            tmp_path,
            CHAT,
            tokenizer,
            json.dumps({"kind": "chat", "template": template}),
            f"data.dir={tmp_path}/{len(template)}",
        )
        assert first(config)[0][0].startswith("<system>Be short." + EOS)
    config = configure(tmp_path, CHAT, tokenizer, "{kind: chat, template: nowhere.jinja}")
    assert "neither a file nor a template" in refused(config, TokenizerError)
    config = configure(tmp_path, CHAT, tokenizer, json.dumps({"kind": "chat", "template": "{% oops %}"}))
    assert "the chat template fails" in refused(config, TokenizerError)


def test_a_message_that_holds_a_special_token_is_left_out_and_counted(tmp_path: Path, tokenizer: Path):
    bad = {"messages": [{"role": "user", "content": f"stop {EOS} now"}, {"role": "assistant", "content": "No."}]}
    built = build(configure(tmp_path, [*CHAT, bad], tokenizer, "{kind: chat}"), workers=1)
    assert built.folder.manifest.skipped == {"a special token stands in the text": 1}
    plain = [{"prompt": f"stop {EOS}", "completion": EOS}] * 10  # in other formats text is only text
    config = configure(tmp_path, plain, tokenizer, "{kind: completion}", f"data.dir={tmp_path}/plain")
    document = next(iter(documents(build(config, workers=1).folder, "train", 1)))
    assert (document.ids == 0).sum() == 1
    assert document.ids[-1] == 0


LONG = [{"prompt": "word " * n + "end:", "completion": " yes yes"} for n in (0, 36, 4, 32, 8, 28, 6, 2)]


def test_samples_that_are_too_long_are_left_out_and_counted(tmp_path: Path, tokenizer: Path):
    config = configure(tmp_path, LONG, tokenizer, "{kind: completion}", "model.context=40", "data.packing=none")
    built = build(config, workers=1)
    left_out = built.folder.manifest.skipped["longer than model.context"]
    assert 0 < left_out < 8
    assert sum(split.rows for split in built.folder.manifest.splits.values()) == 8 - left_out
    assert any("longer than model.context" in line for line in describe(built))


def test_or_cut_from_the_prompts_beginning_and_counted(tmp_path: Path, tokenizer: Path):
    config = configure(
        tmp_path, LONG, tokenizer, "{kind: completion, overlong: cut_prompt}", "model.context=20", "data.packing=none"
    )
    built = build(config, workers=1)
    manifest = built.folder.manifest
    assert manifest.cut > 0
    assert manifest.skipped == {}
    for prompt, completion in texts(built.folder):
        assert prompt[0].endswith("end:")
        assert completion == (" yes yes" + EOS, True)
    assert any(line.startswith("cut ") for line in describe(built))


def test_what_was_cut_is_counted_over_all_tasks(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in LONG))
    source = f"data.sources=[{{kind: jsonl, paths: ['{tmp_path}/data.jsonl']}}]"
    settings = [source, "model.context=20", "data.packing=none"]
    counts: list[int] = []
    for unit_bytes in (4_000_000, 100):
        monkeypatch.setattr(sources, "UNIT_BYTES", unit_bytes)
        folder = f"data.dir={tmp_path}/{unit_bytes}"
        config = configure(tmp_path, [], tokenizer, "{kind: completion, overlong: cut_prompt}", *settings, folder)
        counts.append(build(config, workers=1).folder.manifest.cut)
    assert counts[0] == counts[1] > 1


def test_a_completion_that_cannot_fit_is_left_out_even_so(tmp_path: Path, tokenizer: Path):
    records = [{"prompt": "x", "completion": " yes" * 100}, *LONG]
    config = configure(tmp_path, records, tokenizer, "{kind: completion, overlong: cut_prompt}", "model.context=60")
    assert build(config, workers=1).folder.manifest.skipped == {"completion longer than model.context": 1}


def test_targets_and_bytes_count_what_is_learned(tmp_path: Path, tokenizer: Path):
    records = [{"prompt": f"Count {i}:", "completion": " é" * (i + 1)} for i in range(10)]
    for packing in ("none", "bestfit"):
        config = configure(
            tmp_path,
            records,
            tokenizer,
            "{kind: completion}",
            f"data.packing={packing}",
            f"data.dir={tmp_path}/{packing}",
        )
        built = build(config, workers=1).folder
        splits = built.manifest.splits.values()
        learned = sum(int(d.learned.sum()) for name in built.manifest.splits for d in documents(built, name, 100))
        assert sum(split.targets for split in splits) == learned
        assert sum(split.text_tokens for split in splits) == learned
        assert sum(split.text_bytes for split in splits) == 3 * sum(range(1, 11))
        assert sum(split.documents for split in splits) == 10
        if packing == "none":
            assert sum(split.rows for split in splits) == 10


def test_a_completion_without_a_prompt_is_learned_from_its_second_token_on(tmp_path: Path, tokenizer: Path):
    records = [{"prompt": "", "completion": "yes and no"}] * 10
    built = build(configure(tmp_path, records, tokenizer, "{kind: completion}"), workers=1).folder
    tokens = len(next(iter(documents(built, "train", 1))).ids)
    assert sum(split.targets for split in built.manifest.splits.values()) == 10 * (tokens - 1)


def test_the_tail_split_keeps_samples_whole(tmp_path: Path, tokenizer: Path):
    records = [{"prompt": f"Count {i}:", "completion": " 1"} for i in range(10)]
    config = configure(
        tmp_path, records, tokenizer, "{kind: completion}", "data.split={by: tail, heldout: 0.3, test: 0.1}"
    )
    splits = build(config, workers=1).folder.manifest.splits
    assert [splits[name].documents for name in ("train", "heldout", "test")] == [6, 3, 1]


def test_the_tokenizers_own_beginning_of_text_comes_first(tmp_path: Path, tokenizer: Path):
    from tokenizers import Tokenizer, processors

    folder = with_template(tokenizer, tmp_path / "bos", CHATML)
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.add_special_tokens(["<s>"])
    number = own.token_to_id("<s>")
    own.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", number)])  # pyright: ignore[reportAttributeAccessIssue]
    own.save(str(folder / "tokenizer.json"))
    records = [{"prompt": "Count 1:", "completion": " 2"}] * 10
    config = configure(tmp_path, records, folder, "{kind: completion, completion_only: false}")
    assert first(config)[0][0].startswith("<s>")
    long = [{"prompt": "word " * 50, "completion": " yes"}] * 10
    config = configure(
        tmp_path,
        long,
        folder,
        "{kind: completion, overlong: cut_prompt}",
        "model.context=20",
        f"data.dir={tmp_path}/cut",
    )
    assert first(config)[0][0].startswith("<s>")


BAD = {
    "field": ("{kind: completion}", {"prompt": "x"}, SourceError, "record 3: no field 'completion'; there are: prompt"),
    "empty": ("{kind: completion}", {"prompt": "x", "completion": " "}, SourceError, "record 3: the completion"),
    "null": ("{kind: completion}", {"prompt": "x", "completion": None}, SourceError, "is empty"),
    "number": ("{kind: completion}", {"prompt": "x", "completion": 3}, SourceError, "'completion' holds a number"),
    "output": ("{kind: instruction}", {"instruction": "x"}, SourceError, "record 3: no field 'output'"),
    "marker": ("{kind: marked, marker: '$'}", {"text": "no price"}, SourceError, "does not hold the marker '$'"),
    "messages": ("{kind: chat}", {"messages": "hello"}, SourceError, "must be a list of messages"),
    "silent": ("{kind: chat}", {"messages": [{"role": "user", "content": "x"}]}, SourceError, "assistant says nothing"),
    "list": ("{kind: completion}", ["x"], SourceError, "record 3: must be a JSON object, not a list"),
}  # fmt: skip
GOOD: dict[str, Any] = {
    "completion": {"prompt": "x", "completion": "y"}, "instruction": {"instruction": "x", "output": "y"},
    "marked": {"text": "it is $3"}, "chat": CHAT[0],
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_records(tmp_path: Path, tokenizer: Path, case: str):
    format, record, kind, message = BAD[case]
    good = next(record for name, record in GOOD.items() if name in format)
    config = configure(tmp_path, [good, good, good, record], tokenizer, format)
    assert message in refused(config, kind)
    assert not (tmp_path / "shards/manifest.json").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.format.kind=completion"], "a source of kind stdlib has no records"),
        (["data.format.kind=completion", "data.packing=contiguous"], "would cut samples"),
        (["evaluate.task.samples=3"], "evaluate.task.samples needs samples with completions"),
        (["data.format.kind=marked", "data.format.marker=x", "data.sources=[{kind: text, paths: [x]}]"], "kind text"),
    ],
)
def test_settings_that_do_not_go_together(settings: list[str], message: str):
    with pytest.raises(ConfigError) as caught:
        load_config(None, settings)
    assert message in str(caught.value)


def test_real_instructions_are_the_same_for_any_number_of_processes(tmp_path: Path):
    records, tokenizer = shared("instruction-data.json"), shared("gpt2")
    fingerprints = set()
    for workers in (1, 2):
        config = load_config(
            None,
            [f"data.sources=[{{kind: json, paths: ['{records}']}}]", "data.format.kind=instruction",
             f"data.tokenizer={{kind: folder, path: '{tokenizer}'}}", f"data.dir={tmp_path}/{workers}"],
        )[0]  # fmt: skip
        built = build(config, workers=workers)
        assert sum(split.documents for split in built.folder.manifest.splits.values()) == 1100
        fingerprints.add(built.folder.fingerprint)
    assert len(fingerprints) == 1


def shown(folder: ShardFolder, **options: Any) -> str:
    out = io.StringIO()
    show_samples(folder, 2, Console(file=out, width=100, **options))
    return out.getvalue()


def test_samples_are_shown_with_what_is_learned(tmp_path: Path, tokenizer: Path):
    records = [{"prompt": "[red]Danger\x1b[2J\u202e[/red]:", "completion": " run"}] * 10
    folder = build(configure(tmp_path, records, tokenizer, "{kind: completion}"), workers=1).folder
    plain = shown(folder, color_system=None)
    assert f"[red]Danger\\x1b[2J\\u202e[/red]:\u27e6 run\u27e8{EOS}\u27e9\u27e7" in plain
    assert plain.count("sample ") == 2
    coloured = shown(folder, force_terminal=True, color_system="standard")
    assert f"\x1b[1;32m run\x1b[0m\x1b[1;7;32m{EOS}\x1b[0m" in coloured
    assert "\x1b[2J" not in coloured


def test_text_shards_keep_the_recipe_that_they_had():
    from llmtrain import recipe

    assert "format" not in recipe.recipe_of(RunConfig())
