"""How files come into the loopback Hub: large objects through the storage, then a commit."""

import base64
import hashlib
import json
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.hub_repos import LFS_SUFFIXES, File, Repo, Upload
from tests.support.hub_wire import Answer, Refused, Request, as_json

if TYPE_CHECKING:
    from tests.support.hub_server import Hub

STORAGE = "/_storage/"


def preupload(hub: "Hub", request: Request, name: str, revision: str) -> Answer:
    repo, wish = hub.open(request, name, write=True), request.body.json()
    tree = repo.find(revision).tree
    return as_json({"files": [upload_mode(hub, tree, file) for file in wish["files"]]})


def upload_mode(hub: "Hub", tree: dict[str, File], file: dict[str, Any]) -> dict[str, Any]:
    binary = b"\0" in base64.b64decode(file["sample"])
    large = file["path"].endswith(LFS_SUFFIXES) or file["size"] > hub.lfs_above_bytes or binary
    known = tree.get(file["path"])
    mode = "lfs" if large else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **({"oid": known.etag} if known else {})}


def lfs_batch(hub: "Hub", request: Request, name: str) -> Answer:
    repo = hub.open(request, name, write=True)
    objects = [announce(hub, repo, wish["oid"], wish["size"]) for wish in request.body.json()["objects"]]
    parts = any("chunk_size" in o.get("actions", {}).get("upload", {}).get("header", {}) for o in objects)
    return as_json({"transfer": "multipart" if parts else "basic", "objects": objects})


def announce(hub: "Hub", repo: Repo, oid: str, size: int) -> dict[str, Any]:
    """How to upload an object; no actions for one that is stored."""
    known: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
    if oid in repo.objects:
        return known
    key = uuid.uuid4().hex
    with hub.lock:
        hub.uploads[key] = Upload(repo, oid, size)
    href = f"{hub.endpoint}{STORAGE}{oid}/{key}"
    upload: dict[str, Any] = {"href": href}
    if size > hub.multipart_above_bytes:
        numbers = range(1, -(-size // hub.part_bytes) + 1)
        header = {str(n): f"{href}/{n}" for n in numbers}
        upload = {"href": f"{href}/complete", "header": {"chunk_size": str(hub.part_bytes), **header}}
    verify = {"href": f"{hub.endpoint}/{repo.name}.git/info/lfs/objects/verify"}
    return {**known, "actions": {"upload": upload, "verify": verify}}


def put_part(hub: "Hub", request: Request, oid: str, key: str, number: str = "0") -> Answer:
    """The storage asks for no token: the address is the permission, as with a signed one."""
    upload = find_upload(hub, key, oid)
    path = hub.folder / "uploads" / f"{key}.{number}.{uuid.uuid4().hex}"
    digest = hashlib.md5()
    try:
        with path.open("wb") as file:
            for piece in request.body.pieces():
                digest.update(piece)
                file.write(piece)
        if number == "0":
            store(hub, upload, [path])
        else:
            upload.parts[int(number)] = path
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return Answer(200, headers={"ETag": f'"{digest.hexdigest()}"'})


def complete_upload(hub: "Hub", request: Request, oid: str, key: str) -> Answer:
    """Once more after a lost answer is no error."""
    upload, wish = find_upload(hub, key, oid), request.body.json()
    if oid not in upload.repo.objects:
        missing = [part["partNumber"] for part in wish["parts"] if part["partNumber"] not in upload.parts]
        if missing:
            raise Refused(400, f"Parts are missing: {missing}")
        store(hub, upload, [upload.parts[part["partNumber"]] for part in wish["parts"]])
    return as_json({"success": True})


def find_upload(hub: "Hub", key: str, oid: str) -> Upload:
    upload = hub.uploads.get(key)
    if upload is None or upload.oid != oid:
        raise Refused(403, "The signature does not match")
    return upload


def store(hub: "Hub", upload: Upload, parts: list[Path]) -> None:
    """Only what has the size and the hash that were announced becomes an object."""
    whole, digest = parts[0], hashlib.sha256()
    with whole.open("ab") as file:
        for part in parts[1:]:
            with part.open("rb") as source:
                shutil.copyfileobj(source, file)
            part.unlink()
    with whole.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    size = whole.stat().st_size
    if (digest.hexdigest(), size) != (upload.oid, upload.size):
        raise Refused(400, f"BadDigest: {size} bytes that are not the {upload.size} bytes of {upload.oid}")
    with hub.lock:
        whole.replace(hub.object_path(upload.oid))
        upload.repo.objects[upload.oid] = size


def verify_object(hub: "Hub", request: Request, name: str) -> Answer:
    repo, wish = hub.open(request, name, write=True), request.body.json()
    if repo.objects.get(wish["oid"]) != wish["size"]:
        raise Refused(404, f"Object {wish['oid']} is not stored with {wish['size']} bytes")
    return as_json({})


def commit(hub: "Hub", request: Request, name: str, branch: str) -> Answer:
    repo = hub.open(request, name, write=True)
    header, *operations = [json.loads(line) for line in request.body.all().splitlines() if line.strip()]
    wish = header["value"]
    with hub.lock:
        head = repo.find(branch)
        if branch not in repo.branches:
            raise Refused(400, f"Invalid reference for a branch: {branch}")
        if wish.get("parentCommit") not in (None, head.oid):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(head.tree)
        for operation in operations:
            apply(repo, tree, operation["key"], operation["value"])
        if tree != head.tree or hub.empty_commits:
            hub.spend_quota(repo)
            title, _, rest = wish["summary"].partition("\n")
            description = "\n\n".join(part for part in (rest.strip(), wish.get("description", "")) if part)
            head = repo.commit(branch, title, description, tree)
    url = f"{hub.endpoint}/{name}/commit/{head.oid}"
    return as_json({"success": True, "commitOid": head.oid, "commitUrl": url, "hookOutput": ""})


def apply(repo: Repo, tree: dict[str, File], kind: str, wish: dict[str, Any]) -> None:
    """One operation of a commit, on a copy of the head's tree."""
    path = wish["path"]
    match kind:
        case "file":
            encoded = wish.get("encoding") == "base64"
            tree[path] = File.regular(base64.b64decode(wish["content"]) if encoded else wish["content"].encode())
        case "lfsFile":
            # Copies come without a size. The repository knows it.
            if wish["oid"] not in repo.objects or wish.get("size") not in (None, repo.objects[wish["oid"]]):
                reason = "Your push was rejected because an LFS pointer pointed to a file that does not exist."
                raise Refused(400, f"{reason} Offending file: - {path}")
            tree[path] = File.large(wish["oid"], repo.objects[wish["oid"]])
        case "deletedFile" | "deletedFolder":
            inside = path.rstrip("/") + "/"
            gone = [p for p in tree if (p.startswith(inside) if kind == "deletedFolder" else p == path)]
            if not gone:
                raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for old in gone:
                del tree[old]
        case _:
            raise Refused(400, f"Unknown operation: {kind}")
