"""The browser of these tests: one for all of them, where this machine has one."""

from __future__ import annotations

import pytest

from shoal.envs.web.browser import BrowserError, require_browser


@pytest.fixture
def chromium() -> None:
    """Skips where there is no browser."""
    try:
        require_browser()
    except BrowserError as error:
        pytest.skip(f"needs a browser: {error}")
