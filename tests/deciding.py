"""An OpenAI-compatible endpoint on loopback whose answers a test writes down beforehand."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def deciding(*decisions: dict[str, Any]) -> Iterator[str]:
    """An OpenAI-compatible endpoint that makes these decisions."""
    left = list(decisions)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            content = json.dumps({"thought": "", **left.pop(0)})
            usage = {"prompt_tokens": 10, "completion_tokens": 5}
            body = json.dumps({"choices": [{"message": {"content": content}}], "usage": usage}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
