"""Fixtures and options that all tests share."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports numpy or torch: tests share the cores, and threads that wait for each other keep them busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.support.runs import Workplace, make_workplace


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run the long campaigns with their full counts")
    parser.addoption("--gpu", action="store_true", help="run the tests that need a GPU, and no others")


def pytest_configure(config: pytest.Config) -> None:
    """Tests and what they start are the same with a GPU and without: they see none. CUDA reads this once a process,
    so that those that need one are run by a pytest of their own."""
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if config.getoption("--gpu"):
        import torch

        config.hook.pytest_deselected(items=[item for item in items if item not in on_gpu])
        items[:] = on_gpu
        missing = None if torch.cuda.is_available() else "needs a GPU"
    else:
        missing = "needs a GPU: pytest --gpu (make test does that where there is one)"
    for item in on_gpu if missing else []:
        item.add_marker(pytest.mark.skip(reason=missing))
    if not config.getoption("--soak"):
        for item in items:
            if item.get_closest_marker("soak"):
                item.add_marker(pytest.mark.skip(reason="a long campaign: make soak"))


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """Shared by tests that give their runs names of their own."""
    return make_workplace(tmp_path_factory.mktemp("workplace"))


@pytest.fixture
def own_workplace(tmp_path: Path) -> Workplace:
    """For tests that change shards or configuration."""
    return make_workplace(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB; needs root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("a file system of its own cannot be mounted here (needs root)")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)
