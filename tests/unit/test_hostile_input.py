"""Files, texts and folders that mean harm, or are broken in ways that nobody expects: refused, and never run."""

import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from llmtrain import generate, jsonl, log, manifest, origin
from llmtrain.batches import BatchPlan
from llmtrain.config import load_config, load_to_start
from llmtrain.config.model_sections import QLoRAModel
from llmtrain.errors import CheckpointError, ConfigError, ModelError, RunFolderError, UserError, exit_with_code
from llmtrain.manifest import TrainState
from llmtrain.metrics import Meter
from llmtrain.models import base
from llmtrain.progress import Progress
from llmtrain.tensorboard import TensorBoard
from llmtrain.world import World
from tests.support.bases import write_llama
from tests.support.checkpoint_runs import make_run, save

NINE_OF_NINE = "a0: &a0 1\n" + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("it ran",)


ESCAPE = "\x1b]0;title\x07"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (NINE_OF_NINE, "more than 100,000 values"),
        ("run: &r {name: x, y: *r}", "nested too deeply"),
        ("a: " + "[" * 3000, "nested too deeply"),
    ],
)
def test_a_small_file_cannot_stand_for_a_huge_one(tmp_path: Path, text: str, message: str):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(str(tmp_path / "c.yaml"))


def test_a_configuration_that_can_be_read_once_is_refused(tmp_path: Path):
    """Each process of a run reads it: the second one would find it empty, and train the default model."""
    os.mkfifo(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="has to be a regular file"):
        load_config(str(tmp_path / "c.yaml"))


@pytest.mark.parametrize("setting", ["optim.lr=.inf", "optim.eps=.nan", 'run.dir="a\\0b"', 'run.dir="a\\ud800b"'])
def test_values_that_nothing_can_be_done_with(setting: str):
    with pytest.raises(ConfigError):
        load_config(None, [setting])


def test_a_width_that_cannot_be_divided_is_said_at_once():
    with pytest.raises(ConfigError, match="does not divide"):
        load_config(None, ["model.width=1000000000000007", "model.num_heads=4"])


def test_what_the_hub_is_not_to_get_is_said_before_training():
    settings = ["data.sources=[{kind: text, paths: ['https://jane:S3cretPassw0rd@host/x']}]"]
    load_to_start(None, settings)
    with pytest.raises(ConfigError, match="take it out"):
        load_to_start(None, [*settings, "hub.repo=jane/x"])


def test_a_bases_pickle_that_would_run_code_is_refused(tmp_path: Path):
    write_llama(tmp_path / "base")
    (tmp_path / "base/model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Runs()}, tmp_path / "base/pytorch_model.bin")
    with pytest.raises(ModelError, match="would run its code"):
        base.load(QLoRAModel(kind="qlora", base=str(tmp_path / "base")), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("content", ["[1, 2]", '"x"', "[" * 100_000])
def test_a_manifest_of_another_shape_is_damaged(tmp_path: Path, content: str):
    run = make_run(tmp_path / "run")
    save(run, 5)
    (run.checkpoint(5) / manifest.NAME).write_text(content)
    with pytest.raises(CheckpointError, match="altered"):
        manifest.read(run.checkpoint(5))


def test_a_record_of_another_shape_is_damaged(tmp_path: Path):
    (tmp_path / "x.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(RunFolderError, match="line 1 is damaged"):
        jsonl.read(tmp_path / "x.jsonl")


def test_a_folder_whose_name_is_not_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = make_run(tmp_path / "run")
    folder = tmp_path / os.fsdecode(b"nu\xff")
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match="not UTF-8"):
        origin.note(run, "cpu", 1, 1)


def test_errors_do_not_reach_the_terminals_controls(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit), exit_with_code():
        raise UserError(f"{ESCAPE}: no such file\nand more")
    assert capsys.readouterr().err == "error: \\x1b]0;title\\x07: no such file\nand more\n"


@pytest.mark.parametrize(("shows", "expected"), [(True, "\\x1b]0;title\\x07\n\tx\n"), (False, f"{ESCAPE}\n\tx\n")])
def test_generated_text_does_not_reach_them_either(monkeypatch: pytest.MonkeyPatch, shows: bool, expected: str):
    """Into a file or a pipe it goes as it is."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="\n")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(out, "isatty", lambda: shows)
    generate.write([ESCAPE, "\n\tx"])
    out.seek(0)
    assert out.read() == expected
    generate.write(["\u00e9"])  # not a letter of this encoding


def test_a_browser_is_given_generated_text_as_quoted_code(tmp_path: Path):
    """TensorBoard shows texts as Markdown."""
    shown: list[str] = []
    board = cast(TensorBoard, SimpleNamespace(text=lambda _step, _tag, markdown: shown.append(markdown)))
    alone, plan = World(0, 1, 0, torch.device("cpu")), BatchPlan(8, 8, 1, 100)
    progress = Progress(100, 0, enabled=False)
    meter = Meter(make_run(tmp_path / "run"), alone, board, progress, plan, 100, 8.0, 1.0, bf16=False)
    meter.sample(TrainState(step=1), "# a\n", "<img src=x>\n\n[b](c)")
    assert shown == ["    # a\n    <img src=x>\n    \n    [b](c)"]


def test_printable_keeps_what_it_is_told_to():
    assert log.printable("a\tb\u202ec\n", keep="\n") == "a\\tb\\u202ec\n"
