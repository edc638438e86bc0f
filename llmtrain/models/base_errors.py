"""What goes wrong while a base is loaded: whether it says something about the base, or about the GPU."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


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
