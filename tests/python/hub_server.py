"""A small Hugging Face hub on the loopback: the part of its HTTP interface that downloads of a model use."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """What the server offers, and what it was asked for."""

    repositories: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    broken: bool = False
    url: str = ""
    requests: list[str] = field(default_factory=list)

    def downloads(self) -> list[str]:
        """The files whose content was sent, by name."""
        return [
            request.rsplit("/", 1)[1]
            for request in self.requests
            if request.startswith("GET /") and "/resolve/" in request
        ]

    def commit(self, name: str) -> str:
        """The only commit of a repository."""
        return hashlib.sha1(name.encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.broken:
            return self.send(500, b"", {}, body)
        api = path.startswith("/api/models/")
        path = path.removeprefix("/api/models").strip("/")
        name = next(
            (name for name in (*self.hub.repositories, *self.hub.gated) if f"{path}/".startswith(f"{name}/")),
            None,
        )
        if name is None:
            return self.send(401 if api else 404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        if name in self.hub.gated:
            return self.send(403, b"{}", {"X-Error-Code": "GatedRepo"}, body)
        verb, _, rest = path.removeprefix(name).strip("/").partition("/")
        revision, _, file = rest.partition("/")
        commit = self.hub.commit(name)
        if revision not in ("", "main", commit):
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        folder = self.hub.repositories[name]
        files = sorted(path for path in folder.iterdir() if path.is_file())
        if verb == "resolve":
            return self.send_file(folder / file, commit, body)
        if verb == "tree":
            listing = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": etag(file)}
                for file in files
            ]
            return self.send(200, json.dumps(listing).encode(), {}, body)
        info = {
            "id": name,
            "modelId": name,
            "sha": commit,
            "siblings": [{"rfilename": file.name} for file in files],
        }
        return self.send(
            200, json.dumps({**info, "private": False, "tags": [], "downloads": 0}).encode(), {}, body
        )

    def send_file(self, file: Path, commit: str, body: bool) -> None:
        headers = {"X-Repo-Commit": commit}
        if not file.is_file():
            return self.send(404, b"", {**headers, "X-Error-Code": "EntryNotFound"}, body)
        return self.send(200, file.read_bytes(), {**headers, "ETag": f'"{etag(file)}"'}, body)

    def send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Requests are in `Hub.requests`; nothing is printed."""


def etag(file: Path) -> str:
    """What names a file's content."""
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub on a port of its own, until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
