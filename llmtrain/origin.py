"""How training was started: what the run's own configuration does not say."""

import math
import os
import uuid
from pathlib import Path

import pydantic

from llmtrain import files, log
from llmtrain.errors import ConfigError
from llmtrain.rundir import RunDir

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Origin(pydantic.BaseModel):
    """RUN/origin.json."""

    id: str
    """Never changes, but in a copy; tells this run from any other, and binds the Hub's repository to it."""
    run: Path | None = None
    """The run folder at that start, absolute: where it is another one now, the folder was moved or copied. None: not
    noted (older versions)."""
    folder: Path
    """Relative paths of the configuration (shards, base, tokenizer) start here."""
    device: str = "cpu"
    gpus_used: int = 0
    """GPUs of each machine that training uses."""
    machine: str = ""
    """Where rank 0 ran (`machine`); empty: not known."""
    num_machines: int = 1
    """That training runs on, of which only rank 0's is named."""
    ranks: int | None = None
    """On all machines; None: not noted (older versions)."""
    finished: bool = False
    """Training has come to its end: it will not take its GPUs again by itself."""


def note(run: RunDir, device: str, local_ranks: int, ranks: int) -> None:
    """Write origin.json, at each start of training; an id that is there stays, but not in a copy of a run.

    Args:
        local_ranks: on this machine.
        ranks: on all machines.

    Raises:
        ConfigError: the folder's name is not UTF-8, and cannot be written down.
    """
    if not files.is_utf8(str(Path.cwd())):
        raise ConfigError([f"{Path.cwd()!r}: this folder's name is not UTF-8; start from another one"])
    is_new = not run.origin.exists() or copied_from(run) is not None
    started = Origin(
        id=uuid.uuid4().hex if is_new else read(run).id,
        run=run.path.absolute(),
        folder=Path.cwd(),
        device=device,
        gpus_used=local_ranks if device == "cuda" else 0,
        machine=machine(),
        num_machines=math.ceil(ranks / local_ranks),
        ranks=ranks,
    )
    files.write_atomic(run.origin, started.model_dump_json() + "\n")


def copied_from(run: RunDir) -> RunDir | None:
    """The run that this folder is a copy of, since it was last trained: that one is still there, with the same id."""
    if not run.origin.exists():
        return None
    known = read(run)
    if known.run is None or not (there := RunDir(known.run)).origin.exists() or there.path.samefile(run.path):
        return None
    return there if read(there).id == known.id else None


def machine() -> str:
    """Tells this machine from others. Not by its name where Linux has better: each container has one of its own, and
    all of them share the GPUs."""
    try:
        return _BOOT_ID.read_text().strip() or os.uname().nodename
    except OSError:
        return os.uname().nodename


def gpus_used_here(run: RunDir) -> int:
    """GPUs of this machine that training, as it was last started, uses while it runs.

    Of several machines this may be any one, and where the machine was not noted it is taken for this one.
    """
    started = read(run)
    is_elsewhere = started.num_machines == 1 and started.machine not in ("", machine())
    return 0 if is_elsewhere else started.gpus_used


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
