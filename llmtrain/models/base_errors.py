"""What goes wrong while a base is loaded: whether it says something about the base, or about the GPU or a disk."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llmtrain.errors import disk_errors, is_full_or_forbidden

_MAY_PASS = (errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE)


@contextlib.contextmanager
def conversion_errors_raised() -> Iterator[None]:
    """Within it, what fails in torch while weights are converted (quantised) is raised at once, as it is.

    transformers keeps its text for a report, goes on with the next weight, and raises an error that names nothing at
    the end: a GPU without memory would look like a base that cannot be quantised.
    """
    from transformers import core_model_loading

    # Theirs, not public: tests/unit/test_out_of_memory.py fails where it has moved.
    noted = core_model_loading.log_conversion_errors

    @contextlib.contextmanager
    def raised(*given: Any, **named: Any) -> Iterator[None]:
        try:
            yield
        except RuntimeError:
            raise
        except Exception:  # theirs to note
            with noted(*given, **named):
                raise

    core_model_loading.log_conversion_errors = raised
    try:
        yield
    finally:
        core_model_loading.log_conversion_errors = noted


def pass_on_the_gpus(error: Exception) -> None:
    """Raise what a GPU reports, which another start may not meet, also where libraries gave it another class.

    Raises:
        torch.OutOfMemoryError: its memory does not suffice.
        torch.AcceleratorError: it does not work.
    """
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    if isinstance(error, RuntimeError) and "out of memory" in str(error):  # the driver's own words, and Apple's
        raise torch.OutOfMemoryError(str(error)) from error
    if isinstance(error, torch.AcceleratorError):
        raise error


def pass_on_the_disks(error: Exception, base: str, folder: Path) -> None:
    """Raise what a disk reports, which says nothing about the base that lies, or is to lie, in `folder`.

    Raises:
        DiskFull, RunFolderError: there is no room, or this process may not read or write there.
        OSError: another start may not meet it: too many open files, a disk or a network file system that fails.
    """
    if isinstance(error, FileNotFoundError) and error.errno is None:  # safetensors says so whatever the reason was
        named = Path(str(error).removeprefix("No such file or directory: "))
        try:
            if named.is_file():
                named.open("rb").close()
        except OSError as reason:
            error = reason
    for each in (error, error.__cause__):
        if isinstance(each, Exception) and (
            is_full_or_forbidden(each) or (isinstance(each, OSError) and each.errno in _MAY_PASS)
        ):
            with disk_errors(f"model.base={base}", folder, then="it takes up the base again"):
                raise each
