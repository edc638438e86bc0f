"""Real text for tests: some of Python's own sources, and the shared files where they are there."""

import hashlib
import sysconfig
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def shared(name: str) -> Path:
    """A file of the shared test data; skips the test where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not in the folder shared/data beside the checkout")
    return path


def folder_content(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def python_sources(count: int) -> list[Path]:
    """`count` files of the standard library, always the same ones."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(root.glob("*.py"))[:count]
