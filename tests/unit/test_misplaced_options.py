"""Options of the command line that would be ignored where they stand are refused, before anything is done."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cli import app
from llmtrain.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["shard", "--cluster", "c.yaml"], "--cluster: it goes with --submit"),
        (["shard", "--parts", "4"], "--parts: it goes with --submit"),
        (["shard", "--submit", "--cluster", "c.yaml", "--force"], "--force: not with --submit"),
        (["shard", "--submit", "--cluster", "c.yaml", "--only", "prepare"], "--only: not with --submit"),
        (["shard", "--submit", "--cluster", "c.yaml", "--show", "2"], "--show: not with --submit"),
        (["export", "runs/a", "to", "--base", "dequantised"], "--base dequantised is about merging; add --merge"),
        (["export", "runs/a", "to", "--dtype", "bf16"], "--dtype bf16 is about merging; add --merge"),
        (["export", "runs/a", "to", "--device", "cpu"], "--device cpu is about merging; add --merge"),
        (["submit", "--cluster", "c.yaml", "--plain"], "--plain: it goes with --dry-run"),
        (["submit", "--cluster", "c.yaml", "--dry-run", "--service-job"], "leave it out"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("gpus_per_node: 0\n")
    done = CliRunner().invoke(app, words)
    assert done.exit_code == ConfigError.exit_code
    assert message in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize("words", [["train", "c.yaml", "--lr", "3"], ["resume"], ["merge", "--help-me"], ["chat"]])
def test_a_command_of_another_trainer_is_answered_with_ours(words: list[str]):
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert f"there is no command '{words[0]}'; to " in done.output
    assert "llmtrain run" in CliRunner().invoke(app, ["train"]).output
