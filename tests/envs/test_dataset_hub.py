"""A data set by name: fetched once from a server that answers as the hub does, then had without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import pytest

pq = pytest.importorskip("pyarrow.parquet", reason="needs datasets: pip install 'shoal[datasets]'")
pa = pytest.importorskip("pyarrow")

COMMIT = "a" * 40
README = b"---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train-*\n---\n"


def files() -> dict[str, bytes]:
    table = BytesIO()
    pq.write_table(pa.Table.from_pylist([{"question": f"{i} + 1?", "answer": f"{i + 1}"} for i in range(20)]), table)
    return {"README.md": README, "main/train-00000-of-00001.parquet": table.getvalue()}


@contextmanager
def hub() -> Iterator[tuple[str, list[str]]]:
    """The hub's calls that fetching `owner/sums` makes: its address, and what was asked."""
    kept, asked = files(), list[str]()

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            asked.append(path)
            if "/tree/" in path:
                self.answer(json.dumps(listed(kept, path.split("/tree/")[1].partition("/")[2])).encode())
            elif path.startswith("/api/datasets/owner/sums"):
                siblings = [{"rfilename": name} for name in kept]
                self.answer(json.dumps({"id": "owner/sums", "sha": COMMIT, "tags": [], "siblings": siblings}).encode())
            elif (name := path.partition("/resolve/")[2].partition("/")[2]) in kept:
                self.answer(kept[name])
            else:
                self.answer(b"", 200 if path == "/" else 404)

        do_HEAD = do_GET

        def answer(self, body: bytes, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{sha1(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if status == 404:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()


def listed(kept: dict[str, bytes], under: str) -> list[dict[str, object]]:
    """What lies in a folder, as the hub tells it."""
    found: dict[str, dict[str, object]] = {}
    for name, content in kept.items():
        if not under or name.startswith(f"{under}/"):
            head, _, below = name[len(under) + 1 if under else 0 :].partition("/")
            path = f"{under}/{head}" if under else head
            found[path] = {
                "path": path,
                "type": "directory" if below else "file",
                "oid": "d" * 40,
                "size": len(content),
            }
    return list(found.values())


def held_out(home: Path, **changes: str) -> list[str]:
    """The held-out questions, as a process of its own reads them; the hub's address is read once."""
    code = (
        "import json; from shoal.envs.registry import make\n"
        "env = make('dataset', {'name': 'owner/sums', 'subset': 'main', 'heldout_fraction': 0.5})\n"
        "print(json.dumps([task.data['question'] for task in env.heldout()]))"
    )
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = inherited | {"HF_HOME": str(home), "NO_PROXY": "127.0.0.1"} | changes
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return [str(question) for question in json.loads(done.stdout)]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_what_was_fetched_once_is_had_without_the_hub(tmp_path: Path) -> None:
    with hub() as (url, asked):
        fetched = held_out(tmp_path, HF_ENDPOINT=url)
        assert 1 < len(fetched) < 20
        assert any(path.endswith("train-00000-of-00001.parquet") for path in asked)
    assert held_out(tmp_path, HF_ENDPOINT=url) == fetched, "the hub has gone"
    assert held_out(tmp_path, HF_ENDPOINT=url, HF_HUB_OFFLINE="1") == fetched
