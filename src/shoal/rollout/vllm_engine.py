"""vLLM as a worker's engine: token ids in, token ids, log-probabilities and versions out, weights changed on the way.

    sample ──▶ gate ──▶ /v1/completions, streamed, by token ids                     any number at once
    load_weights ──▶ file ──▶ gate closed ──▶ nothing in flight ──▶ /pause ──▶ reload_weights ──▶ /resume ──▶ gate open

1. vLLM does not say which weights drew a token. So no request is in flight while weights change, and every token of one
   answer is of the version that was there when it was sent. Under `keep` and `finish` those in flight end first; under
   `recompute` they are cut off, and go on from their own tokens under the new weights, whose cache is computed again.
2. Tokens are not those that a lease's seed draws with our engine: a run that checks seeds takes no such worker.
3. On a CPU vLLM keeps a packed copy of a tied head, which a reload leaves as it was. There the server gets the
   checkpoint with the head as a matrix of its own (`_untie`), and so does every version.
4. Grammars are not passed on: masks that differ in one token from the learner's would spoil its ratios. A run that
   needs them ends this worker with words.

Invariants: the weights that answer as version v are v's, all of them (names are checked); a change that failed half way
ends the engine; prefix caches do not outlive the weights that filled them (vLLM's pause clears them).
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec

from shoal.broadcast.tensors import TensorView
from shoal.engine.local import pick_device
from shoal.engine.source import LocalModel
from shoal.engine.stats import EngineStats
from shoal.engine.tokenizer import Tokenizer
from shoal.engine.weights import to_views
from shoal.errors import CapacityError, ModelError
from shoal.protocol.sampling import Completion, FinishReason, SampleRequest, SwapPolicy
from shoal.protocol.work import WorkSpec
from shoal.rollout.vllm_server import (
    MODEL,
    Server,
    VllmOptions,
    cache_bytes_of,
    command_of,
    environment_of,
    find_python,
    private_folder,
    serving,
)
from shoal.rollout.weight_files import write_weights

STALL_S = 600.0
"""An answer that does not go on for so long never will."""

RELOAD_S = 600.0
"""Weights take seconds; those of a large model on slow disks, minutes."""

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
"""Of a tied model the first is there under the second's name."""


class _Logprobs(msgspec.Struct):
    token_logprobs: list[float | None]


class _Choice(msgspec.Struct):
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    """What is read of a piece of vLLM's stream."""

    choices: list[_Choice]


@dataclass
class _Drawn:
    """A completion on its way."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


class VllmEngine:
    """A `Sampler` over a server that answers.

    Args:
        names: of the checkpoint's tensors.
        on_swap: what becomes of completions under way when the weights change.
        untied: the server holds the head apart from the embeddings that it is tied to.
    """

    def __init__(
        self,
        server: Server,
        tokenizer: Tokenizer,
        names: frozenset[str],
        *,
        max_sequences: int,
        on_swap: SwapPolicy,
        untied: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.version = -1
        """Of the weights in place; -1: the checkpoint's own, as no version was loaded yet."""
        self._server = server
        self._names = names
        self._max_sequences = max_sequences
        self._on_swap = on_swap
        self._untied = untied
        self._gate = asyncio.Event()
        self._gate.set()
        self._loading = asyncio.Lock()
        self._live = 0
        """Requests in flight."""
        self._idle = asyncio.Event()
        self._idle.set()
        self._drawn = self._prompted = 0
        self._broken = ""

    async def sample(self, request: SampleRequest) -> Completion:
        """Complete one request.

        Raises:
            CapacityError: it can never fit.
            ModelError: vLLM has failed, or what is asked for is nothing that it does here.
        """
        if request.grammar is not None:
            raise ModelError(
                "an environment constrains what is said by a grammar, and --engine vllm does not draw by grammars.",
                "Use the local engine for this run.",
            )
        drawn = _Drawn()
        finish = "abort"
        while finish == "abort":
            await self._gate.wait()
            if self._broken:
                raise ModelError(self._broken)
            self._live += 1
            self._idle.clear()
            try:
                finish = await self._ask(request, drawn)
            finally:
                self._live -= 1
                if not self._live:
                    self._idle.set()
            if finish == "abort" and self._gate.is_set():
                break  # not by a change of weights
        reasons: dict[str, FinishReason] = {"stop": "stop", "length": "length"}
        return Completion(
            token_ids=tuple(drawn.ids),
            logprobs=tuple(drawn.logprobs),
            versions=tuple(drawn.versions),
            finish=reasons.get(finish, "error"),
            text=self.tokenizer.visible(drawn.ids, request.params.stop),
        )

    async def _ask(self, request: SampleRequest, drawn: _Drawn) -> str:
        """Draw on from what is there until the end, or until it is cut off; gives vLLM's reason."""
        version, before, finish, is_whole = self.version, len(drawn.ids), "", False
        self._prompted += len(request.prompt_ids) + len(drawn.ids)
        timeout = httpx.Timeout(STALL_S)
        try:
            body = self._body(request, drawn)
            async with self._server.client.stream("POST", "/v1/completions", json=body, timeout=timeout) as answer:
                if answer.status_code != 200:
                    said = (await answer.aread()).decode(errors="replace")[-500:]
                    if answer.status_code in (400, 422):
                        raise CapacityError(f"vLLM refuses the request: {said}")
                    raise ModelError(f"vLLM answers {answer.status_code}: {said}")
                async for line in answer.aiter_lines():
                    is_whole |= line == "data: [DONE]"
                    if not line.startswith("data: ") or is_whole:
                        continue
                    for choice in self._chunk(line.removeprefix("data: ")).choices:
                        finish = choice.finish_reason or finish
                        self._take(choice, version, drawn)
        except httpx.HTTPError:
            raise ModelError(self._server.trouble) from None
        if not finish and is_whole and len(drawn.ids) == before:
            return "abort"  # cut off before its first token, of which vLLM says nothing
        if not finish:
            raise ModelError(self._server.trouble)
        return "length" if finish == "abort" and len(drawn.ids) >= request.params.max_tokens else finish

    def _chunk(self, text: str) -> _Chunk:
        try:
            return msgspec.json.decode(text, type=_Chunk)
        except msgspec.MsgspecError:
            raise ModelError(f"{self._server.trouble} (it answered: {text[:300]})") from None

    def _take(self, choice: _Choice, version: int, drawn: _Drawn) -> None:
        ids = choice.token_ids or []
        logprobs = choice.logprobs.token_logprobs if choice.logprobs is not None else []
        if len(ids) != len(logprobs) or any(x is None or not math.isfinite(x) for x in logprobs):
            raise ModelError(f"vLLM gives {len(ids)} tokens and {len(logprobs)} log-probabilities, or some without.")
        drawn.ids += ids
        drawn.logprobs += [min(0.0, x) for x in logprobs if x is not None]
        drawn.versions += [version] * len(ids)
        self._drawn += len(ids)

    def _body(self, request: SampleRequest, drawn: _Drawn) -> dict[str, Any]:
        params, done = request.params, len(drawn.ids)
        body: dict[str, Any] = {
            "model": MODEL,
            "prompt": [*request.prompt_ids, *drawn.ids],
            "add_special_tokens": False,
            "max_tokens": params.max_tokens - done,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "stop": list(params.stop),
            "include_stop_str_in_output": True,
            "stop_token_ids": sorted(self.tokenizer.end_ids),
            "skip_special_tokens": False,
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,  # spares it the text of each
            "stream": True,
        }
        if params.seed is not None:
            body["seed"] = (params.seed + done) % 2**63  # a part that goes on draws other numbers than the first did
        return body

    async def load_weights(self, version: int, tensors: Mapping[str, TensorView]) -> float:
        """Put a version in place; gives the seconds in which nothing was drawn.

        Raises:
            ModelError: tensors are missing or unknown, and the old weights stay; or vLLM failed with it, and ends.
        """
        odd = (self._names ^ tensors.keys()) - {HEAD}
        if odd:
            raise ModelError(f"version {version} lacks '{min(odd)}', or the checkpoint does.", "Use its own model.")
        if self._untied:
            tensors = {**tensors, HEAD: tensors[EMBEDDINGS]}
        async with self._loading:
            folder = self._server.folder / "weights"
            await asyncio.to_thread(folder.mkdir, exist_ok=True)
            await asyncio.to_thread(write_weights, folder / "model.safetensors", tensors)
            loop = asyncio.get_running_loop()
            began = loop.time()
            self._gate.clear()
            try:
                await self._put(str(folder))
                self.version = version
            except ModelError as error:
                self._broken = error.problem
                raise
            except asyncio.CancelledError:
                self._broken = "a change of weights was broken off"
                raise
            finally:
                self._gate.set()
                (folder / "model.safetensors").unlink(missing_ok=True)
            return loop.time() - began

    async def _put(self, folder: str) -> None:
        """Change the weights, with nothing in flight."""
        if self._on_swap == "recompute":
            await self._post("/pause?mode=abort")
        await self._idle.wait()
        await self._post("/pause?mode=wait")
        await self._post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
        await self._post("/resume")

    async def _post(self, path: str, body: Mapping[str, Any] | None = None) -> None:
        try:
            answer = await self._server.client.post(path, json=body, timeout=RELOAD_S)
        except httpx.HTTPError:
            raise ModelError(self._server.trouble) from None
        if answer.status_code != 200:
            raise ModelError(f"vLLM answers {answer.status_code} to {path}: {answer.text[-500:]}")

    def stats(self) -> EngineStats:
        """What it counts of itself; vLLM's caches are its own affair."""
        return EngineStats(
            tokens_drawn=self._drawn,
            prompt_tokens=self._prompted,
            live=min(self._live, self._max_sequences),
            waiting=max(0, self._live - self._max_sequences),
            busy_s=0.0,
            cache_bytes=0,
            filling=0,
            reused_tokens=0,
            prefix_bytes=0,
        )


@asynccontextmanager
async def vllm_engine(
    model: LocalModel,
    spec: WorkSpec,
    options: VllmOptions,
    *,
    device: str,
    threads: int,
    max_sequences: int,
    cache_tokens: int,
) -> AsyncIterator[VllmEngine]:
    """An engine over a server of its own, which ends with the context.

    Raises:
        ModelError: there is no vLLM, or it does not take this checkpoint.
    """
    python = find_python(options)
    if model.weights is not None:
        raise ModelError(f"vLLM reads checkpoints from folders, and {model.weights} is a file.", "Name its folder.")
    on_cpu = pick_device(device).type == "cpu"
    width = {"bf16": 2, "fp32": 4}[spec.dtype]
    architecture = json.loads((model.directory / "config.json").read_text(encoding="utf-8"))
    environment = environment_of(
        python, on_cpu=on_cpu, threads=threads, cache_bytes=cache_bytes_of(architecture, cache_tokens, width)
    )
    names = await asyncio.to_thread(lambda: frozenset(model.tensors()))
    untied = on_cpu and bool(model.config().tie_word_embeddings) and EMBEDDINGS in names
    async with private_folder() as folder:
        directory = model.directory
        more = options.arguments
        if untied:
            directory = await asyncio.to_thread(_untie, model, folder / "model")
            more = ("--hf-overrides", json.dumps({"tie_word_embeddings": False}), *more)
        command = command_of(
            python,
            directory,
            folder / "vllm.sock",
            dtype=spec.dtype,
            on_cpu=on_cpu,
            context_tokens=spec.context_tokens,
            max_sequences=max_sequences,
            more=more,
        )
        async with serving(command, environment, folder) as server:
            tokenizer = await asyncio.to_thread(Tokenizer, model.directory)
            yield VllmEngine(server, tokenizer, names, max_sequences=max_sequences, on_swap=spec.on_swap, untied=untied)


def _untie(model: LocalModel, folder: Path) -> Path:
    """The checkpoint once more, with a head of its own; all but the weights are links."""
    folder.mkdir()
    for path in model.directory.iterdir():
        if path.is_file() and ".safetensors" not in path.name:
            (folder / path.name).symlink_to(path.resolve())
    tensors = to_views(model.tensors())
    write_weights(folder / "model.safetensors", {**tensors, HEAD: tensors[EMBEDDINGS]})
    return folder
