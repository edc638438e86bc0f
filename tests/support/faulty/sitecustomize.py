"""Breaks one rank of a run, once, as bad data, bad code or bad hardware would; the code under test knows nothing of it.

Python imports this by itself where the folder is on the PYTHONPATH (tests/support/supervised.py puts it there).
LLMTRAIN_TEST_FAULTS: what happens, in which rank, at which call, and the file that says that it has happened; one after
the other, each in another start of the run.
"""

import ctypes
import json
import os
import sys
import threading
import time
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path


def stop_for_ever():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def stop_all_of_python():
    """A call into C that keeps Python's lock, as a driver may do that waits for a device."""
    ctypes.PyDLL(None).sleep(3600)


def fail():
    """As where NCCL connects the ranks: who ends its process group there waits for the others."""
    import torch.distributed

    torch.distributed.destroy_process_group = stop_for_ever
    raise RuntimeError("a bad row")


def exhaust():
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. If reserved but unallocated ...")


def crash():
    ctypes.string_at(0)


PLACES = {"data": ("llmtrain.data", "Loader", "read_step"), "forward": ("llmtrain.models.gpt", "GPT", "forward")}
DEEDS = {"stops": stop_for_ever, "freezes": stop_all_of_python, "fails": fail, "crashes": crash, "exhausts": exhaust}


class Patch(MetaPathFinder):
    """Loads one module as usual, and makes one of its functions fail at a later call."""

    def __init__(self, place, deed, first_call, struck):
        self._module, self._class, self._function = PLACES[place]
        self._deed, self._calls_left, self._struck = DEEDS[deed], first_call, struck

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self._module:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        load = spec.loader.exec_module

        def load_and_patch(module):
            load(module)
            self._patch(getattr(module, self._class))

        spec.loader.exec_module = load_and_patch
        return spec

    def _patch(self, owner):
        original = getattr(owner, self._function)

        def patched(*arguments, **named):
            self._calls_left -= getattr(arguments[0], "training", True)  # not while it evaluates
            if self._calls_left == 0 and not self._struck.exists():
                self._struck.write_text(str(time.time()))
                self._deed()
            return original(*arguments, **named)

        setattr(owner, self._function, patched)


def main():
    faults = json.loads(os.environ.get("LLMTRAIN_TEST_FAULTS", "[]"))
    fault = next((each for each in faults if not Path(each["struck"]).exists()), None)
    if fault is not None and os.environ.get("RANK") == str(fault["rank"]):
        place, deed = fault["what"].split(" ")
        sys.meta_path.insert(0, Patch(place, deed, fault["call"], Path(fault["struck"])))


main()
