"""What the lab's own tests need: a way out where TUN devices are missing, and patience on busy machines."""

from __future__ import annotations

import pytest

from shoal.lab import tun


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the packet lab need root and TUN; the reason names what is missing."""
    problem = tun.missing()
    for item in items:
        if problem and item.get_closest_marker("netns"):
            item.add_marker(pytest.mark.skip(reason=problem))
