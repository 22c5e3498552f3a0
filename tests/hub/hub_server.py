"""
A small Hugging Face Hub on the loopback interface, for the real client to talk to.

It answers what `huggingface_hub`, `diffusers` and `datasets` ask for, as they ask for it, and keeps repositories in
memory: accounts with read or write tokens, private repositories, commits that never change, branches, files in git
and in LFS, the latter on a content host that wants no token. With `offer_xet` their content goes through hf_xet, into
a folder that it takes for the storage service (`local://`); without it, set `HF_HUB_DISABLE_XET=1`.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import datasets.config
import hf_xet
import pytest
import yaml
from huggingface_hub import constants, hf_api


LFS_SUFFIXES = (".safetensors", ".parquet", ".arrow", ".png", ".mp4", ".bin")
WRITER, READER, STRANGER = "hf_writer", "hf_reader", "hf_stranger"
ACCOUNTS = {WRITER: ("user", "write"), READER: ("user", "read"), STRANGER: ("other", "write")}
KINDS = "models|datasets"


@dataclass
class File:
    """Content of one file of a commit."""

    content: bytes
    lfs: bool
    xet_hash: str | None = None

    @property
    def oid(self) -> str:
        blob = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def entry(self, path: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": self.oid, "size": len(self.content)}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return entry


@dataclass
class Repo:
    """A repository: its commits by hash, its branches, the messages of all commits in order."""

    repo_id: str
    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, message: str, files: dict[str, File]) -> str:
        content = repr((self.repo_id, len(self.messages), message, sorted((p, f.oid) for p, f in files.items())))
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class Fault:
    """What to do with requests instead of answering them; `status` 0 closes the connection."""

    method: str
    path: str
    status: int
    message: str
    after_bytes: int
    times: int


class Refusal(Exception):  # noqa: N818
    """An answer other than success."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


class HubServer(ThreadingHTTPServer):
    """The Hub's state. `requests` lists all that was asked, as `(method, path, account)`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        # Another host, as for the Hub: the client must not send its token there.
        self.content_url = f"http://localhost:{self.server_port}"
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str | None]] = []
        self.xet_url: str | None = None
        self.lock = threading.Lock()
        self.gate = threading.Event()
        self.gate.set()

    def offer_xet(self, url: str) -> None:
        """Have clients send large files to this storage service, `local://` and an absolute path for a folder."""
        self.xet_url = url

    def read_xet(self, sha256: str) -> File:
        """A file that a client has put into the folder of the storage service, told by the hash of its content."""
        assert self.xet_url is not None
        folder = Path(self.xet_url.removeprefix("local://"))
        xet_hash, size = next(found for path in folder.rglob("*.mdb") for found in read_shard(path, sha256))
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "file"
            expiry = {"token": "x", "token_expiry_unix_secs": int(time.time()) + 3600}
            group = hf_xet.XetSession().new_file_download_group(endpoint=self.xet_url, **expiry)
            group.start_download_file(hf_xet.XetFileInfo(xet_hash, size), str(path))
            group.wait_to_finish()
            file = File(path.read_bytes(), lfs=True, xet_hash=xet_hash)
        assert (file.sha256, len(file.content)) == (sha256, size)
        return file

    def files(self, repo_id: str, kind: str = "models", branch: str = "main") -> dict[str, bytes]:
        """Files of a branch, by path, without the ones that the Hub itself adds."""
        repo = self.repos[kind, repo_id]
        files = repo.commits[repo.branches[branch]]
        return {path: file.content for path, file in files.items() if path != ".gitattributes"}

    def create(self, repo_id: str, kind: str = "models", *, private: bool = False) -> Repo:
        """A repository with the first commit that the Hub makes."""
        repo = self.repos[kind, repo_id] = Repo(repo_id, private)
        repo.commit("main", "initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n", lfs=False)})
        return repo

    def fail(self, method: str, path: str, status: int, message: str = "", *, times: int = 1000) -> None:
        """Answer the next requests of this method, whose path matches the expression, with an error."""
        self.faults.append(Fault(method, path, status, message, 0, times))

    def drop(self, method: str, path: str, *, after_bytes: int = 0, times: int = 1000) -> None:
        """Close the connection on the next matching requests, after some bytes of the answer's body."""
        self.faults.append(Fault(method, path, 0, "", after_bytes, times))

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away in the middle are none of a test's business."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format: str, *args: Any) -> None:
        """The server's `requests` are the log."""

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.path_only = unquote(urlsplit(self.path).path)
        body = self.read_body()
        self.account: tuple[str, str] | None = None
        self.fault = self.server.take_fault(self.command, self.path_only)
        try:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            self.account = ACCOUNTS.get(token)
            self.server.requests.append((self.command, self.path_only, self.account[0] if self.account else None))
            if self.fault and self.fault.status:
                raise Refusal(self.fault.status, self.fault.message)
            if self.fault and not self.fault.after_bytes:
                self.hang_up()
                return
            if token and self.headers["Host"].startswith("localhost"):
                raise Refusal(400, "the content host wants no token")
            if token and self.account is None:
                raise Refusal(401, "Invalid credentials in Authorization header")
            for pattern, handle in ROUTES:
                match = re.fullmatch(pattern, f"{self.command} {self.path_only}")
                if match:
                    handle(self, body, **match.groupdict())
                    return
            raise Refusal(404, f"no such route: {self.command} {self.path_only}")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self.send_json({"error": refusal.message, **refusal.body}, refusal.status, headers)

    def hang_up(self) -> None:
        # A reset, so that the client does not take the end of the stream for the end of the answer.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def send_bytes(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and not self.fault.status:
            self.wfile.write(content[: self.fault.after_bytes])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(content)

    def send_json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_bytes(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def find(self, kind: str, repo_id: str, *, write: bool = False) -> Repo:
        """The repository, if this account may see it, or change it."""
        repo = self.server.repos.get((kind, repo_id))
        owner = repo_id.split("/")[0]
        mine = self.account is not None and self.account[0] == owner
        if repo is None or (repo.private and not mine):
            raise Refusal(401 if self.account is None else 404, "Repository not found", "RepoNotFound")
        if write and not (mine and self.account is not None and self.account[1] == "write"):
            raise Refusal(403, "Forbidden: you don't have the rights to write to this repository")
        return repo

    def find_commit(self, kind: str, repo_id: str, revision: str | None) -> tuple[Repo, str]:
        repo = self.find(kind, repo_id)
        oid = repo.resolve(revision or "main")
        if oid is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, oid

    def whoami(self, body: bytes) -> None:
        if self.account is None:
            raise Refusal(401, "Invalid username or password.")
        name, role = self.account
        self.send_json({"type": "user", "name": name, "orgs": [], "auth": {"accessToken": {"role": role}}})

    def create(self, body: bytes) -> None:
        if self.account is None:
            raise Refusal(401, "Invalid username or password.")
        request, (name, role) = json.loads(body), self.account
        kind, owner = request.get("type", "model") + "s", request.get("organization") or name
        if owner != name or role != "write":
            raise Refusal(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        repo_id = f"{owner}/{request['name']}"
        url = f"{self.server.url}/{'' if kind == 'models' else kind + '/'}{repo_id}"
        if (kind, repo_id) in self.server.repos:
            raise Refusal(409, "You already created this repo", url=url)
        self.server.create(repo_id, kind, private=request.get("visibility") == "private")
        self.send_json({"url": url, "name": repo_id})

    def auth_check(self, body: bytes, kind: str, repo_id: str, write: str | None) -> None:
        self.find(kind, repo_id, write=write is not None)
        self.send_json({})

    def info(self, body: bytes, kind: str, repo_id: str, revision: str | None = None) -> None:
        repo, oid = self.find_commit(kind, repo_id, revision)
        siblings = [{"rfilename": path} for path in sorted(repo.commits[oid])]
        info = {"_id": "0", "id": repo_id, "private": repo.private, "sha": oid, "siblings": siblings, "tags": []}
        self.send_json({**info, "downloads": 0, "likes": 0, "gated": False, "disabled": False})

    def tree(self, body: bytes, kind: str, repo_id: str, revision: str, folder: str | None) -> None:
        repo, oid = self.find_commit(kind, repo_id, revision)
        prefix, entries = f"{folder}/" if folder else "", {}
        recursive = re.search(r"recursive=(true|1)", self.path, re.IGNORECASE) is not None
        for path, file in sorted(repo.commits[oid].items()):
            if path.startswith(prefix):
                parts = path.removeprefix(prefix).split("/")
                for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                    name = prefix + "/".join(parts[:depth])
                    entries[name] = {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
                if recursive or len(parts) == 1:
                    entries[path] = file.entry(path)
        if prefix and not entries:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        self.send_json(list(entries.values()))

    def paths_info(self, body: bytes, kind: str, repo_id: str, revision: str) -> None:
        repo, oid = self.find_commit(kind, repo_id, revision)
        files, found = repo.commits[oid], []
        for path in json.loads(body)["paths"]:
            if path in files:
                found.append(files[path].entry(path))
            elif any(name.startswith(f"{path}/") for name in files):
                found.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        self.send_json(found)

    def refs(self, body: bytes, kind: str, repo_id: str) -> None:
        repo = self.find(kind, repo_id)
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repo.branches.items()]
        self.send_json({"branches": branches, "converts": [], "tags": []})

    def branch(self, body: bytes, kind: str, repo_id: str, name: str) -> None:
        repo = self.find(kind, repo_id, write=True)
        if name in repo.branches:
            raise Refusal(409, f"Reference already exists: refs/heads/{name}")
        repo.branches[name] = repo.branches["main"]
        self.send_json({})

    def validate_yaml(self, body: bytes) -> None:
        errors, warnings = check_card(json.loads(body)["content"])
        reply = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
        self.send_json(reply, 400 if errors else 200)

    def preupload(self, body: bytes, kind: str, repo_id: str, revision: str) -> None:
        repo = self.find(kind, repo_id, write=True)
        if revision not in repo.branches:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        present, files = repo.commits[repo.branches[revision]], []
        for asked in json.loads(body)["files"]:
            assert len(base64.b64decode(asked["sample"])) == min(512, asked["size"])
            lfs = asked["path"].endswith(LFS_SUFFIXES) or asked["size"] > 10 << 20
            known = present.get(asked["path"])
            entry = {"path": asked["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            files.append({**entry, **({"oid": known.etag} if known else {})})
        self.send_json({"files": files})

    def xet_token(self, body: bytes, kind: str, repo_id: str, right: str, revision: str) -> None:
        self.find(kind, repo_id, write=right == "write")
        if self.server.xet_url is None:
            raise Refusal(404, "this Hub has no Xet storage")
        expiry = int(time.time()) + 3600
        headers = {"Access-Token": "x", "Cas-Url": self.server.xet_url, "Token-Expiration": str(expiry)}
        reply = {"accessToken": "x", "exp": expiry, "casUrl": self.server.xet_url}
        self.send_json(reply, headers={f"X-Xet-{name}": value for name, value in headers.items()})

    def lfs_batch(self, body: bytes, kind: str | None, repo_id: str) -> None:
        self.find(kind or "models", repo_id, write=True)
        objects = []
        for item in json.loads(body)["objects"]:
            upload = {"href": f"{self.server.content_url}/lfs-storage/{item['oid']}"}
            verify = {"href": f"{self.server.url}/lfs-verify"}
            known = item["oid"] in self.server.objects
            objects.append({**item, **({} if known else {"actions": {"upload": upload, "verify": verify}})})
        self.send_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str) -> None:
        self.server.gate.wait(60)
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "content does not match its hash")
        self.server.objects[oid] = body
        self.send_bytes(b"")

    def lfs_verify(self, body: bytes) -> None:
        item = json.loads(body)
        if len(self.server.objects.get(item["oid"], b"")) != item["size"]:
            raise Refusal(404, "object not found")
        self.send_json({})

    def commit(self, body: bytes, kind: str, repo_id: str, revision: str) -> None:
        repo = self.find(kind, repo_id, write=True)
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, repo.branches[revision]):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[repo.branches[revision]])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif line["key"] == "lfsFile":
                known = self.server.objects.get(value["oid"])
                file = self.server.read_xet(value["oid"]) if known is None else File(known, lfs=True)
                assert len(file.content) == value["size"]
                self.server.objects[value["oid"]] = file.content
                files[value["path"]] = file
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = repo.commit(revision, header["summary"], files)
        self.send_json({"commitUrl": f"{self.server.url}/{repo_id}/commit/{oid}", "commitOid": oid})

    def resolve(self, body: bytes, kind: str | None, repo_id: str, revision: str, path: str) -> None:
        repo, oid = self.find_commit(kind or "models", repo_id, revision)
        file = repo.commits[oid].get(path)
        if file is None:
            raise Refusal(404, f"{path} does not exist", "EntryNotFound")
        headers = {"X-Repo-Commit": oid, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
            headers["Location"] = f"{self.server.content_url}/content-host/{file.sha256}"
            if file.xet_hash is not None:
                route = f"{self.server.url}/api/{kind or 'models'}/{repo_id}/xet-read-token/{oid}"
                headers |= {"X-Xet-Hash": file.xet_hash, "X-Xet-Refresh-Route": route}
            self.send_bytes(b"", 302, headers)
            return
        self.send_range(file.content, headers)

    def content(self, body: bytes, oid: str) -> None:
        self.send_range(self.server.objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def send_range(self, content: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self.send_bytes(content, 200, headers)
            return
        first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self.send_bytes(content[first : last + 1], 206, headers)


REPO = r"(?P<repo_id>[^/]+/[^/]+)"
API = rf"/api/(?P<kind>{KINDS})/{REPO}"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate_yaml),
    (rf"GET {API}", Handler.info),
    (rf"GET {API}/revision/(?P<revision>.+)", Handler.info),
    (rf"GET {API}/auth-check(?P<write>/write)?", Handler.auth_check),
    (rf"GET {API}/refs", Handler.refs),
    (rf"GET {API}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", Handler.tree),
    (rf"POST {API}/paths-info/(?P<revision>.+)", Handler.paths_info),
    (rf"POST {API}/branch/(?P<name>.+)", Handler.branch),
    (rf"POST {API}/preupload/(?P<revision>.+)", Handler.preupload),
    (rf"GET {API}/xet-(?P<right>read|write)-token/(?P<revision>.+)", Handler.xet_token),
    (rf"POST {API}/commit/(?P<revision>.+)", Handler.commit),
    (rf"POST /(?:(?P<kind>datasets)/)?{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"PUT /lfs-storage/(?P<oid>\w+)", Handler.lfs_put),
    (r"POST /lfs-verify", Handler.lfs_verify),
    (r"(?:GET|HEAD) /content-host/(?P<oid>\w+)", Handler.content),
    (rf"(?:GET|HEAD) /(?:(?P<kind>datasets)/)?{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]


def read_shard(path: Path, sha256: str) -> Iterator[tuple[str, int]]:
    """
    Hash and size of each file in a shard of Xet whose content has this SHA-256.

    After a header there are, in pieces of 48 bytes, for each file: its hash, flags and number of segments; the
    segments; as many hashes to verify them, if flagged; its SHA-256, if flagged. A hash of ones ends the list. Hashes
    are four little-endian numbers.
    """
    content = path.read_bytes()
    pieces = [content[start : start + 48] for start in range(48, len(content), 48)]
    while pieces and pieces[0][:32] != b"\xff" * 32:
        xet_hash, flags, count = struct.unpack("<32sII", pieces[0][:40])
        segments, pieces = pieces[1 : 1 + count], pieces[1 + count :]
        pieces = pieces[count if flags & 1 << 31 else 0 :]
        if flags & 1 << 30:
            if read_hash(pieces[0]) == sha256:
                # Hash of the block, flags, size of the segment.
                yield read_hash(xet_hash), sum(struct.unpack_from("<I", segment, 36)[0] for segment in segments)
            pieces = pieces[1:]


def read_hash(piece: bytes) -> str:
    """A hash of Xet as it is written."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", piece[:32]))


def check_card(text: str) -> tuple[list[str], list[str]]:
    """Errors and warnings of a card's metadata, by the published specification of `model-index`."""
    parts = re.match(r"\s*---\n(.*?)\n---\n", text, re.DOTALL)
    data = yaml.safe_load(parts[1]) if parts else None
    if not isinstance(data, dict):
        return [], ["empty or missing yaml metadata in repo card"]
    errors = []
    for name in ("base_model", "datasets"):
        values = data.get(name) or []
        for value in [values] if isinstance(values, str) else values:
            if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", value):
                errors.append(f'"{name}" must be a repo id, got {value!r}')
    for name in ("license", "library_name", "pipeline_tag"):
        if not isinstance(data.get(name, ""), str) or not re.fullmatch(r"[a-z0-9.-]*", data.get(name, "")):
            errors.append(f'"{name}" must be a lower case identifier')
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str) or not isinstance(model.get("results"), list):
            errors.append('"model-index" needs a name and results')
            continue
        for result in model["results"]:
            if not isinstance(result.get("task", {}).get("type"), str):
                errors.append('"model-index[0].results[0].task.type" is required')
            if not {"type", "name"} <= set(result.get("dataset", {})):
                errors.append('"model-index[0].results[0].dataset" needs type and name')
            if not result.get("metrics") or not all({"type", "value"} <= set(m) for m in result["metrics"]):
                errors.append('"model-index[0].results[0].metrics" need type and value')
    return errors, []


def client_environment(server: HubServer, home: Path, token: str = WRITER) -> dict[str, str]:
    """Environment of a process whose client shall talk to the server, and to nothing else."""
    return {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1" if server.xet_url is None else "0",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": token,
    }


def use_in_this_process(server: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same settings for a client that is imported already, which read them from the environment at that time."""
    monkeypatch.setenv("HF_TOKEN", WRITER)
    # hf_xet keeps its caches and logs there.
    monkeypatch.setenv("HF_HOME", str(home))
    settings = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": server.xet_url is None,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    # The client behind the plain functions `create_repo`, `upload_folder`, ...
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """A Hub that serves for the time of the context."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()
