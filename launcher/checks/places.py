"""Which folders all nodes of a cluster see: by the profile's word, else by the kind of their file system."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from launcher.findings import Finding, Severity, fine

Reach = Literal["shared", "node-local", "unknown"]
_SHARED = {
    "nfs", "nfs4", "lustre", "gpfs", "beegfs", "beegfs_nodev", "ceph", "wekafs", "panfs", "pvfs2", "orangefs", "afs",
    "glusterfs", "ocfs2", "gfs2", "cifs", "smb3",
}  # fmt: skip
_LOCAL = {"tmpfs", "ramfs", "devtmpfs"}
_LOCAL_FUSE = ("fuse.fuse-overlayfs", "fuse.overlay", "fuse.squashfuse", "fuse.lxcfs")
_MOUNTS = Path("/proc/mounts")
_SCRATCH = tuple(map(Path, ("/tmp", "/var/tmp", "/dev/shm")))


def find_reach(path: Path, shared: Sequence[Path]) -> tuple[Reach, str]:
    """Whether all nodes see a path (which need not exist), and why.

    Args:
        shared: the profile's folders; if there are any, they alone decide.
    """
    lies = path.expanduser().resolve()
    if shared:
        for folder in shared:
            if lies.is_relative_to(folder.resolve()):
                return "shared", f"below {folder}, which all nodes see (profile)"
        return "node-local", f"not below what all nodes see by the profile ({', '.join(map(str, shared))})"
    kind = kind_of_file_system(lies)
    if kind in _SHARED or (kind.startswith("fuse.") and kind not in _LOCAL_FUSE):
        return "shared", f"on {kind}"
    if kind in _LOCAL:
        return "node-local", f"on {kind}, the memory of one machine"
    for scratch in _SCRATCH:
        if lies.is_relative_to(scratch):
            return "node-local", f"below {scratch}, which every machine has for itself"
    return "unknown", f"on {kind or 'a file system of an unknown kind'}, which is mostly one machine's own"


def kind_of_file_system(path: Path) -> str:
    """Of the mount that holds an absolute path; "" where that cannot be known."""
    best, kind = Path(), ""
    for line in _MOUNTS.read_text().splitlines() if _MOUNTS.exists() else []:
        _, where, found, *_ = line.split(" ")
        mount = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), where))  # a blank is written as \040
        if path.is_relative_to(mount) and len(mount.parts) >= len(best.parts):  # of two mounts the later one is seen
            best, kind = mount, found
    return kind


def check_reach(what: str, path: Path, shared: Sequence[Path], nodes: int) -> Finding:
    """Whether the nodes of a job will find what is here, and the others what one of them writes."""
    reach, why = find_reach(path, shared)
    shown = path.expanduser().absolute()
    if reach == "shared":
        return fine(what, f"{shown}: {why}")
    severity: Severity = "error" if reach == "node-local" or nodes > 1 else "warning"
    advice = "name what all nodes see in the profile (shared: [...])"
    if reach == "node-local":
        or_name_it = "" if shared else ", or name it in the profile (shared: [...])"
        advice = f"use a folder that all nodes see{or_name_it}"
    elif nodes == 1:
        advice = f"a job that is queued again may start on another node; {advice}"
    return Finding(what, f"{shown} is {why}; {advice}", severity)


def nearest_existing(path: Path) -> Path:
    """The path itself, or the folder above it in which it would be made."""
    lies = path.expanduser().absolute()
    while not _is_there(lies):
        lies = lies.parent
    return lies


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:  # of a folder above it
        return False


def can_write(path: Path) -> bool:
    """Whether this user may write there, or make it."""
    return os.access(nearest_existing(path), os.W_OK | os.X_OK)
