"""A Hub on loopback: the part of its HTTP interface that `huggingface_hub` 1.33 uses to push and to load a repository.

Routes and headers are those that the installed client asks for and reads (`hf_api.py`, `_commit_api.py`, `lfs.py`,
`file_download.py`). Large files travel by LFS, in one part or in several. Its successor, Xet, is a binary protocol of
its own and is not spoken here: clients run with `HF_HUB_DISABLE_XET=1`.

Large files are served from another host name (`localhost` in place of `127.0.0.1`), as the real Hub serves them from a
CDN: a token that reaches it is recorded in `leaks`.
"""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from local_hub_routes import ROUTES, Refused, Repository, Routes

TOKEN = "hf_of_uplvp"


@dataclass
class Fault:
    """Answers the next `times` requests that match `method` and `path` (a regular expression) with `status`.

    Status 0 drops the connection: an upload after half its body was read, a download after half of it was sent.
    """

    method: str
    path: str
    status: int
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)


class LocalHub:
    """Use as a context manager; `url` is for `HF_ENDPOINT`, `TOKEN` for `HF_TOKEN` (user `uplvp`)."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large: dict[str, bytes] = {}  # LFS store: sha256 -> content
        self.parts: dict[str, dict[int, bytes]] = {}
        self.tokens = {TOKEN: "uplvp"}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.leaks: list[str] = []
        self.ranges: list[str | None] = []  # `Range` of every request for the content of a large file
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url, self.cdn = f"http://127.0.0.1:{self.port}", f"http://localhost:{self.port}"

    def __enter__(self) -> LocalHub:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, method: str, path: str, status: int, times: int = 1, **headers: str) -> None:
        self.faults.append(Fault(method, path, status, times, headers))

    def files(self, repo_id: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        repository = self.repositories[kind, repo_id]
        return {path: blob.content for path, blob in repository.commits[repository.branches[revision]].items()}


class _Handler(Routes, BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_HEAD(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def _serve(self, method: str) -> None:
        split = urlsplit(self.path)
        self.query = parse_qs(split.query)
        self.cut = False
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {split.path}")
            fault = self._next_fault(split.path)
        if fault is not None and fault.status == 0:
            self.cut = True
            if self.command in ("POST", "PUT"):  # half the body is read, then the line is dead
                self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
                self.close_connection = True
                self.connection.close()
                return
        self.body = self._read_body()
        try:
            if fault is not None and fault.status:
                raise Refused(fault.status, "a fault of this test", headers=fault.headers)
            for verb, expression, name in ROUTES:
                match = re.fullmatch(expression, split.path)
                if verb == method and match:
                    arguments = {k: None if v is None else unquote(v) for k, v in match.groupdict().items()}
                    with self.hub.lock:
                        answer = getattr(self, "_" + name)(**arguments)
                    return self._answer(*answer)
            raise Refused(404, f"no route {method} {split.path}")
        except Refused as refused:
            self._json({"error": refused.message}, refused.status, refused.headers)

    def _next_fault(self, path: str) -> Fault | None:
        for fault in self.hub.faults:
            if fault.times > 0 and fault.method == self.command and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _json(self, content, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self._answer(status, body, {"Content-Type": "application/json", **(headers or {})})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.cut else body)
        if self.cut:
            self.close_connection = True
