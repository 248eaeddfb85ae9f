"""For tests of data sets: a web server on this machine, and folders that are empty for certain."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


@dataclass
class Site:
    """What a web server offers: path to (content, the length it announces)."""

    address: str
    pages: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def offer(self, path: str, content: bytes, announced: int | None = None) -> str:
        self.pages[path] = (content, len(content) if announced is None else announced)
        return f"{self.address}{path}"


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            offered.requests.append(self.path)
            if self.path not in offered.pages:
                self.send_error(404)
                return
            content, announced = offered.pages[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(announced))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    offered = Site(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield offered
    server.shutdown()
    thread.join()
    server.server_close()


@dataclass
class Folders:
    data: Path
    cache: Path


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folders:
    """FEDVEIL_DATA and FEDVEIL_CACHE are set to folders with nothing in them."""
    folders = Folders(tmp_path / "data", tmp_path / "cache")
    folders.data.mkdir()
    monkeypatch.setenv("FEDVEIL_DATA", str(folders.data))
    monkeypatch.setenv("FEDVEIL_CACHE", str(folders.cache))
    return folders
