"""Run folders with checkpoints, scores and uploads, written by hand: for what people look at."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from llmtrain import intervals, jsonl, ledger, manifest
from llmtrain.config import load_config, resolved_yaml
from llmtrain.config.schema import RunConfig
from llmtrain.ledger import Score, Split, Upload
from llmtrain.manifest import Manifest, TrainState
from llmtrain.rundir import RunDir

ROWS = 1000
BATCH = 32
TARGETS = 64
"""Of a row, and of a stretch."""


def make_run(folder: Path, *settings: str) -> RunDir:
    """An empty run with that configuration."""
    config, _ = load_config(None, settings)
    run = RunDir(folder)
    run.create()
    run.config.write_text(resolved_yaml(config))
    return run


def config_of(run: RunDir) -> RunConfig:
    return load_config(run.config)[0]


def save(run: RunDir, step: int, loss: float | None = 3.0, content: str = "weights") -> str:
    """A checkpoint that verifies, and what training measured at it; returns its identity."""
    folder = run.checkpoint(step)
    paths = [folder / "model" / "model.safetensors", folder / "state" / "optimizer-00000-of-00001.safetensors"]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content} {step} {path.name} " * 1000)
    described = Manifest(
        train_state=TrainState(step=step, samples=step * BATCH, targets=step * BATCH * TARGETS),
        seed=123,
        num_rows=ROWS,
        global_batch_size=BATCH,
        fingerprint="f" * 64,
        world_size=2,
        strategy="zero2",
        heldout_loss=loss,
        files=manifest.describe_files(folder, paths),
    )
    manifest.write(folder, described)
    if loss is not None:
        record = {"step": step, "epoch": step * BATCH / ROWS, "loss": loss, "train_loss": loss - step / 1000}
        jsonl.append(run.heldout, [record])
    return manifest.identity(described)


def train(run: RunDir, steps: int, every: int = 10) -> None:
    """Lines of metrics up to that step."""
    for step in range(every, steps + 1, every):
        seen = {"epoch": step * BATCH / ROWS, "samples": step * BATCH, "targets": step * BATCH * TARGETS}
        jsonl.append(run.metrics, [{"step": step, "loss": 4.0 - step / 1000, **seen}])


def score(run: RunDir, step: int, losses: intervals.Losses | float, split: Split = "heldout") -> Score:
    """As the service records it: from disk with losses by stretch, or training's with one number."""
    identity = manifest.identity(manifest.read(run.checkpoint(step)))
    loss = losses if isinstance(losses, float) else float(losses[0].sum() / losses[1].sum())
    record = Score(
        step=step,
        checkpoint=identity,
        split=split,
        loss=loss,
        perplexity=float(np.exp(loss)),
        bits_per_byte=loss / 2.5,
        targets=1000 if isinstance(losses, float) else int(losses[1].sum()),
        epoch=step * BATCH / ROWS,
        origin="training" if isinstance(losses, float) else "disk",
        how="" if isinstance(losses, float) else "cpu fp32",
        seconds=2.5,
    )
    if not isinstance(losses, float):
        path = run.losses(step, identity, split)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, losses)
    ledger.append(run.scores, record)
    return record


def upload(run: RunDir, step: int, repo: str = "ada/gpt", removed: bool = False) -> None:
    known = ledger.scores(run).get(step)
    identity = known.checkpoint if known is not None else manifest.identity(manifest.read(run.checkpoint(step)))
    record = Upload(
        step=step,
        checkpoint=identity,
        repo=repo,
        commit="c0ffee" * 6,
        tag=f"step-{step:08d}",
        size_bytes=123_456,
        seconds=4.0,
        attempts=2,
        removed=removed,
        time=time.time(),
    )
    ledger.append(run.uploads, record)


def stretches(shift: float, count: int = 200, noise: float = 0.0, seed: int = 0) -> intervals.Losses:
    """Losses by stretch of a model whose loss is `shift` above that of the model with 0.

    Args:
        noise: standard deviation of the shift from stretch to stretch, per token.
    """
    text = 3.0 + np.random.default_rng(99).normal(0, 0.3, count)  # how hard each stretch is: the same for all models
    spread = np.random.default_rng(seed).normal(0, 1, count) * noise
    shifts = shift + spread - spread.mean()  # on the whole it is exactly `shift`
    return np.stack([(text + shifts) * TARGETS, np.full(count, float(TARGETS))])


# Fixtures of the tests of `llmtrain checkpoints`, which take them by naming them: `run = checkpoint_runs.run`


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """300 ties with the best (400); 100 is on the Hub alone, 600 is gone, 700 in quarantine, 800 not scored."""
    made = make_run(tmp_path / "run", "hub.repo=ada/gpt")
    for step, shift in {100: 0.8, 200: 0.2, 300: 0.002, 400: 0.0, 500: 0.1, 600: 0.2}.items():
        save(made, step, 3 + shift)
        score(made, step, stretches(shift, noise=0.03, seed=step))
    for step in (100, 300):
        upload(made, step)
    for step in (100, 600):
        shutil.rmtree(made.checkpoint(step))
    save(made, 700)
    made.checkpoint(700).rename(made.quarantined(700))
    save(made, 800, 3.25)
    return made
