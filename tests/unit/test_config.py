"""The configuration file: strict, typed, with every mistake named at once."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launcher.sharding.sources import list_units
from llmtrain import base_facts, recipe
from llmtrain.batches import nodes_that_train, plan_batches
from llmtrain.config import RunConfig, explain, load_config, load_to_start, other_names, resolved_yaml
from llmtrain.config.data_sections import TextSource
from llmtrain.config.load import Origins, json_schema
from llmtrain.config.reference import settings_page
from llmtrain.config.yaml_lines import YamlError, read
from llmtrain.errors import ConfigError, ModelError, SourceError, TooLittleData
from llmtrain.resume import fixed_differences

ROOT = Path(__file__).parents[2]


def problems(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    return [p.replace(str(file), "c.yaml") for p in caught.value.problems]


def test_three_mistakes_are_all_reported_with_suggestions(tmp_path: Path):
    found = problems(
        tmp_path,
        "model:\n  num_heds: 6\ntrain:\n  precision: bf61\noptim:\n  lr: fast\n",
    )
    assert found == [
        "model.num_heds=6 (c.yaml:2): unknown key; did you mean model.num_heads?",
        "train.precision=\"bf61\" (c.yaml:4): use one of 'auto', 'fp32', 'bf16'; did you mean 'bf16'?",
        'optim.lr="fast" (c.yaml:6): must be a number, not a text',
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trian:\n  steps: 3\n", 'trian={"steps": 3} (c.yaml:1): unknown key; did you mean train?'),
        ("optim:\n  dropout: 0.1\n", "did you mean model.dropout?"),
        ("model:\n  tie_weights: off\n", 'model.tie_weights="off" (c.yaml:2): must be true or false'),
        ("model:\n  width: 64.5\n", "model.width=64.5 (c.yaml:2): must be"),
        ("model: 3\n", "model=3 (c.yaml:1): must be a section with keys below it, not a number"),
        ("model:\n  width: 100\n  num_heads: 7\n", "num_heads=7 does not divide width=100; use one of 1, 2, 4, 5, 10"),
        ("data:\n  sources:\n    - kind: textt\n", 'data.sources.0.kind="textt" (c.yaml:3): use one of'),
        ("data:\n  sources:\n    - kind: text\n", "data.sources.0.paths (c.yaml:3): missing"),
        ("train:\n  steps: 3\n  epochs: 2\n", "steps and epochs are both set; keep one"),
        ("data:\n  split: {heldout: 0.6, test: 0.5}\n", "leaves nothing to train on"),
        ("train:\n  steps: 3\n  steps: 4\n", "c.yaml:3: the key 'steps' stands twice"),
        ("train: [\n", "c.yaml:2:1:"),
        ("- a\n", "c.yaml:1: must hold sections"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, expected: str):
    assert any(expected in problem for problem in problems(tmp_path, text)), problems(tmp_path, text)


def test_names_of_other_trainers_are_answered_with_ours(tmp_path: Path):
    found = problems(
        tmp_path, "learning_rate: 1\n", "train.batch_size=8", "model.bf16=true", "data.eval_dataset=val.jsonl"
    )
    assert any("here that is optim.lr" in p for p in found)
    assert any("here that is train.global_batch_size, rows per step" in p for p in found)
    assert any("here that is data.sources, a source more with use: heldout" in p for p in found)
    assert len(found) == 4
    known = set(explain._all_keys(RunConfig))
    assert {re.split("[ ,;]", meant)[0] for meant in other_names.MEANT.values()} <= known
    ours = {path.rpartition(".")[2] for path in known}
    assert ours & set(other_names.MEANT) == {"batch_size"}  # of evaluate and service, where it is no unknown key


def test_bad_overrides_are_reported_with_the_rest(tmp_path: Path):
    found = problems(tmp_path, "model:\n  width: x\n", "nonsense", "train.step=3")
    assert len(found) == 3
    assert "nonsense (command line): not of the form section.key=value" in found[0]
    assert any("train.step=3 (command line): unknown key; did you mean train.steps?" in p for p in found)


def test_a_length_on_the_command_line_replaces_the_files_and_no_other(tmp_path: Path):
    text = "train:\n  tokens: 1024\n"
    (said,) = problems(tmp_path, text, "train.steps=3", "train.epochs=2")
    assert "steps and epochs are both set; keep one" in said
    train = load_config(tmp_path / "c.yaml", ["train.epochs=2"])[0].train
    assert (train.steps, train.epochs, train.tokens) == (None, 2, None)


def test_what_only_the_command_line_gets_wrong_is_placed_there(tmp_path: Path):
    found = problems(tmp_path, "", "trin.x=1", "evaluate.sample.prompt=")
    assert any('trin={"x": 1} (command line): unknown key; did you mean train?' in p for p in found)
    assert any("""must be text; for an empty one write 'evaluate.sample.prompt=""' on the""" in p for p in found)
    assert load_config(None, ['evaluate.sample.prompt=""'])[0].evaluate.sample.prompt == ""


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (
            "run.name=my run",
            "run.name=\"my run\" (command line): may hold letters (A to Z, a to z), digits, '.', '_' and",
        ),
        ("run.name=", "run.name=null (command line): must not be empty; may hold letters"),
        ("run.name=" + "x" * 101, "(command line): must have at most 100 characters, not 101"),
        ("run.name=5", """must be text, not a number; write 'run.name="..."' on the command line"""),
        ("hub.repo=jane", 'hub.repo="jane" (command line): must be user/name, both of letters'),
        ("service.score=gpu", "use auto, cpu, mps, cuda, cuda:N (N is the GPU's number, e.g. cuda:1) or training"),
        ("optim.betas=[0.9]", "optim.betas=[0.9] (command line): needs 2 or more entries, not 1"),
        ("optim.betas=[0.9, 0.9, 0.9]", "(command line): takes 2 entries at most, not 3"),
        (
            "data.sources=[{kind: text, paths: [a], separator: ''}]",
            'data.sources.0.separator="" (command line): must not',
        ),
    ],
)
def test_what_a_text_or_a_list_may_be_is_said_in_words(tmp_path: Path, setting: str, expected: str):
    [problem] = problems(tmp_path, "", setting)
    assert expected in problem
    assert not any(raw in problem for raw in ("pattern", "validation", 'name=""', "^"))


def test_what_names_may_hold_stands_on_the_page_of_settings():
    assert '100 letters (A to Z, a to z), digits, ".", "_" and "-"' in settings_page()


OF_ANOTHER_KIND = "data.tokenizer.vocab_size=600 (c.yaml:2): vocab_size belongs to kind: train, not folder; "


@pytest.mark.parametrize(
    ("section", "settings", "expected"),
    [
        (
            "kind: train, vocab_size: 600",
            ["kind=folder", "path=base"],
            "write 'data.tokenizer={kind: folder, path: base}'",
        ),
        ("vocab_size: 600", ["path=base"], "write 'data.tokenizer={kind: folder, path: base}'"),
        ("vocab_size: 600, path: old", ["kind=folder"], "write 'data.tokenizer={kind: folder, path: old}'"),
        ("vocab_size: 600", ["kind=folder"], "write 'data.tokenizer={kind: folder, path: ...}'"),
        ("kind: folder, path: x, vocab_size: 600", [], "leave it out, or set data.tokenizer.kind=train"),
    ],
)
def test_a_key_of_another_kind(tmp_path: Path, section: str, settings: list[str], expected: str):
    text = f"data:\n  tokenizer: {{{section}}}\n"
    found = problems(tmp_path, text, *(f"data.tokenizer.{setting}" for setting in settings))
    assert found[-1] == OF_ANOTHER_KIND + expected
    if settings and "..." not in expected:
        whole = expected.split("'")[1]
        config, origins = load_config(tmp_path / "c.yaml", [whole])
        assert config.data.tokenizer.kind == "folder"
        assert origins.describe(config, "data.tokenizer.path").endswith("(command line)")


def test_a_key_of_another_kind_from_the_command_line(tmp_path: Path):
    text = "data:\n  tokenizer: {kind: train}\n  sources: [{kind: jsonl, paths: [a]}]\n"
    assert problems(tmp_path, text, "data.tokenizer.path=base", "data.sources.0.separator=x") == [
        'data.sources.0.separator="x" (command line): separator belongs to kind: text, not jsonl; write '
        "'data.sources.0={kind: text, paths: [a], separator: x}'",
        'data.tokenizer.path="base" (command line): path belongs to kind: folder, not train; write '
        "'data.tokenizer={kind: folder, path: base}'",
    ]
    [problem] = problems(tmp_path, "", "data.tokenizer.kind=train", "data.tokenizer.path=base")
    assert problem.endswith("path belongs to kind: folder, not train; leave it out, or set data.tokenizer.kind=folder")


def test_a_missing_file_names_the_others(tmp_path: Path):
    (tmp_path / "gpt2.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"no such configuration file; there are: .*gpt2\.yaml"):
        load_config(tmp_path / "gpt.yaml")


def test_numbers_of_yaml_1_2():
    assert read("a: 3e-4\nb: 1_000\nc: off\nd: 12:30\ne: 0x10\nf: -.5\ng: null", "x")[0] == {
        "a": 3e-4, "b": "1_000", "c": "off", "d": "12:30", "e": 16, "f": -0.5, "g": None,
    }  # fmt: skip
    with pytest.raises(YamlError, match="x:1"):
        read("a: !!python/object:os.system {}", "x")


def test_overrides_win_and_know_where_they_come_from():
    config, origins = load_config(ROOT / "configs/verdict.yaml", ["train.steps=7", "optim.lr=3e-4"])
    assert (config.train.steps, config.train.epochs, config.optim.lr) == (7, None, 3e-4)
    assert origins.describe(config, "optim.lr") == "optim.lr=0.0003 (command line)"
    assert origins.describe(config, "model.width").startswith("model.width=768 (")
    assert origins.describe(config, "optim.eps") == "optim.eps=1e-08 (default)"


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configurations_load_and_say_what_to_expect(file: Path):
    config, _ = load_config(file)
    header = file.read_text().split("\nrun:")[0]
    assert all(word in header for word in ("Hardware", "Time", "Expect", "Command", str(file.relative_to(ROOT))))
    resolved = file.parent / "never-written.yaml"
    assert not resolved.exists()
    assert config == RunConfig.model_validate(read(resolved_yaml(config), "resolved")[0])


@pytest.mark.parametrize("name", ["1e5", "3e4", "yes", "0o17", "1_000", "12:30", "null", "~", "1", "a: b", "é"])
def test_a_text_that_looks_like_something_else_stays_a_text(name: str):
    config, _ = load_config(None, [f'evaluate.sample.prompt="{name}"'])
    written = resolved_yaml(config)
    assert RunConfig.model_validate(read(written, "resolved")[0]) == config
    assert yaml.safe_load(written)["evaluate"]["sample"]["prompt"] == name  # YAML 1.1, as other readers take it


def test_the_schema_file_is_current():
    assert (ROOT / "configs/schema.json").read_text() == json_schema(), "run: llmtrain schema > configs/schema.json"


def test_the_page_of_settings_is_current():
    said = "run: llmtrain schema --markdown > docs/settings.md"
    assert (ROOT / "docs/settings.md").read_text() == settings_page(), said


def test_the_page_of_settings_names_every_one():
    page = settings_page()
    settings = {name for section in RunConfig.model_json_schema()["$defs"].values() for name in section["properties"]}
    missing = [name for name in settings - {"kind"} if f"`{name}`" not in page and f".{name}`" not in page]
    assert missing == []


def test_what_may_change_on_resume():
    old = RunConfig()
    may, _ = load_config(None, ["train.steps=9", "log.every_steps=3", "strategy.bucket_mb=1", "run.dir=x"])
    assert fixed_differences(old, may) == []
    must_not, _ = load_config(None, ["optim.lr=5e-4", "train.global_batch_size=16", "data.split.heldout=0.5"])
    assert [key for key, _, _ in fixed_differences(old, must_not)] == [
        "data.split.heldout", "train.global_batch_size", "optim.lr",
    ]  # fmt: skip


@given(world=st.integers(1, 64), batch=st.integers(1, 512))
def test_batches_divide_exactly_or_the_error_says_what_would(world: int, batch: int):
    config, origins = load_config(None, [f"train.global_batch_size={batch}"])
    if batch % world:
        with pytest.raises(ConfigError) as caught:
            plan_batches(config, origins, world, num_rows=1000)
        place = f"train.global_batch_size={batch} (command line)"
        assert f"{place}: {world} ranks do not divide it; use " in str(caught.value)
    else:
        plan = plan_batches(config, origins, world, num_rows=1000)
        assert plan.micro_batch_size * plan.accumulation * world == batch


def test_micro_batch_errors_list_what_works():
    config, origins = load_config(None, ["train.global_batch_size=512", "train.micro_batch_size=6"])
    with pytest.raises(ConfigError) as caught:
        plan_batches(config, origins, 8, 10_000)
    assert (
        "train.micro_batch_size=6 (command line): 8 ranks x 6 does not divide global_batch_size=512; "
        "use one of 1, 2, 4, 8, 16, 32, 64"
    ) in str(caught.value)


def test_too_few_rows():
    config, origins = load_config(None, [])
    with pytest.raises(TooLittleData, match=r"31 rows .*train.global_batch_size=32 \(default\)"):
        plan_batches(config, origins, 1, 31)


@pytest.mark.parametrize(
    ("length", "steps"), [("epochs=10", 90), ("epochs=0.5", 5), ("tokens=1024", 2), ("steps=7", 7)]
)
def test_lengths(length: str, steps: int):
    config, _ = load_config(ROOT / "configs/verdict.yaml", [f"train.{length}"])
    assert plan_batches(config, Origins(), 1, 18).total_steps == steps


def test_rounding_of_floats_adds_no_step():
    """0.14 x 100 is 14.000000000000002 in floats."""
    config, _ = load_config(ROOT / "configs/verdict.yaml", ["train.epochs=0.14"])
    assert plan_batches(config, Origins(), 1, 100).total_steps == 7


@pytest.mark.parametrize(
    ("batch", "ranks", "nodes", "used"), [(512, 4, 4, 4), (512, 4, 3, 2), (48, 8, 5, 3), (96, 8, 5, 4), (7, 2, 3, 3)]
)
def test_nodes_that_the_batch_leaves_over_wait(batch: int, ranks: int, nodes: int, used: int):
    assert nodes_that_train(batch, ranks, nodes) == used


QLORA = ["model.kind=qlora", "data.sources=[{kind: json, paths: [x.json]}]", "data.format.kind=instruction"]


def test_a_base_brings_its_own_defaults(tmp_path: Path):
    config, _ = load_config(None, [*QLORA, f"model.base={tmp_path}"])
    assert config.data.tokenizer.model_dump() == {"kind": "folder", "path": str(tmp_path)}
    assert (config.data.packing, config.optim.lr, config.optim.weight_decay) == ("bestfit", 2e-4, 0.0)
    hub, _ = load_config(None, [*QLORA, "model.base=some/model", "model.revision=abc", "optim.lr=1e-3"])
    assert hub.data.tokenizer.model_dump() == {"kind": "hub", "name": "some/model", "revision": "abc"}
    assert hub.optim.lr == 1e-3
    for one in (config, hub):
        (tmp_path / "resolved.yaml").write_text(resolved_yaml(one))
        assert load_config(tmp_path / "resolved.yaml")[0] == one


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["optim.kind=adamw8bit", "strategy.kind=zero2"], "works with strategy.kind=ddp alone"),
        (["model.lora.dtype=bf16", "strategy.kind=zero2"], "ZeRO-2 keeps fp32 masters"),
        (["model.compute_dtype=fp32", "train.precision=bf16"], "needs train.precision=fp32"),
        (["model.lora.rank=8"], "model.lora.rank=8 (command line): unknown key"),
        (["model.quantisation=nf8"], "did you mean 'nf4'?"),
        (["data.packing=contiguous"], "would cut samples"),
    ],
)
def test_settings_of_a_base_that_cannot_be(settings: list[str], message: str):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*QLORA, "model.base=some/model", *settings])
    assert message in str(caught.value)


def test_a_rule_that_is_younger_than_some_runs_holds_for_what_is_started_alone(tmp_path: Path):
    both = [*QLORA, "model.base=some/model", "evaluate.task.samples=2", "data.format.completion_only=false"]
    for settings in (both, both[:-1], [*both[:-2], both[-1]]):
        (tmp_path / "config.yaml").write_text(resolved_yaml(load_config(None, settings)[0]))
        assert load_config(tmp_path / "config.yaml")[0] == load_config(None, settings)[0]
    with pytest.raises(ConfigError) as caught:
        load_to_start(None, both)
    assert "evaluate.task.samples=2 (command line) asks prompts and compares" in str(caught.value)
    assert "data.format.completion_only=false (command line) does not tell apart; leave one" in str(caught.value)
    assert load_to_start(None, both[:-1]) == load_config(None, both[:-1])
    assert load_to_start(None, [*both[:-2], both[-1]])[0].evaluate.task.samples == 0


def test_a_tokenizers_kind_follows_from_what_is_given():
    assert load_config(None, ["data.tokenizer.path=x"])[0].data.tokenizer.kind == "folder"
    assert load_config(None, ["data.tokenizer.name=a/b"])[0].data.tokenizer.kind == "hub"
    assert load_config(None, ["data.tokenizer.vocab_size=300"])[0].data.tokenizer.kind == "train"


def test_a_home_folder_is_found_wherever_a_folder_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    source = 'data.sources=[{kind: huggingface, name: "~/set", data_files: ["~/a.csv"]}]'
    config, _ = load_config(None, [*QLORA, "model.base=~/base", "run.dir=~/runs", "data.dir=~/shards", source])
    assert config.run.folder.parent == tmp_path / "runs"
    assert config.data.dir == f"{tmp_path}/shards"
    assert config.data.sources[0].model_dump(include={"name", "data_files"}) == {
        "name": f"{tmp_path}/set",
        "data_files": [f"{tmp_path}/a.csv"],
    }
    assert recipe.tokenizer_file(config) == tmp_path / "base" / "tokenizer.json"
    given = ["data.tokenizer.path=./tok", 'data.sources=[{kind: text, paths: ["~/texts"]}]']
    kept = recipe.recipe_of(load_config(None, given)[0])  # of shards that are there: as it was before
    assert (kept["tokenizer"]["path"], kept["sources"][0]["paths"]) == ("./tok", ["~/texts"])


def test_the_home_folder_of_nobody_is_no_crash():
    config, origins = load_config(None, [*QLORA, "model.base=~no.such.user/base"])
    with pytest.raises(ModelError, match=r"no folder ~no\.such\.user/base here"):
        base_facts.check_place(config, origins)
    source = TextSource(kind="text", paths=["~no.such.user/x"])
    with pytest.raises(SourceError, match=r"~no\.such\.user/x: no such file"):
        list_units([source], config.data.format)
