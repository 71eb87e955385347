"""What the Hub on loopback answers, route by route; `local_hub` has the server."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from urllib.parse import parse_qs

import yaml

LARGE = (".safetensors", ".bin", ".pt", ".png", ".jpg")  # a new repository's .gitattributes, the part we meet
PART_SIZE = 64 * 1024  # larger files are uploaded in parts of this size


@dataclass
class Blob:
    content: bytes
    large: bool

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


@dataclass
class Repository:
    private: bool = False
    sdk: str | None = None
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, Blob], message: str) -> str:
        parent = self.branches.get(branch, "")
        listing = "".join(f"{path}:{blob.git_oid}\n" for path, blob in sorted(files.items()))
        oid = hashlib.sha1(f"{parent}\n{message}\n{listing}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch or a commit's name stands for."""
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        self.status, self.message = status, message
        self.headers = {**({"X-Error-Code": code} if code else {}), "X-Error-Message": message, **(headers or {})}


# (method, expression, name of the handler's method)
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/(?P<kind>model|dataset|space)s/(?P<id>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", r"/api/(?P<kind>model|dataset|space)s/(?P<id>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", r"/api/(?P<kind>model|dataset|space)s/(?P<id>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)", "branch"),
    ("GET", r"/api/(?P<kind>model|dataset|space)s/(?P<id>[^/]+/[^/]+)/refs", "refs"),
    (
        "GET",
        r"/api/(?P<kind>model|dataset|space)s/(?P<id>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<path>.*))?",
        "tree",
    ),
    ("POST", r"/api/(?P<kind>model|dataset|space)s/(?P<id>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("GET", r"/api/(?P<kind>model|dataset|space)s/(?P<id>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "info"),
    ("POST", r"/((?P<kind>dataset|space)s/)?(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)", "lfs_put"),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/complete", "lfs_complete"),
    ("POST", r"/lfs/verify", "lfs_verify"),
    ("GET", r"/cdn/(?P<oid>[0-9a-f]{64})", "cdn"),
    ("GET", r"/((?P<kind>dataset|space)s/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class Routes:
    """The routes, for a request handler that has the hub, the body and the query of a request at hand."""

    # Who asks, and for what

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def _writer(self, repo_id: str) -> None:
        user = self._user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if repo_id.split("/")[0] != user:
            raise Refused(403, f"You don't have the rights to write under the namespace {repo_id.split('/')[0]!r}")

    def _repository(self, kind: str | None, repo_id: str, write: bool = False) -> Repository:
        if write:
            self._writer(repo_id)
        user = self._user()
        repository = self.hub.repositories.get((kind or "model", repo_id))
        if repository is None or (repository.private and user != repo_id.split("/")[0]):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        return repository

    def _commit_of(self, repository: Repository, revision: str | None) -> str:
        oid = repository.resolve(revision or "main")
        if oid is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    # Routes: (status, body, headers)

    @staticmethod
    def _ok(content, status: int = 200) -> tuple[int, bytes, dict[str, str]]:
        return status, json.dumps(content).encode(), {"Content-Type": "application/json"}

    def _whoami(self):
        user = self._user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        return self._ok({"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def _validate_yaml(self):
        text = json.loads(self.body)["content"]
        block = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        try:
            if block is None or not isinstance(yaml.safe_load(block[1]), dict):
                return self._ok({"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})
        except yaml.YAMLError as error:
            return self._ok({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return self._ok({"errors": [], "warnings": []})

    def _create(self):
        wish = json.loads(self.body)
        kind, user = wish.get("type") or "model", wish.get("organization") or self._user()
        repo_id = f"{user}/{wish['name']}"
        self._writer(repo_id)
        url = self.hub.url + ("" if kind == "model" else f"/{kind}s") + f"/{repo_id}"
        if (kind, repo_id) in self.hub.repositories:
            return self._ok({"error": "You already created this repo", "url": url}, 409)
        repository = Repository(private=wish.get("visibility") == "private", sdk=wish.get("sdk"))
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE)
        repository.commit("main", {".gitattributes": Blob(attributes.encode(), False)}, "initial commit")
        self.hub.repositories[kind, repo_id] = repository
        return self._ok({"url": url, "name": repo_id, "id": repo_id})

    def _branch(self, kind, id, revision):
        repository = self._repository(kind, id, write=True)
        if revision in repository.branches:
            return self._ok({"error": "Reference already exists"}, 409)
        start = json.loads(self.body or b"{}").get("startingPoint")
        repository.branches[revision] = self._commit_of(repository, start)
        return self._ok({})

    def _refs(self, kind, id):
        repository = self._repository(kind, id)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in repository.branches.items()
        ]
        return self._ok({"branches": branches, "converts": [], "tags": []})

    def _preupload(self, kind, id, revision):
        repository = self._repository(kind, id, write=True)
        present = repository.commits[self._commit_of(repository, revision)]
        files = []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith(LARGE) or file["size"] > 10_000_000
            blob = present.get(file["path"])
            oid = None if blob is None else (blob.sha256 if blob.large else blob.git_oid)
            files.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False,
                          **({"oid": oid} if oid else {})})  # fmt: skip
        return self._ok({"files": files})

    def _lfs_batch(self, id, kind=None):
        self._repository(kind, id, write=True)
        objects = []
        for wish in json.loads(self.body)["objects"]:
            oid, size = wish["oid"], wish["size"]
            entry = {"oid": oid, "size": size}
            if oid not in self.hub.large:
                href, header = f"{self.hub.url}/lfs/{oid}", {}
                if size > PART_SIZE:
                    count = -(-size // PART_SIZE)
                    header = {"chunk_size": str(PART_SIZE)} | {str(n + 1): f"{href}/{n + 1}" for n in range(count)}
                    href += "/complete"
                entry["actions"] = {
                    "upload": {"href": href, "header": header},
                    "verify": {"href": f"{self.hub.url}/lfs/verify"},
                }
            objects.append(entry)
        return self._ok({"transfer": "multipart", "objects": objects})

    def _store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, "the content does not have the announced sha256")
        self.hub.large[oid] = content

    def _lfs_put(self, oid, part=None):
        if part is None:
            self._store(oid, self.body)
        else:
            self.hub.parts.setdefault(oid, {})[int(part)] = self.body
        return 200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'}

    def _lfs_complete(self, oid):
        parts = self.hub.parts.pop(oid, {})
        told = json.loads(self.body)["parts"]
        if [entry["etag"].strip('"') for entry in told] != [
            hashlib.md5(parts[entry["partNumber"]]).hexdigest() for entry in told
        ]:
            raise Refused(400, "the parts are not those that were uploaded")
        self._store(oid, b"".join(parts[number] for number in sorted(parts)))
        return self._ok({})

    def _lfs_verify(self):
        wish = json.loads(self.body)
        if len(self.hub.large.get(wish["oid"], b"")) != wish["size"]:
            raise Refused(404, "no such object")
        return self._ok({})

    def _commit(self, kind, id, revision):
        repository = self._repository(kind, id, write=True)
        if revision not in repository.branches:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files = dict(repository.commits[repository.branches[revision]])
        summary = ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                summary = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"], validate=True), False)
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise Refused(400, f"{value['path']}: its content was not uploaded")
                files[value["path"]] = Blob(self.hub.large[value["oid"]], True)
            elif entry["key"] == "deletedFile":
                files.pop(value["path"])
            else:
                raise Refused(400, f"unknown operation {entry['key']}")
        oid = repository.commit(revision, files, summary)
        return self._ok({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{id}/commit/{oid}"})

    @staticmethod
    def _entry(path: str, blob: Blob) -> dict:
        entry = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.git_oid}
        if blob.large:
            entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 130}
        return entry

    def _tree(self, kind, id, revision, path=None):
        repository = self._repository(kind, id)
        files = repository.commits[self._commit_of(repository, revision)]
        prefix = f"{path}/" if path else ""
        inside = {name: blob for name, blob in files.items() if name.startswith(prefix)}
        if path and not inside:
            raise Refused(404, f"{path} does not exist on {revision}", "EntryNotFound")
        deep = self.query.get("recursive", ["false"])[0].lower() == "true"
        entries = [
            self._entry(name, blob) for name, blob in sorted(inside.items()) if deep or "/" not in name[len(prefix) :]
        ]
        folders = sorted({prefix + name[len(prefix) :].split("/")[0] for name in inside if "/" in name[len(prefix) :]})
        entries += [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in folders]
        return self._ok(entries)

    def _paths_info(self, kind, id, revision):
        repository = self._repository(kind, id)
        files = repository.commits[self._commit_of(repository, revision)]
        asked = parse_qs(self.body.decode()).get("paths", [])
        return self._ok([self._entry(path, files[path]) for path in asked if path in files])

    def _info(self, kind, id, revision=None):
        repository = self._repository(kind, id)
        oid = self._commit_of(repository, revision)
        files = repository.commits[oid]
        card = files.get("README.md")
        block = card and re.match(r"---\n(.*?)\n---", card.content.decode(), re.DOTALL)
        data = (yaml.safe_load(block[1]) if block else None) or {}
        return self._ok(
            {
                "_id": oid[:24], "id": id, "modelId": id, "author": id.split("/")[0], "sha": oid,
                "private": repository.private, "disabled": False, "gated": False, "downloads": 0, "likes": 0,
                "tags": data.get("tags", []), "pipeline_tag": data.get("pipeline_tag"),
                "library_name": data.get("library_name"), "cardData": data,
                "siblings": [{"rfilename": path} for path in sorted(files)],
                **({"sdk": repository.sdk} if kind == "space" else {}),
            }
        )  # fmt: skip

    def _resolve(self, id, revision, path, kind=None):
        repository = self._repository(kind, id)
        oid = self._commit_of(repository, revision)
        blob = repository.commits[oid].get(path)
        if blob is None:
            raise Refused(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": oid})
        common = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if blob.large:
            common |= {"X-Linked-Size": str(len(blob.content)), "X-Linked-Etag": f'"{blob.sha256}"'}
            return 302, b"", {**common, "Location": f"{self.hub.cdn}/cdn/{blob.sha256}"}
        return self._ranged(blob.content, {**common, "ETag": f'"{blob.git_oid}"'})

    def _cdn(self, oid):
        if self.headers.get("Authorization"):
            self.hub.leaks.append(self.headers["Authorization"])
        if self.command == "GET":
            self.hub.ranges.append(self.headers.get("Range"))
        return self._ranged(self.hub.large[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _ranged(self, content: bytes, headers: dict[str, str]):
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            return 200, content, {**headers, "Content-Length": str(len(content))}
        start, end = int(span[1]), min(int(span[2] or len(content) - 1), len(content) - 1)
        part = content[start : end + 1]
        place = f"bytes {start}-{end}/{len(content)}"
        return 206, part, {**headers, "Content-Range": place, "Content-Length": str(len(part))}
