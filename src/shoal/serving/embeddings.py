"""`POST /v1/embeddings`, in OpenAI's shapes: floats, or their 32-bit little-endian bytes in base64."""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from shoal.engine.embedding import Embedder, shortened
from shoal.errors import CapacityError, ModelError
from shoal.serving.api import Api, unknown
from shoal.serving.errors import ApiError, bad_request
from shoal.serving.schema import MAX_INPUTS, EmbeddingBody, parsed


async def embeddings(api: Api, request: Request) -> Response:
    """A vector for each text."""
    body = parsed(await api.body(request), EmbeddingBody)
    embedder = api.embedder
    if embedder is None or body.model != api.embedding_model:
        raise unknown(body.model)
    if body.dimensions is not None and body.dimensions > embedder.size:
        raise bad_request(f"The model's vectors have {embedder.size} numbers.", "dimensions")
    inputs = token_ids(embedder, body)
    try:
        embedder.check(inputs)
    except CapacityError as error:
        raise bad_request(str(error), "input", "context_length_exceeded") from None

    async def work() -> dict[str, Any]:
        try:
            vectors = await embedder.embed(inputs)
        except CapacityError as error:
            retry_after_s = api.gate.retry_after_s()
            raise ApiError(429, str(error), code="overloaded", retry_after_s=retry_after_s) from None
        except ModelError as error:
            raise ApiError(503, str(error), code="engine_error") from None
        tokens = sum(map(len, inputs))
        return {
            "object": "list",
            "model": body.model,
            "data": [_entry(index, vector, body) for index, vector in enumerate(vectors)],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    return await api.answer_within(request, 1, work)


def token_ids(embedder: Embedder, body: EmbeddingBody) -> list[tuple[int, ...]]:
    """The texts as token ids; they may be given as ids."""
    given = body.input
    if isinstance(given, str):
        texts: Sequence[Any] = [given]
    else:
        texts = [given] if given and isinstance(given[0], int) else given
    if not 1 <= len(texts) <= MAX_INPUTS:
        raise bad_request(f"There must be between 1 and {MAX_INPUTS} texts.", "input")
    if not all(texts):
        raise bad_request("A text is empty.", "input")
    return [embedder.encode(text) if isinstance(text, str) else tuple(text) for text in texts]


def _entry(index: int, vector: Sequence[float], body: EmbeddingBody) -> dict[str, Any]:
    if body.dimensions is not None and body.dimensions < len(vector):
        vector = shortened(vector, body.dimensions)
    said: Any = vector
    if body.encoding_format == "base64":
        said = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
    return {"object": "embedding", "index": index, "embedding": said}
