"""`llmtrain checkpoints RUN --test`: the proposed checkpoint's loss on text that no choice has seen, measured once."""

import subprocess
import sys
from collections.abc import Mapping

from rich.console import Console

from launcher.choosing import listing
from launcher.choosing.listing import Row
from launcher.display import Column, duration, figure, fitted, say, when
from llmtrain import ledger, scoring_place
from llmtrain.config import RunConfig
from llmtrain.config.load import load_written
from llmtrain.errors import CheckpointError, ConfigError, UserError
from llmtrain.ledger import Score
from llmtrain.rundir import RunDir
from llmtrain.wording import listed


def score_test(run: RunDir, again: bool, device: str | None) -> None:
    """Score the proposed checkpoint on the test split, once; the next time the recorded score is shown.

    Raises:
        ConfigError: there is no test split.
        CheckpointError: there is no checkpoint to score, or it is not on this disk.
        UserError: the split was used for another checkpoint.
    """
    config = load_written(run.config)
    if not config.data.has_test:
        if config.data.split.test:  # of no source: each has a `use`
            problem, instead = "data.sources", "give a source use: test"
        else:
            problem, instead = "data.split.test=0", "set it to a share such as 0.01"
        raise ConfigError([f"{problem} ({run.config}): there is no test split; {instead} and train anew"])
    found = listing.gather(run)
    row = found.proposed
    if row is None or row.entry is None:
        raise CheckpointError(f"{run.path}: no checkpoint to take to the test split: none has been scored from disk")
    heldout = row.entry.score
    recorded = _recorded(run, heldout)
    if recorded is None or again:
        _refuse(run, row, ledger.scores(run, "test"), again)
        _validate(run, row.step, device, config)
        recorded = _recorded(run, heldout)
        if recorded is None:
            raise CheckpointError(f"{run.scores}: the score of step {row.step} on the test split was not recorded")
    _show(heldout, recorded, [step for step in ledger.scores(run, "test") if step != row.step])


def _recorded(run: RunDir, heldout: Score) -> Score | None:
    score = ledger.scores(run, "test").get(heldout.step)
    return score if score is not None and score.checkpoint == heldout.checkpoint else None


def _refuse(run: RunDir, row: Row, used: Mapping[int, Score], again: bool) -> None:
    """A second use of the split, and a checkpoint that is not here."""
    if used and not again:
        last = max(used.values(), key=lambda score: score.time)
        raise UserError(
            f"{run.path}: the test split was used for step {last.step} on {when(last.time)} (loss {last.loss:.4f}), "
            f"and now step {row.step} is proposed. Whoever looks at the test loss of several checkpoints chooses by "
            "it, which makes it a second held-out split. --again does it all the same"
        )
    if not row.on_disk:
        raise CheckpointError(
            f"{run.path}: step {row.step} is not on this disk any more, only its upload is left; the test split is "
            "scored from a run's own folder"
        )


def _device_of(run: RunDir, config: RunConfig) -> tuple[str, str]:
    """Where the service would score now, on the CPU where it would not; and what says so."""
    if config.service.score not in ("auto", "training"):
        return config.service.score, f"--device is not given, and {run.config} has service.score"
    service = config.service.model_copy(update={"score": "auto"})
    found = scoring_place.find(run, config.model_copy(update={"service": service}), run.is_training())
    return ("cpu" if found == "training" else found), "--device is not given, which means here --device"


def _validate(run: RunDir, step: int, device: str | None, config: RunConfig) -> None:
    """Leaves with the validator's exit code if it fails; it has said why."""
    command = [sys.executable, "-m", "llmtrain.service.validate", str(run.path), "--steps", str(step)]
    command += ["--split", "test"]
    if device is None:
        device, asked_by = _device_of(run, config)
        command += ["--asked-by", asked_by]
    command += ["--device", device]
    console = Console(stderr=True)
    with console.status(f"scoring step {step} on the test split, on {device}"):
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise SystemExit(done.returncode if done.returncode > 0 else 128 - done.returncode)


def _show(heldout: Score, test: Score, others: list[int]) -> None:
    both = {"held-out": heldout, "test": test}.items()
    columns = [
        Column("split", [name for name, _ in both], 9, left=True),
        Column("loss", [figure(score.loss) for _, score in both], 8),
        Column("perplexity", [figure(score.perplexity, 2) for _, score in both], 7),
        Column("bits/byte", [figure(score.bits_per_byte) for _, score in both], 6),
        Column("tokens", [f"{score.targets:,}" for _, score in both], 5),
    ]
    console = Console(highlight=False)
    console.print(fitted(columns, ["", ""], console.width)[0])
    console.print()
    took = f", in {duration(test.seconds)}" if test.seconds >= 1 else ""
    say(console, "step", f"{test.step}, scored on the test split on {when(test.time)}{took}")
    if others:
        text = f"the test split was used for {listed(sorted(others))} too: this loss may have been chosen by it"
        say(console, "note", text, style="yellow")
