"""Whether the Hugging Face Hub can be reached: its own client retries for minutes where there is no network."""

from __future__ import annotations

import os

import httpx

TIMEOUT_S = 5.0
"""How long the hub may take to answer at all before something else is tried."""


def answers() -> bool:
    """One request with a short deadline; none where `HF_HUB_OFFLINE` says that there is no hub."""
    from huggingface_hub import constants

    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return False
    try:
        httpx.head(constants.ENDPOINT, timeout=TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL):
        return False
    return True
