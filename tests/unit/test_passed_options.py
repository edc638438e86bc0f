"""Options of the command line reach what they are for, each under its own name."""

from typing import Any

import pytest
from typer.testing import CliRunner

from launcher import cli
from launcher.keeper.supervisor import Rules
from launcher.slurm import node


def test_what_a_script_sets_reaches_its_nodes(monkeypatch: pytest.MonkeyPatch):
    given: list[tuple[Any, ...]] = []
    monkeypatch.setattr(node, "keep_going", lambda *words: given.append(words) or 0)
    words = ["node", "a.yaml", "--ranks", "4", "--device", "cuda", "--no-requeue"]
    words += ["--max-restarts", "5", "--hang-after", "7", "--lead", "300"]
    assert CliRunner().invoke(cli.app, words).exit_code == 0
    rules = Rules(max_restarts=5, hang_s=7, lead_s=300)
    assert given == [(["a.yaml"], 4, "cuda", rules, node.requeue_with_scontrol, False)]


def test_how_to_merge_reaches_the_export(monkeypatch: pytest.MonkeyPatch):
    given: list[tuple[str, ...]] = []
    monkeypatch.setattr(cli, "become", lambda *words: given.append(words))
    how = ["--base", "dequantised", "--dtype", "fp32", "--device", "cpu", "--merge", "--trust-remote-code"]
    assert CliRunner().invoke(cli.app, ["export", "runs/a", "to", *how]).exit_code == 0
    assert given == [("llmtrain.export", *how, "--", "runs/a", "to")]
