"""Errors that a user can act on, each kind with an exit code of its own.

Anything else that escapes is a bug of ours: Python prints the traceback and exits with 1.
A `UserError` prints its message alone. The codes are part of the interface (docs/exit-codes.md):
a batch script may branch on them.
"""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from llmtrain import log
from llmtrain.wording import count

EXIT_REQUEUE = 75
"""Stopped on request after saving: start the same command again to go on (sysexits' EX_TEMPFAIL)."""
EXIT_INTERRUPTED = 130
"""Left at once, by Ctrl-C: what shells say of it."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_ALLOWED = (errno.EROFS, errno.EACCES, errno.EPERM)


class UserError(Exception):
    """Something outside the program is wrong; the message says what, where, and what to do."""

    exit_code = 2


class ConfigError(UserError):
    """The configuration is wrong. Carries every problem found, not just the first."""

    exit_code = 2

    def __init__(self, problems: list[str]):
        self.problems = problems
        found = count(len(problems), "problem")
        super().__init__("\n".join([f"configuration: {found}", *(f"  - {p}" for p in problems)]))


class SourceError(UserError):
    """A raw-data file is missing, empty, unreadable, or lacks the field that was named."""

    exit_code = 10


class EncodingError(UserError):
    """A raw-data file is not valid UTF-8."""

    exit_code = 11


class TokenizerError(UserError):
    """A tokenizer cannot be loaded, or lacks what training needs (an end-of-text token)."""

    exit_code = 12


class ShardError(UserError):
    """A shard is missing, truncated or altered."""

    exit_code = 13


class VocabularyError(UserError):
    """A token id lies outside the vocabulary."""

    exit_code = 14


class TooLittleData(UserError):
    """Fewer samples than one optimizer step needs."""

    exit_code = 15


class DataMismatch(UserError):
    """The shards were built by another recipe (tokenizer, packing, context) than the configuration's."""

    exit_code = 16


class RunFolderError(UserError):
    """The run folder belongs to another configuration, or another process is using it."""

    exit_code = 17


class CheckpointError(UserError):
    """No checkpoint verifies, or one cannot be read."""

    exit_code = 18


class DiskFull(UserError):
    """There is no room for what has to be written."""

    exit_code = 19


class NotFinite(UserError):
    """Loss or gradient norm became infinite or NaN; nothing was published since the last finite step."""

    exit_code = 20


class ModelError(UserError):
    """The base model cannot be had, or cannot be trained as configured."""

    exit_code = 21


class HubError(UserError):
    """The Hub refuses: no token, a wrong one, no right to write, a repository of the wrong kind."""

    exit_code = 22


class SlurmError(UserError):
    """SLURM refuses a job, or does not answer."""

    exit_code = 23


class OutOfMemory(UserError):
    """The GPU's memory does not suffice for a step of this run."""

    exit_code = 24


_KINDS: dict[int, type[UserError]] = {
    kind.exit_code: kind
    for kind in (
        SourceError, EncodingError, TokenizerError, ShardError, VocabularyError, TooLittleData, DataMismatch,
        RunFolderError, CheckpointError, DiskFull, NotFinite, ModelError, HubError, SlurmError, OutOfMemory,
    )
}  # fmt: skip
FOR_A_PERSON = frozenset({UserError.exit_code, *_KINDS})
"""The exit codes after which a person has to mend something; a crash, and a checkpoint that cannot be read now: 1."""


def is_for_a_person(code: int) -> bool:
    """Whether starting again would meet the same error."""
    return code in FOR_A_PERSON


def of_another_rank(message: str, exit_code: int) -> Exception:
    """What a rank raises for another one: the same kind of error, or a crash."""
    kind = _KINDS.get(exit_code)
    return RuntimeError(message) if kind is None else kind(message)


_GOES_ON = "it goes on where it stopped"


@contextlib.contextmanager
def disk_errors(what: str, folder: Path, then: str = _GOES_ON) -> Iterator[None]:
    """Turn "no space left" (and a full quota, or a file-size limit) into a `DiskFull` that names the folder, and what
    may not be written into a `RunFolderError`.

    Args:
        then: what the same command does once that is mended. Where it is not training that goes on, fewer checkpoints
            are no advice.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = _number_of(error)
        if number in _NOT_ALLOWED:
            file = error.filename if isinstance(error, OSError) else None
            where = "" if file in (None, str(folder)) else f"{file}: "
            raise RunFolderError(
                f"{what}: {folder}: {where}{os.strerror(number)}. See to it that this process may read and write there "
                f"('mount', 'ls -l' and 'dmesg' say more), then run the same command again: {then}."
            ) from error
        if number not in _NO_ROOM:
            raise
        fewer = (
            "keep fewer checkpoints (checkpoint.keep_last, checkpoint.keep_best), or save less often where many wait "
            "to be scored ('llmtrain status'), "
        )
        raise DiskFull(
            f"{what}: no space left in {folder} ({os.strerror(number)}); nothing half-written is left there. "
            f"Free some space, {fewer if then == _GOES_ON else ''}then run the same command again: {then}."
        ) from error


def is_full_or_forbidden(error: Exception) -> bool:
    """Whether `disk_errors` has words for it."""
    return _number_of(error) in (*_NO_ROOM, *_NOT_ALLOWED)


def _number_of(error: Exception) -> int | None:
    """The system's number of an error. Libraries written in Rust (tokenizers, safetensors) and `shutil.copytree` have
    it in their text alone."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    form = r"\[Errno (\d+)\]" if isinstance(error, OSError) else r"\(os error (\d+)\)"
    found = re.search(form, str(error))
    return int(found[1]) if found else None


@contextlib.contextmanager
def exit_with_code() -> Iterator[None]:
    """For entry points: print a `UserError` without a traceback and leave with its exit code.

    What was printed must have been written for a command to have done well: Python holds it back, so that a full disk
    behind standard output may be met at the end alone.
    """
    log.open_missing_outputs()
    log.escape_letters()
    try:
        with _printed_is_written():
            yield
    except UserError as error:
        _leave_with(error)
    except SystemExit as leaving:
        leave_code(leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None))
        raise
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)  # the terminal shows ^C, and a traceback would say no more
    except OSError as error:
        if error.errno in _NO_ROOM and error.filename is None:  # such as standard output's
            _leave_with(DiskFull(f"no space left for what this command writes or prints ({error.strerror})"))
        leave_code(1, f"{type(error).__name__}: {error}")
        raise
    except Exception as error:
        leave_code(1, f"{type(error).__name__}: {error}")
        raise
    else:
        leave_code(0)
    finally:
        log.flush()


@contextlib.contextmanager
def _printed_is_written() -> Iterator[None]:
    try:
        yield
    except SystemExit as leaving:
        if leaving.code:
            raise
        _write_out()
        raise
    else:
        _write_out()


def _write_out() -> None:
    try:
        sys.stdout.flush()
    except OSError as error:
        if error.errno in _NO_ROOM:  # else nobody reads it any more
            raise


def _leave_with(error: UserError) -> NoReturn:
    with contextlib.suppress(OSError):  # nobody can read it any more; the code says it too
        print("error:", log.printable(str(error), keep="\n"), file=sys.stderr, flush=True)  # noqa: T201
    leave_code(error.exit_code)
    sys.exit(error.exit_code)


EXIT_CODES = "LLMTRAIN_EXIT_CODES"
"""Variable that names a folder for exit codes: torchrun tells its caller nothing but 1."""
_OWNER = "LLMTRAIN_EXIT_CODES_OF"


def own_code() -> None:
    """Say that this process, and what it becomes, is a rank: what it starts inherits EXIT_CODES, and is none."""
    os.environ[_OWNER] = str(os.getpid())


def leave_code(code: int, why: str = "") -> None:
    """Leave a rank's exit code where `llmtrain run` looks; a process that was killed leaves none.

    The first one counts: what follows is how it leaves. The code is part of the file's name, for which a full disk
    mostly has room yet.
    """
    own = str(os.getpid())
    if (folder := os.environ.get(EXIT_CODES)) and os.environ.get(_OWNER) == own:
        with contextlib.suppress(OSError):
            Path(folder).mkdir(exist_ok=True)  # a cleaner of /tmp deletes what stays empty for days
            if not any(Path(folder).glob(f"{own}.*")):
                (Path(folder) / f"{own}.{code}").write_text(why)
