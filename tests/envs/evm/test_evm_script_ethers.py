"""ethers is fetched once, kept, and never taken for what it is not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from shoal.envs.evm.scripts.ethers import ethers_folder
from shoal.errors import RunError
from shoal.sandbox.toolchain import find_deno


@pytest.fixture
def build() -> Path:
    """The real file."""
    try:
        return ethers_folder() / "ethers" / "ethers.min.js"
    except RunError as error:
        pytest.skip(str(error))


@pytest.fixture
def nowhere(shoal_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder without packages, a fresh home, and a registry that does not answer."""
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "http://127.0.0.1:9")
    here = tmp_path / "here"
    (here / "node_modules" / "ethers" / "dist").mkdir(parents=True)
    monkeypatch.chdir(here)
    return here / "node_modules" / "ethers" / "dist" / "ethers.min.js"


def test_a_package_at_hand_is_taken_and_kept(build: Path, nowhere: Path, shoal_home: Path) -> None:
    shutil.copy(build, nowhere)
    kept = ethers_folder()
    assert kept.is_relative_to(shoal_home)
    assert (kept / "ethers" / "ethers.min.js").read_bytes() == build.read_bytes()
    # Sandboxes run as another user.
    assert (kept / "ethers" / "ethers.min.js").stat().st_mode & 0o444 == 0o444
    nowhere.unlink()
    assert ethers_folder() == kept


def test_what_is_not_ethers_is_not_used(build: Path, nowhere: Path) -> None:
    if find_deno() is None:
        pytest.skip("Deno is not installed")
    nowhere.write_bytes(build.read_bytes() + b"\n")
    with pytest.raises(RunError, match="could not be fetched from npm's registry"):
        ethers_folder()
    shutil.copy(build, nowhere)
    kept = ethers_folder() / "ethers" / "ethers.min.js"
    nowhere.unlink()
    kept.write_bytes(b"export const ethers = {};")
    with pytest.raises(RunError, match="Run `npm install ethers`"):
        ethers_folder()
