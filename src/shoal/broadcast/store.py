"""Chunks by hash and manifests by version, in a directory.

    DIR/chunks/ab/abcd…      one chunk, named by its BLAKE3 hash; shared by every version that contains it
    DIR/manifests/MODEL/000000000012      one signed manifest
    DIR/new/                 files being written

Invariants: a file appears whole or not at all (written in `new`, then renamed), so a process killed at any moment
leaves a valid store; a manifest appears only after all chunks of one of its bodies (those that the node wants of them);
what a kept version is made from (its change, its parent's, … down to whole bytes) is kept as long as it is; bytes that
come out were verified on the way out, and damaged files are removed and counted, as if they had never been there; only
manifests signed by the trusted key for this run go in or come out. Blocking calls: use a thread from asyncio.
Thread-safe.

Several processes may read a directory; one writes and prunes it, because what one process is about to name in a
manifest another's `prune` cannot know.
"""

from __future__ import annotations

import errno
import math
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from blake3 import blake3

from shoal.broadcast.chain import Published, follows, open_manifest
from shoal.errors import RecordError, StorageError
from shoal.protocol.codec import decode, encode
from shoal.protocol.snapshot import HASH_BYTES, Body, SignedManifest

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
VERSION_DIGITS = 12
ABANDONED_AFTER_S = 3600.0
"""A file left in `new` for this long belongs to a dead writer."""

MAX_CHAIN = 512
"""Most manifests given at once; a chain between two anchors is much shorter."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Store:
    """The published versions of one run, as far as this node has them.

    Args:
        durable: wait for the disk before a file counts as written. A node that can fetch again need not.
        max_bytes: of chunks. Before they would be more, all versions but each model's newest are dropped.
        read_only: never create, change or remove anything; for reading a directory that another process writes.
    """

    def __init__(
        self,
        directory: Path,
        *,
        run: str,
        trusted_key: bytes,
        durable: bool = True,
        read_only: bool = False,
        max_bytes: float = math.inf,
    ) -> None:
        self.directory = directory
        self.run = run
        self.trusted_key = trusted_key
        self.num_damaged = 0
        """Files found damaged (and removed, unless read-only)."""
        self._durable = durable
        self._read_only = read_only
        self._max_bytes = max_bytes
        self._num_bytes = 0
        """Of all chunks; kept where there is a limit."""
        self._lock = threading.Lock()
        self._unnamed: set[bytes] = set()
        """Chunks put by a writer whose manifest is still to come: not garbage, though nothing names them yet."""
        if read_only:
            return
        with self._telling_errors():
            for part in ("chunks", "manifests", "new"):
                (directory / part).mkdir(parents=True, exist_ok=True)
            for path in (directory / "new").iterdir():
                # Another store in this directory may put it in its place just now.
                with suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > ABANDONED_AFTER_S:
                        path.unlink()
            self._measure()

    def put_chunk(self, data: bytes | memoryview, digest: bytes | None = None) -> bytes:
        """Keep a chunk and return its hash; `digest` is that hash where the caller has just computed it.

        Raises:
            StorageError: the disk is full or cannot be written, or the limit does not hold one version.
        """
        digest = digest or blake3(data).digest()
        with self._lock:
            self._unnamed.add(digest)
        path = self._chunk_path(digest)
        if not path.exists():
            self._make_room(len(data))
            self._write(path, data)
            with self._lock:
                self._num_bytes += len(data)
        return digest

    def abandon(self, digests: Collection[bytes]) -> None:
        """No manifest that names these chunks is to come: where none here does, they are garbage."""
        with self._lock:
            self._unnamed.difference_update(digests)

    def _measure(self) -> None:
        if self._max_bytes < math.inf:
            self._num_bytes = sum(path.stat().st_size for path in (self.directory / "chunks").glob("??/*"))

    def _make_room(self, num_bytes: int) -> None:
        if self._num_bytes + num_bytes <= self._max_bytes:
            return
        for model in os.listdir(self.directory / "manifests"):
            self.prune(model, 1)
        if self._num_bytes + num_bytes > self._max_bytes:
            raise StorageError(
                f"the newest snapshots do not fit into the {self._max_bytes:,.0f} bytes allowed in {self.directory}.",
                "Allow more, or leave the limit out.",
            )

    def get_chunk(self, digest: bytes) -> bytes | None:
        """The chunk with this hash, verified; `None` if it is not here (any more)."""
        path = self._chunk_path(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._error(error) from error
        if blake3(data).digest() != digest:
            self._remove_damaged(path)
            return None
        return data

    def has(self, digest: bytes) -> bool:
        """Whether a file for this chunk is here; `get_chunk` says whether it is sound."""
        return self._chunk_path(digest).exists()

    def put_manifest(self, signed: SignedManifest, *, needed: Collection[bytes] | None = None) -> Published:
        """Keep a manifest; all chunks of its change, or of its whole tensors, must be here.

        Args:
            needed: the chunks that must be here instead, for a node that wants some tensors only.

        Raises:
            RecordError: not signed for this run, not following its parent, or in conflict with a version kept.
            StorageError: a chunk is missing, or the disk cannot be written.
        """
        published = open_manifest(signed, self.trusted_key, self.run)
        manifest = published.manifest
        kept = self.manifest(manifest.model, manifest.version)
        if kept is not None and kept.hash != published.hash:
            raise RecordError(f"two different manifests claim version {manifest.version} of {manifest.model!r}.")
        for older in self.versions(manifest.model):
            parent = self.manifest(manifest.model, older)
            if parent is not None and parent.hash == manifest.parent and not follows(parent, manifest):
                raise RecordError(f"version {manifest.version} of {manifest.model!r} does not follow its parent.")
        ways = [body.chunks for body in manifest.bodies] if needed is None else [needed]
        missing = min(sum(not self.has(digest) for digest in chunks) for chunks in ways)
        if missing:
            raise StorageError(
                f"version {manifest.version} of {manifest.model!r} lacks {missing} chunks in {self.directory}.",
                "Fetch it again.",
            )
        if kept is None:
            self._write(self._manifest_path(manifest.model, manifest.version), encode(signed))
        with self._lock:
            for body in manifest.bodies:
                self._unnamed.difference_update(body.chunks)
        return published

    def has_body(self, body: Body) -> bool:
        """Whether all its chunks are here."""
        return all(self.has(digest) for digest in body.chunks)

    def chain(self, model: str, version: int, *, since: int = -1, limit: int = MAX_CHAIN) -> list[Published]:
        """Manifests from `version` back, newest first: down to the one after `since` or, where that is -1, to the
        first with whole bytes. As far as they are here, and at most `limit`."""
        found: list[Published] = []
        older = [v for v in self.versions(model) if v <= version]
        while older and len(found) < limit:
            published = self.manifest(model, older.pop())
            if published is None or (not found and published.manifest.version != version):
                break
            if found and (published.hash != found[-1].manifest.parent or published.manifest.version <= since):
                break
            found.append(published)
            if since < 0 and published.manifest.is_anchor:
                break
        return found

    def manifest(self, model: str, version: int) -> Published | None:
        """The manifest of one version, checked; `None` if it is not here."""
        path = self._manifest_path(model, version)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._error(error) from error
        try:
            published = open_manifest(decode(data, SignedManifest), self.trusted_key, self.run)
        except RecordError:
            self._remove_damaged(path)
            return None
        if (published.manifest.model, published.manifest.version) != (model, version):
            self._remove_damaged(path)
            return None
        return published

    def versions(self, model: str) -> list[int]:
        """Versions with a manifest here, oldest first."""
        directory = self._manifest_path(model, 0).parent
        try:
            names = os.listdir(directory)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._error(error) from error
        return sorted(int(name) for name in names if name.isdigit() and len(name) == VERSION_DIGITS)

    def latest(self, model: str) -> Published | None:
        """The newest sound manifest here."""
        for version in reversed(self.versions(model)):
            published = self.manifest(model, version)
            if published is not None:
                return published
        return None

    def prune(self, model: str, keep: int) -> int:
        """Drop all but the newest `keep` versions of `model` and what they are made from, and chunks that no manifest
        names; count the chunks."""
        assert keep >= 1
        with self._telling_errors(), self._lock:
            versions = self.versions(model)
            needed = set(versions[-keep:])
            if needed:
                needed.update(p.manifest.version for p in self.chain(model, min(needed)))
            for version in versions:
                if version not in needed:
                    self._manifest_path(model, version).unlink(missing_ok=True)
            named = set(self._unnamed)
            for directory in (self.directory / "manifests").iterdir():
                for version in self.versions(directory.name):
                    published = self.manifest(directory.name, version)
                    if published is not None:
                        named.update(digest for body in published.manifest.bodies for digest in body.chunks)
            kept_names = {digest.hex() for digest in named}
            dropped = [path for path in (self.directory / "chunks").glob("??/*") if path.name not in kept_names]
            for path in dropped:
                path.unlink(missing_ok=True)
            self._measure()
        return len(dropped)

    def _chunk_path(self, digest: bytes) -> Path:
        assert len(digest) == HASH_BYTES
        name = digest.hex()
        return self.directory / "chunks" / name[:2] / name

    def _manifest_path(self, model: str, version: int) -> Path:
        if not MODEL_NAME.fullmatch(model) or not 0 <= version < 10**VERSION_DIGITS:
            raise RecordError(f"{model!r} version {version} cannot name a snapshot.")
        return self.directory / "manifests" / model / f"{version:0{VERSION_DIGITS}d}"

    def _remove_damaged(self, path: Path) -> None:
        self.num_damaged += 1
        if not self._read_only:
            with self._telling_errors():
                path.unlink(missing_ok=True)

    def _write(self, path: Path, data: bytes | memoryview) -> None:
        assert not self._read_only
        aside = self.directory / "new" / secrets.token_hex(12)
        with self._telling_errors():
            try:
                with open(aside, "xb") as file:
                    file.write(data)
                    file.flush()
                    if self._durable:
                        os.fsync(file.fileno())
                try:
                    os.replace(aside, path)
                except FileNotFoundError:  # the first chunk in its folder
                    path.parent.mkdir(exist_ok=True)
                    os.replace(aside, path)
            except BaseException:
                aside.unlink(missing_ok=True)
                raise
            if self._durable:
                descriptor = os.open(path.parent, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    @contextmanager
    def _telling_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> StorageError:
        if error.errno in NO_SPACE:
            free = shutil.disk_usage(self.directory).free
            return StorageError(
                f"no space left for snapshots in {self.directory} ({free:,} bytes free).",
                "Free some space, keep fewer versions, or put the run on another disk.",
            )
        return StorageError(
            f"the snapshot store in {self.directory} cannot be used: {error.strerror}.", "Check its permissions."
        )
