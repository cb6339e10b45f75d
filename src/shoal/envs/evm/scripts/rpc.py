"""JSON-RPC for scripts: the bytes of a question, or of a batch of them, and the bytes of its answer.

Invariants: what is not in `METHODS` is refused, whatever chain is behind; the sizes of questions and answers, their
number and the time that a script may keep its chain busy are bounded; nothing that is asked raises.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

from shoal.envs.evm.chain import ChainBackend, ChainError, Reverted
from shoal.envs.evm.record import Record
from shoal.envs.evm.scripts.methods import INVALID_PARAMS, METHODS, REFUSED, ChainReader, RpcError

MAX_QUESTIONS = 512
"""Of one script."""
MAX_CHAIN_S = 10.0
"""A script's calls take this long together, by the clock: a call may burn 10 million gas, up to 0.2 s of ours."""
MAX_BATCH = 100
"""Questions in one body; clients send no more by default."""
MAX_BODY_BYTES = 256 << 10
MAX_ANSWER_BYTES = 1 << 20
"""Of one body's answers together."""

PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND, EXECUTION = -32700, -32600, -32601, 3


@dataclass
class RpcSession:
    """One script's questions to one chain."""

    chain: ChainBackend
    record: Record
    questions_left: int = MAX_QUESTIONS
    seconds_left: float = MAX_CHAIN_S
    failure: ChainError | None = None
    """The chain itself failed: not the script's fault."""
    _room: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._reader = ChainReader(self.chain, self.record)

    def answer(self, body: bytes) -> bytes:
        """The answer to one HTTP body: a question or a batch of them."""
        try:
            asked = json.loads(body)
        except (ValueError, RecursionError):
            return _dump(_failed(None, RpcError(PARSE_ERROR, "the body is not JSON")))
        self._room = MAX_ANSWER_BYTES
        if not isinstance(asked, list):
            return self._one(asked)
        if not 0 < len(asked) <= MAX_BATCH:
            return _dump(_failed(None, RpcError(INVALID_REQUEST, f"a batch has 1 to {MAX_BATCH} questions")))
        return b"[" + b",".join(self._one(question) for question in asked) + b"]"

    def _one(self, question: Any) -> bytes:
        name = question.get("id") if isinstance(question, dict) else None
        if not isinstance(name, int | str | None) or len(str(name)) > 100:
            name = None
        try:
            content = _dump({"jsonrpc": "2.0", "id": name, "result": self._call(question)})
            if len(content) > self._room:
                raise RpcError(REFUSED, f"the answers are larger than {MAX_ANSWER_BYTES} bytes")
        except RpcError as error:
            content = _dump(_failed(name, error))
        except Reverted as reverted:
            said = f"execution reverted: {reverted}"
            content = _dump(_failed(name, RpcError(EXECUTION, said, "0x" + reverted.data.hex())))
        except ChainError as failure:
            self.failure = failure
            content = _dump(_failed(name, RpcError(REFUSED, "the chain does not answer")))
        self._room -= len(content)
        return content

    def _call(self, question: Any) -> Any:
        if not isinstance(question, dict) or not isinstance(question.get("method"), str):
            raise RpcError(INVALID_REQUEST, "a question is an object with a method")
        params = question.get("params", [])
        if not isinstance(params, list):
            raise RpcError(INVALID_PARAMS, "the parameters must be a list")
        method = METHODS.get(question["method"])
        if method is None:
            raise RpcError(METHOD_NOT_FOUND, _refusal(question["method"]))
        if not method.least <= len(params) <= method.most:
            raise RpcError(INVALID_PARAMS, f"wrong number of parameters for {question['method']}")
        if self.questions_left <= 0:
            raise RpcError(REFUSED, f"a script may ask {MAX_QUESTIONS} questions")
        if self.seconds_left <= 0:
            raise RpcError(REFUSED, f"a script may keep the chain busy for {MAX_CHAIN_S:.0f} s")
        self.questions_left -= 1
        started = time.monotonic()
        try:
            return method.run(self._reader, params)
        finally:
            self.seconds_left -= time.monotonic() - started


def _refusal(method: str) -> str:
    if "send" in method.lower() or method in ("eth_accounts", "eth_requestAccounts"):
        return "a script returns its transaction; the platform signs and sends it"
    return f"the method {method[:60]!r} is not offered"


def _failed(name: Any, error: RpcError) -> dict[str, Any]:
    said: dict[str, Any] = {"code": error.code, "message": str(error)}
    if error.data is not None:
        said["data"] = error.data
    return {"jsonrpc": "2.0", "id": name, "error": said}


def _dump(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()
