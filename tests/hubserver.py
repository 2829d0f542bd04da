"""Look-alike of the Hub of Hugging Face on this machine, which `huggingface_hub` talks to.

It knows repositories with commits, branches, private ones, files in commits and beside them (LFS).
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_" + "t" * 30


@dataclass
class Repository:
    """Files of each commit, and the commit of each branch."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Mapping[str, bytes]) -> str:
        """Add files to a branch; the name of the commit."""
        content = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        name = hashlib.sha1(repr((len(self.commits), sorted(content))).encode()).hexdigest()
        self.commits[name] = content
        self.branches[branch] = name
        return name

    def find(self, revision: str) -> str | None:
        """Commit of a branch or commit, or None."""
        name = self.branches.get(revision, revision)
        return name if name in self.commits else None


@dataclass
class Hub:
    """What the server holds and was asked for."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    """By type and name, such as models/me/photos."""
    stored: dict[str, bytes] = field(default_factory=dict)
    """Files beside commits, by their digest."""
    asked: list[str] = field(default_factory=list)

    def files(self, name: str, branch: str = "main", kind: str = "models") -> dict[str, bytes]:
        """Files of a repository."""
        repository = self.repositories[f"{kind}/{name}"]
        return repository.commits[repository.branches[branch]]

    def add(self, name: str, files: Mapping[str, bytes], kind: str = "models") -> Repository:
        """Add a repository with files."""
        made = self.repositories.setdefault(f"{kind}/{name}", Repository())
        made.commit("main", files)
        return made


class Handler(BaseHTTPRequestHandler):
    """Answers of the hub."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *_: object) -> None:
        pass

    def answer(self, content: object, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def do(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.asked.append(f"{self.command} {path}")
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        may_write = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path.startswith("lfs/"):
            self.hub.stored[path.removeprefix("lfs/")] = body
            self.answer(b"")
        elif path == "api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path == "api/repos/create":
            self.create(json.loads(body), may_write)
        elif match := re.fullmatch(r"([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            asked = json.loads(body)["objects"]
            upload = {"upload": {"href": f"{self.hub.address}/lfs/{{}}"}}
            objects = [
                {**o, "actions": json.loads(json.dumps(upload).replace("{}", o["oid"]))}
                for o in asked
            ]
            self.answer({"objects": objects, "transfer": "basic"})
        elif match := re.fullmatch(r"api/(models|datasets)/([^/]+/[^/]+)/(\w+)/(.*)", path):
            kind, name, action, revision = match.groups()
            self.of_repository(f"{kind}/{name}", action, revision, body, may_write)
        elif match := re.fullmatch(r"(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path):
            folder, name, revision, file = match.groups()
            self.file(f"{folder or 'models/'}{name}", revision, file, may_write)
        else:
            self.refuse(404, "EntryNotFound")

    do_GET = do_POST = do_PUT = do_HEAD = do

    def create(self, asked: Mapping[str, str], may_write: bool) -> None:
        name = f"models/{asked['organization']}/{asked['name']}"
        if not may_write:
            self.refuse(401, "Unauthorized")
        elif name in self.hub.repositories:
            self.answer({"error": "it exists", "url": f"{self.hub.address}/{name[7:]}"}, 409)
        else:
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.hub.repositories[name] = Repository(private)
            self.hub.repositories[name].commit("main", {})
            self.answer({"url": f"{self.hub.address}/{name[7:]}"})

    def of_repository(
        self, name: str, action: str, revision: str, body: bytes, may_write: bool
    ) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not may_write):
            self.refuse(404 if may_write else 401, "RepoNotFound")
        elif action == "branch":
            repository.branches[revision] = repository.branches["main"]
            self.answer({})
        elif action == "preupload":
            modes = [
                {"path": f["path"], "shouldIgnore": False,
                 "uploadMode": "regular" if f["path"].endswith((".json", ".md")) else "lfs"}
                for f in json.loads(body)["files"]
            ]  # fmt: skip
            self.answer({"files": modes})
        elif action == "commit":
            files = {}
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.hub.stored[value["oid"]]
            commit = repository.commit(revision, files)
            self.answer({"commitUrl": f"{self.hub.address}/{name}/commit/{commit}",
                         "commitOid": commit})  # fmt: skip
        elif (commit := repository.find(revision.split("/")[0])) is None:
            self.refuse(404, "RevisionNotFound")
        elif action == "revision":
            siblings = [{"rfilename": path} for path in repository.commits[commit]]
            facts = {"id": name.split("/", 1)[1], "sha": commit, "siblings": siblings}
            self.answer({**facts, "private": repository.private, "tags": [], "downloads": 0})
        else:
            files = repository.commits[commit]
            self.answer(
                [{"type": "file", "path": path, "size": len(data), "oid": tag(data)}
                 for path, data in files.items()]
            )  # fmt: skip

    def file(self, name: str, revision: str, path: str, may_write: bool) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not may_write):
            self.refuse(401, "RepoNotFound")
        elif (commit := repository.find(revision)) is None:
            self.refuse(404, "RevisionNotFound")
        elif path not in repository.commits[commit]:
            self.refuse(404, "EntryNotFound")
        else:
            data = repository.commits[commit][path]
            self.answer(data, ETag=f'"{tag(data)}"', X_Repo_Commit=commit)


def tag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers on this machine."""
    hub = Hub()
    handler = type("Own", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def looking_at(address: str, cache: Path, *, token: bool = True) -> Iterator[pytest.MonkeyPatch]:
    """`huggingface_hub` of this process talks to an address, with a cache and a token."""
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", address)
        patch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "none"))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.delenv("HF_TOKEN", raising=False)
        if token:
            patch.setenv("HF_TOKEN", TOKEN)
        yield patch
