"""`llmtrain generate`: its options reach the model."""

import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain import generate
from llmtrain.config.schema import GPTModel
from llmtrain.models.gpt import GPT
from tests.support.bases import VOCAB, write_tokenizer
from tests.support.runs import environment


def test_a_seed_is_one_text_and_another_seed_is_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = GPT(GPTModel(num_layers=1, num_heads=2, width=32, context=24), VOCAB, seed=3)
    model.save(tmp_path, dict(model.named_parameters()), eos_id=0)
    write_tokenizer(tmp_path)

    def written(*seed: str) -> str:
        generate.main(
            [str(tmp_path), "--prompt", "def", "--tokens", "12", "--device", "cpu", "--temperature", "0.8", *seed]
        )
        return capsys.readouterr().out

    first = written("--seed", "7")
    assert first.startswith("def")
    assert written("--seed", "7") == first
    assert len({first, written("--seed", "8"), written("--seed", "0")}) == 3


def test_who_has_read_enough_ends_it_quietly():
    """As `llmtrain generate ... | head -1` does."""
    endless = "import itertools; from llmtrain import generate; generate.write(itertools.repeat('word\\n'))"
    process = subprocess.Popen(
        [sys.executable, "-c", endless], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "word\n"
    process.stdout.close()
    assert (process.wait(timeout=60), process.stderr.read()) == (0, "")
