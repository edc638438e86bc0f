"""The loopback Hub's accounts, repositories and names of commits; control by tests; which path is whose."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import yaml

from tests.support.hub_reading import list_commits, list_tree, listing, paths_info, resolve
from tests.support.hub_repos import Repo
from tests.support.hub_uploads import STORAGE, commit, complete_upload, lfs_batch, preupload, put_part, verify_object
from tests.support.hub_wire import CONTROL, Answer, Refused, Request, as_json

if TYPE_CHECKING:
    from tests.support.hub_server import Hub


# Accounts and repositories


def whoami(hub: "Hub", request: Request) -> Answer:
    role = hub.role(request)
    if not role:
        raise Refused(401, "Invalid username or password.")
    token = {"displayName": "test", "role": role, "createdAt": "2026-01-01T00:00:00.000Z"}
    auth = {"type": "access_token", "accessToken": token}
    return as_json({"type": "user", "id": "1", "name": hub.user, "fullname": hub.user, "orgs": [], "auth": auth})


def validate_yaml(hub: "Hub", request: Request) -> Answer:
    """A model card's metadata. The real Hub checks more fields, and answers in the same form."""
    card = re.match(r"\s*---\r?\n(.*?)\r?\n---", request.body.json()["content"], re.DOTALL)
    if not card:
        return as_json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
    errors = [{"message": message} for message in card_errors(card[1])]
    return as_json({"errors": errors, "warnings": []}, 400 if errors else 200)


def card_errors(text: str) -> list[str]:
    try:
        metadata = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"]
    if not isinstance(metadata, dict):
        return ["metadata must be a mapping"]
    one = [name for name in ("license", "library_name", "pipeline_tag") if not isinstance(metadata.get(name, ""), str)]
    lists = {name: metadata.get(name, []) for name in ("tags", "language", "datasets", "base_model")}
    # `language: no` is the classic: YAML reads it as False.
    many = [n for n, value in lists.items() if any(not isinstance(v, str) for v in as_list(value))]
    return [f'"{name}" must be a string' for name in one + many]


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def create_repo(hub: "Hub", request: Request) -> Answer:
    wish = request.body.json()
    hub.may_write(request)
    name = f"{wish.get('organization') or hub.user}/{wish['name']}"
    url = f"{hub.endpoint}/{name}"
    private = wish.get("visibility") == "private" or bool(wish.get("private"))
    if request.fault and request.fault.kind == "wrong_visibility":
        private = not private
    with hub.lock:
        if name in hub.repos:
            return as_json({"error": "You already created this model repo", "url": url}, 409)
        hub.repos[name] = Repo(name, private)
    return as_json({"url": url, "name": name, "id": name})


def delete_repo(hub: "Hub", request: Request) -> Answer:
    wish = request.body.json()
    name = f"{wish.get('organization') or hub.user}/{wish['name']}"
    hub.open(request, name, write=True)
    del hub.repos[name]
    return as_json({})


def change_settings(hub: "Hub", request: Request, name: str) -> Answer:
    repo, wish = hub.open(request, name, write=True), request.body.json()
    repo.private = wish.get("visibility", "private" if repo.private else "public") == "private"
    return as_json({"visibility": "private" if repo.private else "public"})


def repo_info(hub: "Hub", request: Request, name: str, revision: str = "main") -> Answer:
    repo = hub.open(request, name)
    commit, first = repo.find(revision), repo.history("main")[-1]
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.tree)]
    if request.query.get("blobs"):
        for sibling in siblings:
            listed = listing(hub, repo, commit, sibling["rfilename"])
            lfs = {"sha256": listed["lfs"]["oid"], **listed["lfs"]} if "lfs" in listed else None
            sibling |= {"blobId": listed["oid"], "size": listed["size"], **({"lfs": lfs} if lfs else {})}
    return as_json(
        {
            "_id": name,
            "id": name,
            "modelId": name,
            "author": name.partition("/")[0],
            "sha": commit.oid,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "createdAt": first.date,
            "lastModified": commit.date,
            "siblings": siblings,
            "usedStorage": sum(repo.objects.values()),
        }
    )


# Names of commits


def list_refs(hub: "Hub", request: Request, name: str) -> Answer:
    repo = hub.open(request, name)

    def refs(kind: str, named: dict[str, str]) -> list[dict[str, str]]:
        return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": oid} for n, oid in sorted(named.items())]

    with hub.lock:
        branches, tags = refs("heads", repo.branches), refs("tags", repo.tags)
    return as_json({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})


def create_branch(hub: "Hub", request: Request, name: str, branch: str) -> Answer:
    repo, wish = hub.open(request, name, write=True), request.body.json()
    with hub.lock:
        if branch in repo.branches:
            raise Refused(409, f"Reference already exists: refs/heads/{branch}")
        repo.branches[branch] = repo.find(wish.get("startingPoint") or "main").oid
    return as_json({})


def delete_branch(hub: "Hub", request: Request, name: str, branch: str) -> Answer:
    repo = hub.open(request, name, write=True)
    if branch == "main":
        raise Refused(403, "The main branch cannot be deleted")
    with hub.lock:
        if repo.branches.pop(branch, None) is None:
            raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
    return as_json({})


def create_tag(hub: "Hub", request: Request, name: str, revision: str) -> Answer:
    repo, tag = hub.open(request, name, write=True), request.body.json()["tag"]
    with hub.lock:
        commit = repo.find(revision)
        if tag in repo.tags:
            raise Refused(409, f"Tag reference exists already: refs/tags/{tag}")
        repo.tags[tag] = commit.oid
    return as_json({})


def delete_tag(hub: "Hub", request: Request, name: str, tag: str) -> Answer:
    repo = hub.open(request, name, write=True)
    with hub.lock:
        if repo.tags.pop(tag, None) is None:
            raise Refused(404, f"Invalid rev id: {tag}", "RevisionNotFound")
    return as_json({})


def squash(hub: "Hub", request: Request, name: str, branch: str) -> Answer:
    """One commit without a parent in place of a branch's history; tags keep theirs."""
    repo, message = hub.open(request, name, write=True), request.body.json()["message"]
    with hub.lock:
        if branch not in repo.branches:
            repo.find(branch)  # a revision that does not exist has an answer of its own
            raise Refused(400, f"Invalid reference for a branch: {branch}")
        repo.commit(branch, message, "", repo.find(branch).tree, orphan=True)
    return as_json({})


# Control from outside the process


def set_faults(hub: "Hub", request: Request) -> Answer:
    """{clear, add: [fields of a Fault], every_nth: {n, kinds, seed, exclude}, set: {a setting of the Hub: value}}."""
    wish = request.body.json()
    if wish.get("clear"):
        hub.faults.clear()
    try:
        for fault in wish.get("add", []):
            hub.faults.add(**fault)
        if "every_nth" in wish:
            hub.faults.every_nth(**wish["every_nth"])
    except (TypeError, ValueError) as error:
        raise Refused(400, str(error)) from error
    for name, value in wish.get("set", {}).items():
        if name not in SETTINGS:
            raise Refused(400, f"{name!r} is not a setting; use one of {', '.join(SETTINGS)}")
        setattr(hub, name, value)
    return as_json({})


SETTINGS = (
    "tokens",  # {token: "read" or "write"}
    "lfs_above_bytes",
    "multipart_above_bytes",
    "part_bytes",
    "page_size",
    "commit_quota",
    "quota_window_s",
    "empty_commits",
)


def tell_state(hub: "Hub", request: Request) -> Answer:
    return as_json(hub.state())


# Paths stay quoted until they have been taken apart, so that a branch may have a slash in its name.
NAME, REST = "([^/]+/[^/]+)", "([^/]+)"
API = f"/api/models/{NAME}"
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/validate-yaml", validate_yaml),
    ("POST", "/api/repos/create", create_repo),
    ("DELETE", "/api/repos/delete", delete_repo),
    ("PUT", f"{API}/settings", change_settings),
    ("GET", f"{API}/refs", list_refs),
    ("POST", f"{API}/branch/{REST}", create_branch),
    ("DELETE", f"{API}/branch/{REST}", delete_branch),
    ("POST", f"{API}/tag/{REST}", create_tag),
    ("DELETE", f"{API}/tag/{REST}", delete_tag),
    ("POST", f"{API}/super-squash/{REST}", squash),
    ("POST", f"{API}/preupload/{REST}", preupload),
    ("POST", f"/{NAME}\\.git/info/lfs/objects/batch", lfs_batch),
    ("POST", f"/{NAME}\\.git/info/lfs/objects/verify", verify_object),
    ("PUT", f"{STORAGE}{REST}/{REST}", put_part),
    ("PUT", f"{STORAGE}{REST}/{REST}/(\\d+)", put_part),
    ("POST", f"{STORAGE}{REST}/{REST}/complete", complete_upload),
    ("POST", f"{API}/commit/{REST}", commit),
    ("GET", f"{API}/tree/{REST}", list_tree),
    ("GET", f"{API}/tree/{REST}/(.+)", list_tree),
    ("POST", f"{API}/paths-info/{REST}", paths_info),
    ("GET", f"{API}/commits/{REST}", list_commits),
    ("GET", API, repo_info),
    ("GET", f"{API}/revision/{REST}", repo_info),
    ("GET HEAD", f"/{NAME}/resolve/{REST}/(.+)", resolve),
]
CONTROLS: list[tuple[str, str, Callable[..., Answer]]] = [
    ("POST", f"{CONTROL}faults", set_faults),
    ("GET", f"{CONTROL}state", tell_state),
]
