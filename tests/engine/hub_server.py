"""A Hugging Face Hub on loopback with one repository in it, for its real client."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from shoal.engine import conversion


@contextmanager
def hub_that_serves(name: str, directory: Path) -> Iterator[tuple[str, list[str]]]:
    """Its address, and a list that grows by each file that is fetched from it."""
    handler = type("OneHub", (Hub,), {"name": name, "root": directory, "served": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", handler.served
        finally:
            server.shutdown()


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as serves one repository."""

    name: str
    root: Path
    served: list[str]
    revision = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        data, headers = b"", {}
        if path == "/":
            pass
        elif path.startswith(f"/api/models/{self.name}"):
            files = [{"rfilename": p.relative_to(self.root).as_posix()} for p in self.root.rglob("*") if p.is_file()]
            data = json.dumps({"id": self.name, "sha": self.revision, "siblings": files}).encode()
            if "/tree/" in path:
                data = json.dumps(
                    [{"type": "file", "path": f["rfilename"], "size": 1, "oid": "1"} for f in files]
                ).encode()
        elif "/resolve/" in path and (file := self.root / path.split(f"/resolve/{self.revision}/")[-1]).is_file():
            data = file.read_bytes()
            headers = {"ETag": f'"{conversion.file_hash(file)}"', "X-Repo-Commit": self.revision}
            if body:
                self.served.append(file.relative_to(self.root).as_posix())
        else:
            self.send_error(404)
            return
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass
