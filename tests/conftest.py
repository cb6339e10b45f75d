"""What all tests share: where Shoal is, which hardware is here, and how hypothesis behaves.

Processes that tests start import the same sources as the tests do, and never the network's idea of a home: a test
that needs a node's own data directory takes `shoal_home`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

REPOSITORY = Path(__file__).parents[1]

os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY / "src"), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

# Machines that run tests are busy: a slow example is no finding.
settings.register_profile("all", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# The quick tests judge a change by the same examples every time; `make test-all` looks for new ones.
settings.register_profile("quick", settings.get_profile("all"), max_examples=50, derandomize=True)


def pytest_configure(config: pytest.Config) -> None:
    """Choose how hypothesis behaves."""
    settings.load_profile("quick" if config.getoption("markexpr") == "not slow" else "all")


@pytest.fixture
def repository() -> Path:
    """The checkout that is being tested."""
    return REPOSITORY


@pytest.fixture
def shoal_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data directory for the identity and caches of this test's node and its child processes."""
    home = tmp_path / "shoal-home"
    monkeypatch.setenv("SHOAL_HOME", str(home))
    return home


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot do, and say which part is missing."""
    marked = {name: [item for item in items if item.get_closest_marker(name)] for name in ("gpu", "netns")}
    for name, reason in (("gpu", _no_gpu), ("netns", _no_netns)):
        missing = reason() if marked[name] else ""
        for item in marked[name] if missing else []:
            item.add_marker(pytest.mark.skip(reason=missing))


def _no_gpu() -> str:
    if importlib.util.find_spec("torch") is None:
        return "needs torch"
    import torch

    return "" if torch.cuda.is_available() else "needs a CUDA device"


def _no_netns() -> str:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "needs root and iproute2 to make network namespaces"
    name = f"shoal-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, timeout=30, check=False)
    if made.returncode != 0:
        return f"needs a kernel that lets root make network namespaces: {made.stderr.decode().strip()}"
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=30, check=False)
    return ""
