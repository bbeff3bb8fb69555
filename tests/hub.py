"""A Hugging Face hub on this machine, as far as models are pushed to it and pulled from it, in a thread.

As the real one it takes weights by Git LFS: their bytes first, under their SHA-256, and in the commit that alone.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Files = dict[str, bytes]


class Hub(ThreadingHTTPServer):
    """Repositories as lists of commits, each with all its files. Tests set `refuse` to the code that a push gets, and
    `meanwhile` to what somebody else commits just before one arrives."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, list[Files]] = {}
        self.large: Files = {}
        self.refuse: int | None = None
        self.meanwhile: Files | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit_of(self, repo: str, revision: str) -> Files:
        """The files of a branch, or of a commit by its number."""
        commits = self.repos[repo]
        return commits[-1 if revision == "main" else int(revision[1:], 16) - 1]


def sha(number: int) -> str:
    """What stands for the SHA-1 of commit `number`, the first of which is 1."""
    return f"c{number:039x}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub, parts = self.server, self.path.strip("/").split("/")
        if parts == ["api", "validate-yaml"]:
            return self.tell({"errors": [], "warnings": []})
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo in hub.repos:
                return self.tell({"error": "it is there", "url": f"{hub.url}/{repo}"}, 409)
            hub.repos[repo] = [{".gitattributes": b""}]
            return self.tell({"url": f"{hub.url}/{repo}"})
        if parts[2:] == ["info", "lfs", "objects", "batch"]:
            told = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{hub.url}/large/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.tell({"transfer": "basic", "objects": told})
        repo, what, revision = "/".join(parts[2:4]), parts[4], parts[5]
        if what == "preupload":
            if revision != "main":
                return self.tell({"error": "unknown"}, 404, {"X-Error-Code": "RevisionNotFound"})
            paths = [f["path"] for f in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
            rest = {"shouldIgnore": False, "oid": None}
            return self.tell({"files": [{"path": path, "uploadMode": modes[path], **rest} for path in paths]})
        assert what == "commit" and revision == "main", self.path
        if hub.refuse:
            return self.tell({"error": "no"}, hub.refuse)
        if hub.meanwhile is not None:
            hub.repos[repo].append(hub.meanwhile)
        lines = [json.loads(line) for line in body.splitlines()]
        if lines[0]["value"]["parentCommit"] != sha(len(hub.repos[repo])):
            return self.tell({"error": "the branch has moved"}, 412)
        files = dict(hub.repos[repo][-1])
        for line in lines[1:]:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = hub.large[line["value"]["oid"]]
            else:
                assert line["key"] == "deletedFile", line
                del files[line["value"]["path"]]
        hub.repos[repo].append(files)
        number = len(hub.repos[repo])
        return self.tell({"commitUrl": f"{hub.url}/{repo}/commit/{sha(number)}", "commitOid": sha(number)})

    def do_PUT(self) -> None:
        content, oid = self.rfile.read(int(self.headers["Content-Length"])), self.path.strip("/").split("/")[-1]
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.large[oid] = content
        self.send(b"", 200, {})

    def do_GET(self) -> None:
        hub, parts = self.server, self.path.strip("/").split("/")
        repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        revision = parts[5] if parts[0] == "api" else parts[3]
        if repo not in hub.repos:
            return self.tell({"error": "unknown"}, 404, {"X-Error-Code": "RepoNotFound"})
        try:
            files = hub.commit_of(repo, revision)
        except ValueError:
            return self.tell({"error": "unknown"}, 404, {"X-Error-Code": "RevisionNotFound"})
        number = len(hub.repos[repo]) if revision == "main" else int(revision[1:], 16)
        if parts[0] == "api":
            return self.tell({"id": repo, "sha": sha(number), "siblings": [{"rfilename": name} for name in files]})
        content = files["/".join(parts[4:])]
        etag = hashlib.sha1(content).hexdigest()
        return self.send(content, 200, {"ETag": f'"{etag}"', "X-Repo-Commit": sha(number)})

    do_HEAD = do_GET

    def tell(self, answer: dict, code: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send(json.dumps(answer).encode(), code, {"Content-Type": "application/json", **(headers or {})})

    def send(self, content: bytes, code: int, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
