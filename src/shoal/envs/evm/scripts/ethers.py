"""ethers v6 for TypeScript scripts: one file of npm's package, fetched once into Shoal's own folder.

The file is the package's own single-file build, which starts several times faster than its 150 modules. It is taken
from `node_modules` here where that has it, else fetched by Deno from npm's registry.

Invariant: a file whose hash is not the one below is never used.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from hashlib import blake2b
from pathlib import Path

from shoal.errors import RunError
from shoal.fabric.identity import data_dir
from shoal.sandbox.toolchain import find_deno

VERSION = "6.17.0"
BUILD_HASH = "d7dca82a84071bdfb3868738f0d88fc197e7109d09bf2856067e8b7a1b4376ff"
"""BLAKE2b-256 of the package's `dist/ethers.min.js`."""

FETCH_TIMEOUT_S = 300.0
_BUILD = Path("ethers/dist/ethers.min.js")
_PACKAGE = {"name": "ethers", "version": VERSION, "type": "module", "exports": "./ethers.min.js"}


def ethers_folder() -> Path:
    """A `node_modules` that holds ethers, and nothing else; made on first use.

    Raises:
        RunError: it is not here and cannot be fetched, or is not the file that it should be.
    """
    modules = data_dir() / "npm" / f"ethers-{VERSION}" / "node_modules"
    build = modules / "ethers" / "ethers.min.js"
    if build.is_file() and _hash(build) == BUILD_HASH:
        return modules
    here = Path("node_modules") / _BUILD
    if here.is_file() and _hash(here) == BUILD_HASH:
        _keep(here, build)
        return modules
    with tempfile.TemporaryDirectory(prefix="shoal-npm-") as folder:
        _keep(_fetch(Path(folder)), build)
    return modules


def _hash(file: Path) -> str:
    return blake2b(file.read_bytes(), digest_size=32).hexdigest()


def _keep(source: Path, build: Path) -> None:
    """Copy beside its place first: two processes may want it at once."""
    build.parent.mkdir(parents=True, exist_ok=True)
    package = build.parent / "package.json"
    package.write_text(json.dumps(_PACKAGE))
    part = build.with_suffix(f".{os.getpid()}")
    shutil.copyfile(source, part)
    # A sandbox may be another user.
    for path, mode in ((part, 0o644), (package, 0o644), (build.parent, 0o755), (build.parent.parent, 0o755)):
        path.chmod(mode)
    part.replace(build)


def _fetch(folder: Path) -> Path:
    deno = find_deno()
    remedy = "Run `npm install ethers` where Shoal is started, or connect to npm's registry once."
    if deno is None:
        raise RunError("ethers is not installed, and there is no Deno to fetch it with.", "Run: pip install deno")
    command = [deno, "install", "--quiet", "--node-modules-dir=auto", f"npm:ethers@{VERSION}"]
    environment = {**os.environ, "DENO_DIR": str(folder / "deno"), "DENO_NO_UPDATE_CHECK": "1"}
    (folder / "deno.json").write_text("{}")
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=FETCH_TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RunError(f"Deno did not fetch ethers within {FETCH_TIMEOUT_S:.0f} s.", remedy) from None
    build = folder / "node_modules" / _BUILD
    if done.returncode != 0 or not build.is_file():
        said = " ".join(done.stderr.split()[-40:])
        raise RunError(f"ethers {VERSION} could not be fetched from npm's registry: {said}", remedy)
    if _hash(build) != BUILD_HASH:
        raise RunError(f"what the registry gave as ethers {VERSION} is not that package.", "Check the registry in use.")
    return build
