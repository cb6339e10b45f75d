"""Keys and node ids."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import StorageError
from shoal.fabric.identity import KEY_FILE, Identity, data_dir, node_id_of, verify


def test_made_once_then_kept(tmp_path: Path) -> None:
    home = tmp_path / "home"
    first = Identity.load_or_create(home)
    again = Identity.load_or_create(home)
    assert again.public_key == first.public_key and again.node_id == first.node_id == node_id_of(first.public_key)
    assert (home / KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert home.stat().st_mode & 0o777 == 0o700
    assert os.listdir(home) == [KEY_FILE]


def test_processes_that_start_together_agree(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\nfrom shoal.fabric.identity import Identity\nsys.stdin.readline()\n"
        "print(Identity.load_or_create(pathlib.Path(sys.argv[1])).node_id)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "home")]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    ids = {process.communicate("go\n")[0] for process in started}
    assert len(ids) == 1 and len(ids.pop().strip()) == 16


@pytest.mark.parametrize("damage", ["", "shoal identity 1\n", "x" * 200, "\udcff"])
def test_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    Identity.load_or_create(tmp_path)
    (tmp_path / KEY_FILE).write_bytes(damage.encode(errors="surrogateescape"))
    with pytest.raises(StorageError, match=r"damaged.*Restore") as caught:
        Identity.load_or_create(tmp_path)
    assert str(tmp_path / KEY_FILE) in caught.value.problem


def test_any_changed_digit_is_noticed(tmp_path: Path) -> None:
    Identity.load_or_create(tmp_path)
    path = tmp_path / KEY_FILE
    text = path.read_text()
    for position in range(17, len(text) - 1, 7):
        if text[position] == "\n":
            continue
        other = "0" if text[position] != "0" else "1"
        path.write_text(text[:position] + other + text[position + 1 :])
        with pytest.raises(StorageError):
            Identity.load_or_create(tmp_path)


def test_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    Identity.load_or_create(tmp_path)
    (tmp_path / KEY_FILE).chmod(0o644)
    with pytest.raises(StorageError, match="chmod 600"):
        Identity.load_or_create(tmp_path)


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="SHOAL_HOME"):
        Identity.load_or_create(tmp_path / "file" / "home")


def test_data_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_HOME", "/one")
    monkeypatch.setenv("XDG_DATA_HOME", "/two")
    assert data_dir() == Path("/one")
    monkeypatch.delenv("SHOAL_HOME")
    assert data_dir() == Path("/two/shoal")
    monkeypatch.delenv("XDG_DATA_HOME")
    assert data_dir() == Path.home() / ".local/share/shoal"


@given(st.binary(max_size=200), st.integers(0, 63), st.integers(1, 255))
def test_signature_covers_every_bit(message: bytes, position: int, flip: int) -> None:
    identity = Identity(bytes(range(32)))
    signature = identity.sign(message)
    assert verify(identity.public_key, message, signature)
    forged = bytearray(signature)
    forged[position] ^= flip
    assert not verify(identity.public_key, message, bytes(forged))
    assert not verify(identity.public_key, message + b"x", signature)
    assert not verify(Identity.generate().public_key, message, signature)


@given(st.binary(max_size=80), st.binary(max_size=80), st.binary(max_size=80))
def test_hostile_signatures_are_just_false(key: bytes, message: bytes, signature: bytes) -> None:
    assert not verify(key, message, signature)
