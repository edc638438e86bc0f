"""How training was started: what the run's own configuration does not say."""

import json
import os
import uuid
from pathlib import Path

import pydantic

from llmtrain import files
from llmtrain.rundir import RunDir


class Origin(pydantic.BaseModel):
    """RUN/origin.json."""

    id: str
    """For life; tells this run from any other, and binds the Hub's repository to it."""
    folder: Path
    """Relative paths of the configuration (shards, base, tokenizer) start here."""
    device: str = "cpu"
    gpus_used: int = 0
    """By training, on this machine."""


def note(run: RunDir, device: str, local_ranks: int) -> None:
    """At each start of training."""
    known = read(run).id if run.origin.exists() else uuid.uuid4().hex
    started = Origin(id=known, folder=Path.cwd(), device=device, gpus_used=local_ranks if device == "cuda" else 0)
    files.write_atomic(run.origin, started.model_dump_json() + "\n")


def read(run: RunDir) -> Origin:
    """How training was last started; of a run that is older than this file, what can be guessed."""
    if not run.origin.exists():
        return Origin(id=files.sha256(run.config), folder=Path.cwd())
    return Origin.model_validate(json.loads(run.origin.read_text()))


def start_of(run: RunDir) -> Path:
    """The folder that training was started in, if it is there: on another machine it may not be. Else this one."""
    if run.origin.exists():
        folder = read(run).folder
        if folder.is_dir():
            return folder
    return Path.cwd()


def enter(run: RunDir) -> None:
    """Change to the folder that the configuration's relative paths start in."""
    os.chdir(start_of(run))
