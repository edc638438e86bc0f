"""Runs on this disk: a run's folder, and folders of runs."""

from collections.abc import Sequence
from pathlib import Path

from llmtrain.errors import RunFolderError
from llmtrain.rundir import RunDir
from llmtrain.wording import listed


def is_run(path: Path) -> bool:
    return RunDir(path).config.is_file() and RunDir(path).checkpoints.is_dir()


def runs_below(folder: Path) -> list[RunDir]:
    """The runs in a folder of runs, by name."""
    if not folder.is_dir():
        return []
    paths = (path for path in sorted(folder.iterdir()) if not path.name.startswith("."))  # such as .restoring-NAME
    return [RunDir(path) for path in paths if is_run(path)]


def open_run(path: Path) -> RunDir:
    """Raises RunFolderError where no run lies there; says which ones are near."""
    if is_run(path):
        return RunDir(path)
    near = [str(run.path) for run in runs_below(path) or runs_below(path.parent) or runs_below(Path("runs"))]
    above = [str(parent) for parent in (*path.parents, *path.resolve().parents) if is_run(parent)]
    hint = f"; did you mean {above[0]}?" if above else f"; there are: {listed(near)}" if near else ""
    what = "not a run folder (config.yaml and checkpoints/ are not in it)" if path.is_dir() else "no such folder"
    raise RunFolderError(f"{path}: {what}{hint}")


def find_runs(paths: Sequence[Path]) -> list[RunDir]:
    """The runs that are named, and those in the folders of runs that are named; without any, those in ./runs.

    Raises:
        RunFolderError: there is no run in one of these places.
    """
    found: dict[Path, RunDir] = {}
    for path in paths or [Path("runs")]:
        below = [RunDir(path)] if is_run(path) else runs_below(path)
        if not below and not paths:
            raise RunFolderError("./runs: no run below it; name the run, or the folder that holds your runs")
        for run in below or [open_run(path)]:
            found.setdefault(run.path.resolve(), run)
    return list(found.values())
