"""What the loopback Hub tells of its files: listings, commits, bytes."""

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode

from tests.support.hub_repos import Commit, Repo, pointer
from tests.support.hub_wire import Answer, Refused, Request, as_json

if TYPE_CHECKING:
    from tests.support.hub_server import Hub


def listing(hub: "Hub", repo: Repo, commit: Commit, path: str, expand: bool = False) -> dict[str, Any]:
    """A file as the tree and paths-info tell it."""
    file = commit.tree[path]
    if hub.faults.lies_about(path):
        file = file.misreported()
    told: dict[str, Any] = {"type": "file", "oid": file.blob_id, "size": file.size, "path": path}
    if file.sha256:
        size = len(pointer(file.sha256, file.size))
        told["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": size}
    if expand:
        last = repo.changes(path, commit.oid)[0]
        told["lastCommit"] = {"id": last.oid, "title": last.title, "date": last.date}
    return told


def folder_listing(commit: Commit, path: str) -> dict[str, Any]:
    inside = sorted((p, f.blob_id) for p, f in commit.tree.items() if p.startswith(path + "/"))
    return {"type": "directory", "oid": hashlib.sha1(repr(inside).encode()).hexdigest(), "size": 0, "path": path}


def list_tree(hub: "Hub", request: Request, name: str, revision: str, folder: str = "") -> Answer:
    repo = hub.open(request, name)
    commit, start = repo.find(revision), f"{folder}/" if folder else ""
    recursive, expand = (request.query.get(flag, "").lower() in ("true", "1") for flag in ("recursive", "expand"))
    files = [path for path in sorted(commit.tree) if path.startswith(start)]
    if folder and not files:
        raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    folders = {str(parent) for path in files for parent in Path(path).parents} - {"."}
    paths = [p for p in sorted({*files, *folders}) if p.startswith(start) and (recursive or "/" not in p[len(start) :])]
    page, link = one_page(hub, request, paths)
    told = [folder_listing(commit, p) if p in folders else listing(hub, repo, commit, p, expand) for p in page]
    return as_json(told, **link)


def one_page(hub: "Hub", request: Request, items: list[Any]) -> tuple[list[Any], dict[str, str]]:
    """A part of a listing and, unless it is the last, the header that leads to the next."""
    start = int(request.query.get("cursor", 0))
    end = start + hub.page_size
    if end >= len(items):
        return items[start:], {}
    query = urlencode({**request.query, "cursor": end})
    return items[start:end], {"Link": f'<{hub.endpoint}{request.path}?{query}>; rel="next"'}


def paths_info(hub: "Hub", request: Request, name: str, revision: str) -> Answer:
    """Paths that do not exist are left out."""
    repo = hub.open(request, name)
    commit, form = repo.find(revision), parse_qs(request.body.all().decode())
    expand = form.get("expand", [""])[0].lower() == "true"
    told = []
    for path in form.get("paths", []):
        if path in commit.tree:
            told.append(listing(hub, repo, commit, path, expand))
        elif any(p.startswith(path.rstrip("/") + "/") for p in commit.tree):
            told.append(folder_listing(commit, path.rstrip("/")))
    return as_json(told)


def list_commits(hub: "Hub", request: Request, name: str, revision: str) -> Answer:
    page, link = one_page(hub, request, hub.open(request, name).history(revision))
    authors = [{"user": hub.user, "avatar": ""}]
    told = [{"id": c.oid, "title": c.title, "message": c.description, "authors": authors, "date": c.date} for c in page]
    return as_json(told, **link)


def resolve(hub: "Hub", request: Request, name: str, revision: str, path: str) -> Answer:
    """A file's bytes; the real Hub sends the client on to its storage for large ones."""
    commit = hub.open(request, name).find(revision)
    file = commit.tree.get(path)
    if file is None:
        refused = Refused(404, "Entry not found", "EntryNotFound")
        refused.answer.headers["X-Repo-Commit"] = commit.oid
        raise refused
    etag = (file.misreported() if hub.faults.lies_about(path) else file).etag
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
    headers["Content-Type"] = "application/octet-stream"
    if file.sha256:
        headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(file.size)}
    answer = Answer(200, hub.object_path(file.sha256) if file.sha256 else file.content, headers)
    return part_of(answer, request.headers.get("Range", ""), file.size)


def part_of(answer: Answer, wish: str, size: int) -> Answer:
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", wish)
    if not asked or not any(asked.groups()):
        return answer
    first = int(asked[1]) if asked[1] else max(0, size - int(asked[2]))
    last = min(int(asked[2]), size - 1) if asked[1] and asked[2] else size - 1
    if first > last:
        return Answer(416, headers={"Content-Range": f"bytes */{size}"})
    headers = {**answer.headers, "Content-Range": f"bytes {first}-{last}/{size}"}
    return Answer(206, answer.content, headers, first, last - first + 1)
