"""How training was started: what the run's own configuration does not say."""

import os
import uuid
from pathlib import Path

import pydantic

from llmtrain import files, log
from llmtrain.rundir import RunDir


class Origin(pydantic.BaseModel):
    """RUN/origin.json."""

    id: str
    """Never changes; tells this run from any other, and binds the Hub's repository to it."""
    folder: Path
    """Relative paths of the configuration (shards, base, tokenizer) start here."""
    device: str = "cpu"
    gpus_used: int = 0
    """GPUs of this machine that training uses."""
    finished: bool = False
    """Training has come to its end: it will not take its GPUs again by itself."""


def note(run: RunDir, device: str, local_ranks: int) -> None:
    """Write origin.json, at each start of training; an id that is there stays."""
    known = read(run).id if run.origin.exists() else uuid.uuid4().hex
    started = Origin(id=known, folder=Path.cwd(), device=device, gpus_used=local_ranks if device == "cuda" else 0)
    files.write_atomic(run.origin, started.model_dump_json() + "\n")


def note_finished(run: RunDir) -> None:
    """Add to origin.json that training has ended, until it is started again."""
    if run.origin.exists():
        ended = read(run).model_copy(update={"finished": True})
        files.write_atomic(run.origin, ended.model_dump_json() + "\n")


def read(run: RunDir) -> Origin:
    """How training was last started; of a run that is older than this file, or where it is damaged, what can be
    guessed."""
    try:
        return Origin.model_validate_json(run.origin.read_bytes())
    except FileNotFoundError:
        pass
    except ValueError:
        log.warn_once(f"{run.origin} is damaged, and taken for missing; the next start of training writes it anew")
    return Origin(id=files.sha256(run.config), folder=Path.cwd())


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
