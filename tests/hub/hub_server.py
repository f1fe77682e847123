"""A Hugging Face Hub on loopback, in memory: enough of its HTTP API for huggingface_hub to push to and to load from.

Repositories with commits, branches, tags and pull requests; uploads in the commit itself or through LFS ("basic"
transfer; there is no Xet storage here); downloads with etags, redirects and ranges; tokens with and without the right
to write. Faults are asked for in advance: `server.fail("POST", "/commit/", status=503, times=2)`.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITE_TOKEN = "hf_" + "WriteToken" * 4  # put together here, so that no scanner takes it for a real one
READ_TOKEN = "hf_" + "ReadTokens" * 4
USERS = {WRITE_TOKEN: ("user", "write"), READ_TOKEN: ("reader", "read")}


@dataclass
class Stored:
    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        """What the Hub calls the file: git's blob hash, or the SHA-256 where LFS holds it."""
        if self.is_lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Commit:
    oid: str
    files: dict[str, Stored]
    message: str


@dataclass
class Repository:
    is_private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)

    def add_commit(self, parent: str | None, files: dict[str, Stored], message: str) -> str:
        tree = "".join(f"{path} {file.oid}\n" for path, file in sorted(files.items()))
        oid = hashlib.sha1(f"{parent} {message} {len(self.commits)}\n{tree}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, files, message)
        return oid

    def find(self, revision: str) -> Commit | None:
        for refs in (self.branches, self.tags, self.pull_requests):
            if revision in refs:
                return self.commits[refs[revision]]
        return self.commits.get(revision)


@dataclass
class Fault:
    """`kind`: "answer" (with `status`), "cut" (hang up in the middle of the request) or "lose" (do it, hang up)."""

    method: str
    path: str
    kind: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1
    skip: int = 0


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class HubServer:
    """`with HubServer() as server:` serves at `server.url` until the block ends."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, int]] = []  # method, path, status; 0 where it hung up
        self.uploaded_bytes = 0
        self.lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def fail(self, method: str, path: str, *, status: int, times: int = 1, skip: int = 0, **headers: str) -> None:
        """The next `times` requests, after `skip` good ones, whose path matches are answered with `status`."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(method, path, "answer", status, headers, times, skip))

    def cut(self, method: str, path: str, *, times: int = 1, skip: int = 0) -> None:
        """The connection breaks in the middle of the request (of the answer, for a download)."""
        self.faults.append(Fault(method, path, "cut", times=times, skip=skip))

    def lose_answer(self, method: str, path: str, *, times: int = 1) -> None:
        """The request is carried out, and the connection breaks before the answer."""
        self.faults.append(Fault(method, path, "lose", times=times))

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and re.search(fault.path, path):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    if fault.times:
                        fault.times -= 1
                        return fault
        return None

    def count(self, method: str, path: str) -> int:
        """How many requests of this kind came in."""
        return sum(1 for seen, where, _ in self.requests if seen == method and re.search(path, where))

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        commit = self.repositories[repo_id].find(revision)
        assert commit is not None, revision
        return {path: file.content for path, file in commit.files.items()}


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create_repository"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("GET", rf"/api/models/{REPO}/refs", "list_refs"),
    ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", "list_tree"),
    ("POST", rf"/api/models/{REPO}/branch/(?P<branch>[^/]+)", "create_branch"),
    ("POST", rf"/api/models/{REPO}/tag/(?P<revision>[^/]+)", "create_tag"),
    ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", "commit"),
    ("GET", rf"/api/models/{REPO}(?:/revision/(?P<revision>[^/]+))?", "describe"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
    ("GET", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_download"),
    ("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: two would wait for each other's receipt
    disable_nagle_algorithm = True
    hub: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_request("GET")

    def do_HEAD(self) -> None:
        self.handle_request("GET")

    def do_POST(self) -> None:
        self.handle_request("POST")

    def do_PUT(self) -> None:
        self.handle_request("PUT")

    # ---- One request ----

    def handle_request(self, method: str) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        fault = self.hub.take_fault(self.command, url.path)
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.kind == "cut" and method != "GET":
            self.rfile.read(length // 2)
            return self.hang_up(url.path)
        self.body = (
            self.read_chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.rfile.read(length)
        )
        if fault is not None and fault.kind == "answer":
            return self.answer(fault.status, b"<html>fault</html>", fault.headers)  # as a proxy answers
        self.is_cut, self.is_lost = (fault is not None and fault.kind == kind for kind in ("cut", "lose"))
        try:
            for expected, pattern, name in ROUTES:
                found = re.fullmatch(pattern, url.path)
                if expected == method and found:
                    groups = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
                    with self.hub.lock:
                        status, data, headers = getattr(self, name)(**groups)
                    return self.answer(status, data, headers)
            raise Refusal(404, f"no such route: {method} {url.path}")
        except Refusal as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self.answer(refusal.status, {"error": refusal.message}, headers)

    def read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, status: int, data: bytes | dict | list, headers: dict[str, str]) -> None:
        if getattr(self, "is_lost", False):
            return self.hang_up(self.path)
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.hub.requests.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if getattr(self, "is_cut", False):
            self.wfile.write(body[: len(body) // 2])
            return self.hang_up(self.path)
        self.wfile.write(body)

    def hang_up(self, path: str) -> None:
        self.hub.requests.append((self.command, path, 0))
        self.close_connection = True
        with suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    # ---- Rights ----

    def user(self) -> tuple[str, str] | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        token = header.removeprefix("Bearer ")
        if token not in USERS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return USERS[token]

    def may_write(self, repo_id: str) -> None:
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if user != (repo_id.partition("/")[0], "write"):
            raise Refusal(403, f"Forbidden: you don't have the right to write to {repo_id}.")

    def repository(self, repo_id: str) -> Repository:
        repository = self.hub.repositories.get(repo_id)
        user = self.user()
        if repository is None or (repository.is_private and (user is None or user[0] != repo_id.partition("/")[0])):
            # the Hub does not tell a stranger whether a private repository exists
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repository

    def at(self, repo_id: str, revision: str) -> Commit:
        commit = self.repository(repo_id).find(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # ---- Routes: each returns status, data, headers ----

    def whoami(self):
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        return 200, {"type": "user", "name": user[0], "auth": {"accessToken": {"role": user[1]}}}, {}

    def create_repository(self):
        request = json.loads(self.body)
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        repo_id = f"{request['organization'] or user[0]}/{request['name']}"
        self.may_write(repo_id)
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repositories:
            return 409, {"error": "You already created this model repo", "url": url}, {}
        is_private = request.get("private") or request.get("visibility") == "private"
        repository = self.hub.repositories[repo_id] = Repository(bool(is_private))
        attributes = {".gitattributes": Stored(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)}
        repository.branches["main"] = repository.add_commit(None, attributes, "initial commit")
        return 200, {"url": url, "name": repo_id}, {}

    def validate_yaml(self):
        content = json.loads(self.body)["content"]
        found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            metadata = yaml.safe_load(found[1]) if found else None
        except yaml.YAMLError as error:
            return 400, {"errors": [{"message": str(error)}], "warnings": []}, {}
        empty = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return 200, {"errors": [], "warnings": empty}, {}

    def describe(self, repo: str, revision: str = "main"):
        commit = self.at(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        details = {"id": repo, "modelId": repo, "sha": commit.oid, "siblings": siblings, "tags": []}
        return 200, {**details, "private": self.repository(repo).is_private}, {}

    def list_refs(self, repo: str):
        repository = self.repository(repo)

        def refs(kind: str, known: dict[str, str]):
            return [{"name": name, "ref": f"{kind}{name}", "targetCommit": oid} for name, oid in known.items()]

        branches, tags = refs("refs/heads/", repository.branches), refs("refs/tags/", repository.tags)
        return 200, {"branches": branches, "tags": tags, "converts": [], "pullRequests": []}, {}

    def list_tree(self, repo: str, revision: str, folder: str = ""):
        inside = f"{folder}/" if folder else ""
        files = {path: file for path, file in self.at(repo, revision).files.items() if path.startswith(inside)}
        if folder and not files:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        tree = []
        for path, file in sorted(files.items()):
            entry = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
            if file.is_lfs:
                entry["lfs"] = {"oid": file.oid, "size": len(file.content), "pointerSize": 134}
            tree.append(entry)
        return 200, tree, {}

    def create_branch(self, repo: str, branch: str):
        self.may_write(repo)
        repository = self.repository(repo)
        if branch in repository.branches:
            return 409, {"error": f"Reference {branch} already exists"}, {}
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repository.branches[branch] = self.at(repo, start).oid
        return 200, {}, {}

    def create_tag(self, repo: str, revision: str):
        self.may_write(repo)
        tag, repository = json.loads(self.body)["tag"], self.repository(repo)
        if tag in repository.tags:
            return 409, {"error": f"Tag reference {tag} already exists"}, {}
        repository.tags[tag] = self.at(repo, revision).oid
        return 200, {}, {}

    def preupload(self, repo: str, revision: str):
        if self.user() is None:
            raise Refusal(401, "Invalid username or password.")
        if "create_pr" not in self.query:
            self.may_write(repo)
        known = self.at(repo, revision).files
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": known[file["path"]].oid if file["path"] in known else None,
            }
            for file in json.loads(self.body)["files"]
        ]
        return 200, {"files": files}, {}

    def lfs_batch(self, repo: str):
        self.repository(repo)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}
            objects.append(wanted if wanted["oid"] in self.hub.blobs else {**wanted, "actions": {"upload": upload}})
        return 200, {"transfer": "basic", "objects": objects}, {}

    def lfs_upload(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the content does not have this hash")
        self.hub.blobs[oid] = self.body
        self.hub.uploaded_bytes += len(self.body)
        return 200, {}, {}

    def lfs_download(self, oid: str):
        content = self.hub.blobs[oid]
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted is None:
            return 200, content, {}
        start = int(wanted[1])
        return 206, content[start:], {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}

    def resolve(self, repo: str, revision: str, path: str):
        commit = self.at(repo, revision)
        if path not in commit.files:
            raise Refusal(404, f"{path} does not exist on {revision}", "EntryNotFound")
        file = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if not file.is_lfs:
            return 200, file.content, headers
        linked = {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
        # under another name of this machine: clients follow redirects on the Hub itself, and stop at those to its store
        store = self.hub.url.replace("127.0.0.1", "localhost")
        return 302, b"", {**headers, **linked, "Location": f"{store}/lfs/{file.oid}"}

    def commit(self, repo: str, revision: str):
        is_proposal = "create_pr" in self.query
        repository = self.repository(repo)
        if is_proposal and self.user() is None:
            raise Refusal(401, "Invalid username or password.")
        if not is_proposal:
            self.may_write(repo)
        base = self.at(repo, revision)
        files, header = dict(base.files), {}
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                header = value
            elif entry["key"] == "file":
                files[value["path"]] = Stored(base64.b64decode(value["content"]), False)
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refusal(400, f"no LFS object {value['oid']}")
                files[value["path"]] = Stored(self.hub.blobs[value["oid"]], True)
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, f"unknown operation {entry['key']}")
        if header.get("parentCommit") not in (None, base.oid):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        oid = repository.add_commit(base.oid, files, header["summary"])
        done = {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"}
        if is_proposal:
            number = len(repository.pull_requests) + 1
            repository.pull_requests[f"refs/pr/{number}"] = oid
            done["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{number}"
        else:
            repository.branches[revision] = oid
        return 200, done, {}
