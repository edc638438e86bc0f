"""What a Python has: its version, torch and for which CUDA it was built. Torch's own files tell; it is not loaded."""

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_TIMEOUT_S = 30.0
_ASK = """
import importlib.util, json, sys
def where(name):
    found = importlib.util.find_spec(name)
    return found and found.origin
here = {"version": sys.version.split()[0], "prefix": sys.prefix, "torch": where("torch"), "llmtrain": where("llmtrain")}
print(json.dumps(here))
"""


@dataclass(frozen=True)
class Torch:
    version: str
    accelerator: str | None
    """"CUDA 12.6", "ROCm 6.2"; None for a build for CPUs alone."""


@dataclass(frozen=True)
class Environment:
    """A Python and what it finds."""

    version: str
    prefix: Path
    torch: Torch | None
    has_llmtrain: bool


def look_into(python: Sequence[str]) -> Environment:
    """Ask an interpreter where it finds things, and read there.

    Raises:
        OSError: there is no such interpreter, or it does not work; the message says how.
    """
    try:
        done = subprocess.run(
            [*python, "-c", _ASK], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, encoding="utf-8"
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"{' '.join(python)} does not answer within {_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise OSError(f"{' '.join(python)} ends with {done.returncode}: {said[-1] if said else 'without a word'}")
    answer = json.loads(done.stdout.splitlines()[-1])
    torch = None if answer["torch"] is None else read_torch(Path(answer["torch"]).parent)
    return Environment(answer["version"], Path(answer["prefix"]), torch, answer["llmtrain"] is not None)


def read_torch(folder: Path) -> Torch | None:
    """From an installed torch's version.py; None where there is none."""
    file = folder / "version.py"
    if not file.is_file():
        return None
    text = file.read_text(encoding="utf-8")
    values = dict(re.findall(r"^(__version__|cuda|hip)\b[^=\n]*= *'([^']*)'", text, re.MULTILINE))
    accelerator = None
    if "cuda" in values:
        accelerator = f"CUDA {values['cuda']}"
    elif "hip" in values:
        accelerator = f"ROCm {values['hip']}"
    return Torch(values.get("__version__", "of an unknown version"), accelerator)
