"""A Hub on the loopback interface, in memory: the part of its HTTP protocol that models are pushed and pulled by, and
datasets read by.

    with HubServer() as hub:
        ...  # clients run with HF_ENDPOINT=hub.url and HF_TOKEN=TOKEN

Create repository, preupload, LFS batch with upload and verify, commit, branches, model info, tree, resolve with ETag
and redirect, and the Hub's error codes. `hub.fail(...)` breaks the next requests of a kind, `hub.log` has them all.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


TOKEN = "hf_loopback"
LFS_SUFFIXES = (".safetensors", ".bin")


@dataclass
class File:
    content: bytes
    lfs: bool

    @property
    def etag(self) -> str:
        """SHA-256 of LFS files, git's blob id of others, as on the Hub."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)  # id -> path -> file
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, revision: str, files: dict[str, File]) -> str:
        parent = self.refs.get(revision, "")
        listing = parent + revision + "".join(f"{path}{file.etag}" for path, file in sorted(files.items()))
        oid = hashlib.sha1(f"{len(self.commits)}{listing}".encode()).hexdigest()
        self.commits[oid] = files
        self.refs[revision] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch or (the start of) a commit id names."""
        return self.refs.get(revision) or next((oid for oid in self.commits if oid == revision), None)


@dataclass
class Fault:
    """What happens to the next `times` requests whose method and path match."""

    method: str
    path: str
    times: int
    status: int  # answer this


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.storage_url = (
            f"http://localhost:{self.server_address[1]}"  # as on the Hub, LFS files come from another host
        )
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}  # SHA-256 -> content
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str]] = []  # method, path
        self.lock = threading.Lock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def fail(self, method: str, path: str, times: int = 1, *, status: int):
        """Breaks the next requests of `method` whose path matches the pattern `path`."""
        self.faults.append(Fault(method, path, times, status))

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def requests(self, method: str, path: str) -> list[tuple[str, str]]:
        return [entry for entry in self.log if entry[0] == method and re.search(path, entry[1])]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return {path: file.content for path, file in repo.commits[repo.refs[revision]].items()}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_):
        pass

    def answer(self):
        split = urlsplit(self.path)
        path = unquote(split.path)
        body = self.read_body()
        with self.server.lock:
            self.server.log.append((self.command, path))
        fault = self.server.take_fault(self.command, path)
        if fault is not None:
            return self.send_error_code(fault.status, None, "injected")
        for methods, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods:
                self.query = parse_qs(split.query)
                return getattr(self, name)(body, **match.groupdict())
        self.send_error_code(404, None, f"no route for {self.command} {path}")

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def send(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None):
        headers = {"Content-Length": str(len(content)), **(headers or {})}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content)

    def send_json(self, value, status: int = 200):
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send_error_code(self, status: int, code: str | None, message: str):
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.send(status, json.dumps({"error": message}).encode(), {"Content-Type": "application/json", **headers})

    def may_write(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.send_error_code(401, None, "Invalid username or password.")
        return False

    def find(self, repo_id: str, revision: str | None = None):
        """The repository and the commit; answers with the Hub's error and gives None when there is none."""
        repo = self.server.repos.get(repo_id)
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if "Authorization" in self.headers and not authorized:
            return self.send_error_code(401, None, "Invalid credentials in Authorization header")
        if repo is None or (repo.private and not authorized):
            return self.send_error_code(404 if authorized else 401, "RepoNotFound", "Repository not found")
        commit = None if revision is None else repo.resolve(revision)
        if revision is not None and commit is None:
            return self.send_error_code(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, commit

    def whoami(self, body):
        if self.may_write():
            self.send_json({"name": "tester", "type": "user", "orgs": [], "auth": {"type": "access_token"}})

    def validate_yaml(self, body):
        self.send_json({"errors": [], "warnings": []})

    def create_repo(self, body):
        if not self.may_write():
            return
        request = json.loads(body)
        repo_id = f"{request.get('organization') or 'tester'}/{request['name']}"
        if repo_id in self.server.repos:
            return self.send_json(
                {"error": "You already created this repo", "url": f"{self.server.url}/{repo_id}"}, 409
            )
        private = bool(request.get("private") or request.get("visibility") == "private")
        self.server.repos[repo_id] = repo = Repo(private=private)
        repo.commit("main", {})
        self.send_json({"url": f"{self.server.url}/{repo_id}", "name": repo_id, "id": repo_id})

    def create_branch(self, body, repo_id, revision):
        if self.may_write() and (found := self.find(repo_id)):
            repo, _ = found
            if revision in repo.refs:
                return self.send_error_code(409, None, "Reference already exists")
            repo.refs[revision] = repo.refs["main"]
            self.send_json({})

    def preupload(self, body, repo_id, revision):
        if self.may_write() and (found := self.find(repo_id, revision)):
            repo, commit = found
            answers = []
            for file in json.loads(body)["files"]:
                mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
                known = repo.commits[commit].get(file["path"])
                oid = {"oid": known.etag} if known else {}
                answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
            self.send_json({"files": answers})

    def lfs_batch(self, body, repo_id):
        if self.may_write() and self.find(repo_id):
            objects = []
            for item in json.loads(body)["objects"]:
                entry = {"oid": item["oid"], "size": item["size"]}
                if item["oid"] not in self.server.lfs:
                    entry["actions"] = {
                        "upload": {"href": f"{self.server.url}/lfs/{item['oid']}", "header": {}},
                        "verify": {"href": f"{self.server.url}/{repo_id}.git/info/lfs/verify", "header": {}},
                    }
                objects.append(entry)
            self.send_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            return self.send_error_code(400, None, "content does not match its SHA-256")
        self.server.lfs[oid] = body
        self.send(200)

    def lfs_verify(self, body, repo_id):
        item = json.loads(body)
        stored = self.server.lfs.get(item["oid"])
        if stored is None or len(stored) != item["size"]:
            return self.send_error_code(404, None, "object was not uploaded")
        self.send(200)

    def lfs_get(self, body, oid):
        self.send_content(self.server.lfs[oid], {"ETag": f'"{oid}"'})

    def commit(self, body, repo_id, revision):
        if not (self.may_write() and (found := self.find(repo_id, revision))):
            return
        repo, parent = found
        files = dict(repo.commits[parent])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.server.lfs:
                    return self.send_error_code(400, None, f"LFS object {value['oid']} was never uploaded")
                files[value["path"]] = File(self.server.lfs[value["oid"]], lfs=True)
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif entry["key"] != "header":
                return self.send_error_code(400, None, f"unknown key {entry['key']}")
        oid = repo.commit(revision, files)
        url = f"{self.server.url}/{repo_id}/commit/{oid}"
        self.send_json({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def info(self, body, repo_id, revision="main"):
        if found := self.find(repo_id, revision):
            repo, commit = found
            siblings = [
                {"rfilename": path, "size": len(file.content), "blobId": file.etag}
                for path, file in sorted(repo.commits[commit].items())
            ]
            names = {"id": repo_id, "modelId": repo_id, "sha": commit}
            self.send_json({**names, "private": repo.private, "tags": [], "siblings": siblings})

    def refs(self, body, repo_id):
        if found := self.find(repo_id):
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in found[0].refs.items()]
            self.send_json({"branches": branches, "tags": [], "converts": []})

    def tree(self, body, repo_id, revision, folder=""):
        if not (found := self.find(repo_id, revision)):
            return
        repo, commit = found
        prefix = f"{folder.strip('/')}/" if folder else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        entries = {}
        for path, file in sorted(repo.commits[commit].items()):
            if not path.startswith(prefix):
                continue
            head, *rest = path[len(prefix) :].split("/")
            if rest:
                entries[prefix + head] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": prefix + head}
            if recursive or not rest:
                lfs = {"lfs": {"oid": file.etag, "size": len(file.content), "pointerSize": 134}} if file.lfs else {}
                entries[path] = {"type": "file", "oid": file.etag, "size": len(file.content), "path": path, **lfs}
        if folder and not entries:
            return self.send_error_code(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        self.send_json(list(entries.values()))

    def resolve(self, body, repo_id, revision, path):
        if not (found := self.find(repo_id, revision)):
            return
        repo, commit = found
        file = repo.commits[commit].get(path)
        if file is None:
            return self.send_error_code(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.etag}"'}
        if not file.lfs:
            return self.send_content(file.content, headers)
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
        self.send(302, b"", {**headers, "Location": f"{self.server.storage_url}/lfs/{file.etag}"})

    def send_content(self, content: bytes, headers: dict[str, str]):
        self.send(200, content, {"Content-Type": "application/octet-stream", **headers})


_API = r"/api/(?:models|datasets)"
_ID, _REVISION = r"(?P<repo_id>[^/]+/[^/]+?)", r"(?P<revision>[^/]+)"
ROUTES = (
    (("GET",), r"/api/whoami-v2", "whoami"),
    (("POST",), r"/api/validate-yaml", "validate_yaml"),
    (("POST",), r"/api/repos/create", "create_repo"),
    (("POST",), rf"{_API}/{_ID}/branch/{_REVISION}", "create_branch"),
    (("POST",), rf"{_API}/{_ID}/preupload/{_REVISION}", "preupload"),
    (("POST",), rf"/{_ID}\.git/info/lfs/objects/batch", "lfs_batch"),
    (("POST",), rf"/{_ID}\.git/info/lfs/verify", "lfs_verify"),
    (("PUT",), r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    (("GET", "HEAD"), r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_get"),
    (("POST",), rf"{_API}/{_ID}/commit/{_REVISION}", "commit"),
    (("GET",), rf"{_API}/{_ID}/revision/{_REVISION}", "info"),
    (("GET",), rf"{_API}/{_ID}/refs", "refs"),
    (("GET",), rf"{_API}/{_ID}/tree/{_REVISION}(?P<folder>/.+)?", "tree"),
    (("GET",), rf"{_API}/{_ID}", "info"),
    (("GET", "HEAD"), rf"/(?:datasets/)?{_ID}/resolve/{_REVISION}/(?P<path>.+)", "resolve"),
)
