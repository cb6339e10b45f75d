"""mem0 as a peer, in a process and an environment of its own.

It keeps and finds the same runs as `vector`, with the same embedder: its embedding endpoint is one of ours, on
loopback. Its own extraction (`infer=True`) asks a language model for JSON facts at every addition, which one of 135 M
parameters does not give; texts are added as they are (`infer=False`), as its documentation offers.
"""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

from shoal.errors import RunError
from shoal.memory.embedding import HashedEmbedder

from _common import peer_env

REQUIREMENTS = ("mem0ai==2.2.1",)
MAX_WAIT_S = 300.0

SERVER = """
import json, os, sys
os.environ["MEM0_TELEMETRY"] = "False"
os.environ["OPENAI_API_KEY"] = "none"
from mem0 import Memory
port, folder = int(sys.argv[1]), sys.argv[2]
base = f"http://127.0.0.1:{port}/v1"
memory = Memory.from_config({
    "embedder": {"provider": "openai", "config": {"model": "hashed", "openai_base_url": base, "embedding_dims": 384}},
    "llm": {"provider": "openai", "config": {"model": "none", "openai_base_url": base}},
    "vector_store": {"provider": "qdrant", "config": {
        "path": folder + "/qdrant", "embedding_model_dims": 384, "collection_name": "runs"}},
    "history_db_path": folder + "/history.db",
})
for line in sys.stdin:
    asked = json.loads(line)
    if "add" in asked:
        for text in asked["add"]:
            memory.add(text, user_id="bench", infer=False)
        answer = {}
    else:
        found = memory.search(asked["search"], filters={"user_id": "bench"}, top_k=asked["k"], threshold=0.0)
        answer = {"texts": [one["memory"] for one in found["results"]]}
    print("@@" + json.dumps(answer), flush=True)
"""


class Mem0:
    """One peer process with its texts; ends with this one."""

    def __init__(self, python: Path, texts: Sequence[str]) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="shoal-mem0-")
        self._embedder = HashedEmbedder()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        command = [str(python), "-P", "-c", SERVER, str(self._server.server_port), self._scratch.name]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=self._scratch.name
        )
        self._ask({"add": list(texts)})

    @classmethod
    def opened(cls, texts: Sequence[str]) -> Mem0 | None:
        """The peer with these texts, or None where it cannot be installed."""
        try:
            return cls(peer_env("mem0", REQUIREMENTS), texts)
        except RunError as error:
            print(f"mem0 is left out: {error}", file=sys.stderr)
            return None

    def search(self, query: str, k: int) -> list[str]:
        found: list[str] = self._ask({"search": query, "k": k})["texts"]
        return found

    def _ask(self, what: dict[str, object]) -> dict[str, list[str]]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        watch = threading.Timer(MAX_WAIT_S, self._process.kill)
        watch.start()
        try:
            for line in self._process.stdout:
                if line.startswith("@@"):
                    answer: dict[str, list[str]] = json.loads(line[2:])
                    return answer
        finally:
            watch.cancel()
        raise RunError("mem0 ended before it answered.", "Its own output above says why.")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._server.shutdown()
        self._scratch.cleanup()

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        embedder = self._embedder

        class Handler(http.server.BaseHTTPRequestHandler):
            """OpenAI's embeddings, and nothing else."""

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                texts = [asked["input"]] if isinstance(asked["input"], str) else asked["input"]
                rows = [
                    {"object": "embedding", "index": n, "embedding": [float(x) for x in vector]}
                    for n, vector in enumerate(embedder.embed(texts))
                ]
                usage = {"prompt_tokens": 0, "total_tokens": 0}
                body = json.dumps({"object": "list", "data": rows, "model": "hashed", "usage": usage}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                return None

        return Handler
