"""The few routes of the Hugging Face Hub that push, fetch and data sets need, on a port of this machine."""

from __future__ import annotations

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

from local_server import LocalServer


class HubServer(LocalServer):
    """Repositories in memory. Every commit is kept; `refused` answers 403 to whoever writes; `token` is asked for.

    Files whose name ends in `large` go over the LFS protocol: batch -> PUT -> verify -> `lfsFile` lines in the commit.
    Data sets, "datasets/org/name", are read only, in whole or by ranges of bytes.
    """

    def __init__(self, *, large: tuple[str, ...] = ()) -> None:
        self.large = large
        self.objects: dict[str, bytes] = {}  # of LFS, by SHA-256
        self.verified: set[str] = set()
        self.lfs_calls: list[str] = []  # "batch", "PUT oid", "verify oid"
        self.commits: dict[str, dict[str, bytes]] = {}  # "org/name@commit" -> content
        self.branches: dict[str, str] = {}  # "org/name@branch" -> commit
        self.token: str | None = None
        self.refused = False
        self.downloads: list[str] = []
        super().__init__(self._handler())

    def commit_of(self, repository: str, revision: str) -> str | None:
        if f"{repository}@{revision}" in self.commits:
            return revision
        return self.branches.get(f"{repository}@{revision}")

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        return self.commits[f"{repository}@{self.commit_of(repository, revision)}"]

    def hold_dataset(self, name: str, content: dict[str, bytes]) -> None:
        self._keep(f"datasets/{name}", "main", content)

    def _commit(self, repository: str, branch: str, body: bytes) -> str:
        content = dict(self.files(repository, branch))
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                assert line["value"]["encoding"] == "base64"
                content[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            if line["key"] == "lfsFile":
                value = line["value"]
                assert value["algo"] == "sha256" and value["oid"] in self.verified, "a commit of what was not uploaded"
                assert value["size"] == len(self.objects[value["oid"]])
                content[value["path"]] = self.objects[value["oid"]]
        return self._keep(repository, branch, content)

    def _keep(self, repository: str, branch: str, content: dict[str, bytes]) -> str:
        said = json.dumps({name: hashlib.sha1(data).hexdigest() for name, data in content.items()}, sort_keys=True)
        commit = hashlib.sha1(said.encode()).hexdigest()
        self.commits[f"{repository}@{commit}"] = content
        self.branches[f"{repository}@{branch}"] = commit
        return commit

    def _post(self, path: str, body: bytes) -> tuple[int, object]:
        parts = path.strip("/").split("/")
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            tree = json.loads(body)
            name = f"{tree['organization']}/{tree['name']}" if tree.get("organization") else tree["name"]
            if f"{name}@main" in self.branches:
                return 409, {"error": "exists", "url": f"{self.url}/{name}"}
            self._keep(name, "main", {})
            return 200, {"url": f"{self.url}/{name}", "id": name, "name": name}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, self._batch(json.loads(body))
        if parts[0] == "lfs-verify":
            asked = json.loads(body)
            self.lfs_calls.append(f"verify {asked['oid']}")
            if len(self.objects.get(asked["oid"], b"")) != asked["size"]:
                return 404, {"error": "EntryNotFound"}
            self.verified.add(asked["oid"])
            return 200, {}
        if parts[:2] == ["api", "datasets"] and parts[4] == "paths-info":
            content = self.files(f"datasets/{'/'.join(parts[2:4])}", unquote(parts[5]))
            found = _entries(content, "", recursive=True)
            return 200, [entry for entry in found if entry["path"] in parse_qs(body.decode())["paths"]]
        assert parts[:2] == ["api", "models"], path
        repository, what, branch = "/".join(parts[2:4]), parts[4], unquote(parts[5])
        if what == "branch":
            self.branches.setdefault(f"{repository}@{branch}", self.branches[f"{repository}@main"])
            return 200, {}
        if what == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(self.large or "/") else "regular" for name in names}
            return 200, {"files": [{"path": x, "uploadMode": modes[x], "shouldIgnore": False} for x in names]}
        assert what == "commit", path
        commit = self._commit(repository, branch, body)
        url = f"{self.url}/{repository}/commit/{commit}"
        return 200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": "", "pullRequestUrl": None}

    def _batch(self, asked: dict) -> dict[str, object]:
        """What has to be uploaded, and where; nothing for what is here already."""
        assert asked["operation"] == "upload" and "basic" in asked["transfers"]
        self.lfs_calls.append("batch")
        found = []
        for one in asked["objects"]:
            actions = {name: {"href": f"{self.url}/lfs-{name}/{one['oid']}"} for name in ("upload", "verify")}
            found.append(one if one["oid"] in self.verified else one | {"actions": actions})
        return {"transfer": "basic", "objects": found}

    def _put(self, path: str, body: bytes) -> tuple[int, object]:
        oid = path.strip("/").split("/")[1]
        self.lfs_calls.append(f"PUT {oid}")
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "other content than its name says"}
        self.objects[oid] = body
        return 200, {}

    def _get(self, path: str, query: str = "") -> tuple[int, object, str]:
        """Status, content, commit."""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        api = parts[0] == "api"
        kind = parts[1] if api else "datasets" if parts[0] == "datasets" else "models"
        rest = parts[2:] if api else parts[1:] if kind == "datasets" else parts
        repository, rest = "/".join(["datasets"] * (kind == "datasets") + rest[:2]), rest[2:]
        if f"{repository}@main" not in self.branches:
            return 404, {"error": "RepoNotFound"}, ""
        commit = self.commit_of(repository, rest[1] if len(rest) > 1 else "main")
        if commit is None:
            return 404, {"error": "RevisionNotFound"}, ""
        content = self.files(repository, commit)
        if api and rest and rest[0] == "tree":
            recursive = parse_qs(query).get("recursive", ["true"])[0].lower() == "true"
            found = _entries(content, "/".join(rest[2:]), recursive=recursive)
            return (200, found, commit) if found or len(rest) < 3 else (404, {"error": "EntryNotFound"}, commit)
        if api and rest and rest[0].startswith("xet-"):
            return 404, {"error": "there is no Xet storage here"}, commit
        if api:
            siblings = [{"rfilename": name} for name in content]
            return 200, {"id": repository, "modelId": repository, "sha": commit, "siblings": siblings}, commit
        name = "/".join(rest[2:])
        if name not in content:
            return 404, {"error": "EntryNotFound"}, commit
        self.downloads.append(name)
        return 200, content[name], commit

    def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:  # noqa: C901, N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                if not self._allowed():
                    return self._send(401, {"error": "who are you?"})
                asked = urlsplit(self.path)
                status, content, commit = hub._get(asked.path, asked.query)
                if isinstance(content, bytes) and (wanted := self.headers.get("Range")):
                    first, _, last = wanted.removeprefix("bytes=").partition("-")
                    status, content = 206, content[int(first) : int(last) + 1 if last else None]
                return self._send(status, content, commit)

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_POST(self) -> None:
                body = self._body()
                if not self._allowed():
                    return self._send(401, {"error": "who are you?"})
                if hub.refused:
                    return self._send(403, {"error": "you may not write here"})
                return self._send(*hub._post(urlsplit(self.path).path, body))

            def do_PUT(self) -> None:
                return self._send(*hub._put(urlsplit(self.path).path, self._body()))

            def _allowed(self) -> bool:
                return hub.token is None or self.headers.get("Authorization") == f"Bearer {hub.token}"

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            def _send(self, status: int, content: object, commit: str = "") -> None:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                if isinstance(content, bytes):
                    self.send_header("ETag", f'"{_blob(content)}"')
                    oid = hashlib.sha256(content).hexdigest()
                    if oid in hub.verified:
                        self.send_header("X-Linked-Etag", f'"{oid}"')
                        self.send_header("X-Linked-Size", str(len(content)))
                else:
                    self.send_header("Content-Type", "application/json")
                    if isinstance(content, dict) and "error" in content:
                        self.send_header("X-Error-Code", content["error"])
                if commit:
                    self.send_header("X-Repo-Commit", commit)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entries(content: dict[str, bytes], folder: str, *, recursive: bool) -> list[dict[str, object]]:
    """Files and folders below `folder`."""
    start = f"{folder}/" if folder else ""
    found: dict[str, dict[str, object]] = {}
    for name, data in content.items():
        if not name.startswith(start):
            continue
        steps = name.removeprefix(start).split("/")
        for depth in range(1, len(steps)):
            inner = start + "/".join(steps[:depth])
            found[inner] = {"type": "directory", "path": inner, "size": 0, "oid": _blob(inner.encode())}
        found[name] = _entry(name, data)
    return [entry for path, entry in found.items() if recursive or "/" not in path.removeprefix(start)]


def _entry(name: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(data), "oid": _blob(data)}
