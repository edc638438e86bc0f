"""`llmtrain export`: no room where it writes, two of them that write to one place, what transformers gets wrong."""

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from llmtrain import log, model_files
from llmtrain.adapters import ADAPTER_CONFIG
from llmtrain.config.schema import GPTModel
from llmtrain.errors import CheckpointError, ConfigError, DiskFull, RunFolderError, disk_errors
from llmtrain.models.gpt import GPT
from tests.support.asked_runs import export_plainly
from tests.support.bases import VOCAB, write_tokenizer
from tests.support.data import folder_content


@contextmanager
def small_files() -> Iterator[None]:
    """None of more than 1 kB, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Which is copied as it is."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / ADAPTER_CONFIG).write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(bytes(5000))
    return folder


def copy(adapter: Path, to: Path) -> None:
    export_plainly(adapter, to)


def test_no_room_is_said_in_a_line_and_leaves_nothing(adapter: Path, tmp_path: Path):
    with small_files(), pytest.raises(DiskFull) as raised:
        copy(adapter, tmp_path / "to")
    assert str(raised.value) == (
        f"export: no space left in {tmp_path} ({os.strerror(errno.EFBIG)}); nothing half-written is left there. "
        "Free some space, then run the same command again: it begins anew."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def save_weights(folder: Path) -> None:
    save_file({"x": torch.zeros(1000)}, folder / "model.safetensors")


def save_tokenizer(folder: Path) -> None:
    Tokenizer(models.WordLevel({str(n): n for n in range(1000)}, unk_token="0")).save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("write", [save_weights, save_tokenizer])
def test_libraries_that_name_the_systems_error_in_their_text_alone(write: Callable[[Path], None], tmp_path: Path):
    with small_files(), pytest.raises(DiskFull), disk_errors("export", tmp_path):
        write(tmp_path)
    with pytest.raises(RunFolderError, match="Permission denied"), disk_errors("export", tmp_path):
        raise Exception("Permission denied (os error 13)")
    with pytest.raises(RuntimeError, match="28"), disk_errors("export", tmp_path):
        raise RuntimeError("28 is no error of the disk")


def test_fewer_checkpoints_are_advice_for_training_alone(tmp_path: Path):
    for given, is_advised in (({}, True), ({"then": "what is finished is kept"}, False)):
        with pytest.raises(DiskFull) as raised, disk_errors("x", tmp_path, **given):
            raise OSError(errno.ENOSPC, "No space left on device")
        assert ("checkpoint.keep_last" in str(raised.value)) == is_advised
        assert str(raised.value).endswith(f": {given.get('then', 'it goes on where it stopped')}.")


def test_the_faster_of_two_exports_to_one_folder_is_whole(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    to, copytree = tmp_path / "to", shutil.copytree

    def meanwhile(source: Path, aside: Path) -> None:
        copytree(source, aside)
        monkeypatch.setattr(shutil, "copytree", copytree)
        copy(adapter, to)
        assert aside.is_dir()  # the other one has left it alone

    monkeypatch.setattr(shutil, "copytree", meanwhile)
    with pytest.raises(ConfigError, match="exists already: another export was faster"):
        copy(adapter, to)
    assert folder_content(to) == folder_content(adapter)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "to"]


def test_what_killed_exports_have_left_is_named(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.setattr(log, "warning", said.append)
    for name in (".writing-to-0123abcd", ".writing-to-day-0123abcd"):
        (tmp_path / name).mkdir()
    copy(adapter, tmp_path / "to")
    assert said == [
        f"{tmp_path}/.writing-to-0123abcd: left by an export that was killed, unless it is still at work; delete it"
    ]


def test_a_model_that_transformers_computes_otherwise_is_not_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "model"
    write_tokenizer(folder)
    model = GPT(GPTModel(num_layers=1, num_heads=1, width=8, context=8), VOCAB)
    model.save(folder, {name: p.detach() for name, p in model.named_parameters()}, eos_id=0)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "activation_function": "relu"}))
    with pytest.raises(CheckpointError, match=r"it is computed with activation_function=relu \(here gelu_new\)"):
        copy(folder, tmp_path / "to")
    monkeypatch.setitem(model_files._GPT2, "activation_function", "relu")  # as if it were not known here
    with pytest.raises(CheckpointError, match="transformers' forward pass changed the logits"):
        copy(folder, tmp_path / "to")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
