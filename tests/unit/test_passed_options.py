"""Options of the command line reach what they are for, each under its own name."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from launcher import cli
from launcher.keeper.rules import Rules
from launcher.slurm import node, requeueing
from llmtrain import export, generate


def test_what_a_script_sets_reaches_its_nodes(monkeypatch: pytest.MonkeyPatch):
    given: list[tuple[Any, ...]] = []
    monkeypatch.setattr(node, "keep_going", lambda *words: given.append(words) or 0)
    words = ["node", "a.yaml", "--ranks", "4", "--device", "cuda", "--no-requeue"]
    words += ["--max-restarts", "5", "--hang-after", "7", "--lead", "300"]
    assert CliRunner().invoke(cli.app, words).exit_code == 0
    rules = Rules(max_restarts=5, hang_s=7, lead_s=300, may_requeue=False)
    assert given == [(["a.yaml"], 4, "cuda", rules, requeueing.requeue_with_scontrol)]
    assert CliRunner().invoke(cli.app, ["node", "a.yaml"]).exit_code == 0
    assert given[1] == (["a.yaml"], 1, None, Rules(may_requeue=True), requeueing.requeue_with_scontrol)


def test_how_to_merge_reaches_the_export(monkeypatch: pytest.MonkeyPatch):
    given: list[tuple[str, ...]] = []
    monkeypatch.setattr(cli, "become", lambda *words: given.append(words))
    how = ["--base", "dequantised", "--dtype", "fp32", "--device", "cpu", "--merge", "--trust-remote-code"]
    assert CliRunner().invoke(cli.app, ["export", "runs/a", "to", *how]).exit_code == 0
    assert given == [("llmtrain.export", *how, "--", "runs/a", "to")]


def become(module: str, *words: str) -> None:
    """In this process."""
    importlib.import_module(module).main(words)


def test_the_launcher_gives_the_core_every_option(monkeypatch: pytest.MonkeyPatch):
    """It alone knows their defaults."""
    given: list[Any] = []
    monkeypatch.setattr(cli, "become", become)
    monkeypatch.setattr(generate, "generate", lambda options: given.append(vars(options)))
    monkeypatch.setattr(export, "export", lambda *words: given.append(words))
    for words in (["generate", "runs/a"], ["generate", "runs/a", "--system", "-s", "--top-k", "4"]):
        assert CliRunner().invoke(cli.app, words).exit_code == 0
    told = {
        "checkpoint": Path("runs/a"), "prompt": "def main(", "system": None, "tokens": 200, "temperature": 0.8,
        "top_k": None, "top_p": None, "seed": 0, "device": "auto", "raw": False, "trust_remote_code": False,
    }  # fmt: skip
    assert given == [told, {**told, "system": "-s", "top_k": 4}]
    assert CliRunner().invoke(cli.app, ["export", "runs/a", "to"]).exit_code == 0
    gpu = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert given[2:] == [(Path("runs/a"), Path("to"), False, "original", torch.bfloat16, gpu, False)]
