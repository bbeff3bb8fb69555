"""A web server on this machine that answers requests for parts of files and lists no folders, in a thread."""

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import sleep


class Files(ThreadingHTTPServer):
    """What is below the folder `root`. Tests slow it down by `delay` seconds, let it `deny` the paths that hold a word,
    answer another code where a file is `missing`, or be `gone` (it hangs up), and read which paths were `asked` for,
    and how many at the same time (`busiest`)."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.delay, self.deny, self.gone, self.asked = root, 0.0, "\0", False, Counter()
        self.missing = 404
        self.busy = self.busiest = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Files
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        if server.gone:
            self.close_connection = True
            return
        with server.lock:
            server.asked[self.path] += 1
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
        sleep(server.delay)
        file = server.root / self.path.lstrip("/")
        code = 403 if server.deny in self.path else 200 if file.is_file() else server.missing
        body, span = (file.read_bytes() if code == 200 else b""), ""
        if code == 200 and (found := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))):
            first, last = found.groups()
            a = int(first) if first else max(0, len(body) - int(last))
            z = min(len(body), int(last) + 1 if first and last else len(body))
            code, span = (206 if a < z else 416), f"bytes {a}-{z - 1}/{len(body)}"
            body = body[a:z]
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        if span:
            self.send_header("Content-Range", span)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
        with server.lock:
            server.busy -= 1

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(root: Path) -> Iterator[Files]:
    server = Files(root)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
