"""Keys, the gate, receipts, streams."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.cli import serve
from shoal.errors import ConfigError, RecordError, StorageError
from shoal.fabric.identity import Identity
from shoal.serving import keys, receipt
from shoal.serving.api import Api
from shoal.serving.errors import ApiError
from shoal.serving.gate import LONGEST_RETRY_S, Gate


def test_a_key_is_known_by_its_hash_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    assert keys.load(path).names == {}
    made = {name: keys.add(path, name) for name in ("alice", "bob")}
    assert path.stat().st_mode & 0o077 == 0
    loaded = keys.load(path)
    assert {name: loaded.owner(key) for name, key in made.items()} == {"alice": "alice", "bob": "bob"}
    for wrong in ("", "alice", made["alice"][:-1], made["alice"] + "x", "x" * 100_000):
        assert loaded.owner(wrong) is None
    with pytest.raises(ConfigError):
        keys.add(path, "a name with spaces")
    path.write_text("nonsense\n")
    with pytest.raises(ConfigError, match="line 1"):
        keys.load(path)
    path.chmod(0o644)
    with pytest.raises(StorageError):
        keys.load(path)


@given(st.integers(1, 20), st.lists(st.tuples(st.integers(1, 8), st.booleans()), max_size=60))
def test_the_gate_never_holds_more_than_its_limit(limit: int, visits: list[tuple[int, bool]]) -> None:
    gate = Gate(limit)
    held = []
    for number, (count, leave) in enumerate(visits):
        stay = gate.enter(count, float(number))
        before = gate.inside
        try:
            stay.__enter__()
        except ApiError as error:
            assert gate.inside == before and before + count > limit
            assert error.status == (400 if count > limit else 429)
            assert error.status == 400 or 1 <= error.retry_after_s <= LONGEST_RETRY_S
        else:
            held.append(stay)
        assert gate.inside <= limit
        if leave and held:
            held.pop(0).__exit__(None, None, None)
    for stay in held:
        stay.__exit__(None, None, None)
    assert gate.inside == 0


def test_a_receipt_holds_only_as_it_was_signed() -> None:
    facts = {"model": "m", "rows": [{"tokens_per_s": 12.5, "name": "é"}]}
    signed = receipt.sign(Identity.generate(), facts)
    text = json.dumps(signed, indent=2)
    assert receipt.verified(text) == facts
    other = Identity.generate()
    for forged in (
        {**signed, "facts": {**facts, "model": "n"}},
        {**signed, "public_key": other.public_key.hex()},
        {**signed, "node": other.node_id},
        {**signed, "signature": "00" * 64},
        {"facts": facts},
        [],
    ):
        with pytest.raises(RecordError):
            receipt.verified(json.dumps(forged))
    for nonsense in ("", "{", "[" * 100_000, "x" * (receipt.MAX_RECEIPT_BYTES + 1)):
        with pytest.raises(RecordError):
            receipt.verified(nonsense)


def test_the_hash_of_weights_is_that_of_their_bytes(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).write_bytes(name.encode())
    files = [tmp_path / "b", tmp_path / "a"]
    before = receipt.weights_hash(files)
    assert before == receipt.weights_hash(files[::-1])
    (tmp_path / "a").write_bytes(b"c")
    assert receipt.weights_hash(files) != before


def test_the_command_says_what_a_receipt_says_and_refuses_a_changed_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "receipt.json"
    made = receipt.sign(Identity.generate(), {"model": "tiny", "rows": [{"part": "soak", "wrong_answers": 0}]})
    path.write_text(json.dumps(made))
    serve.run(verify_receipt=path)
    assert json.loads(capsys.readouterr().out) == {"node": made["node"], "facts": made["facts"]}
    path.write_text(json.dumps(made).replace("tiny", "huge"))
    with pytest.raises(RecordError, match="not its node's"):
        serve.run(verify_receipt=path)
    with pytest.raises(StorageError, match="cannot be read"):
        serve.run(verify_receipt=tmp_path / "none")


async def test_what_makes_a_stream_is_closed_with_it() -> None:
    """At once: it holds slots of the engine."""
    closed: list[bool] = []

    async def frames() -> AsyncGenerator[bytes]:
        try:
            while True:
                yield b"data"
        finally:
            closed.append(True)

    api = SimpleNamespace(metrics=SimpleNamespace(first_piece=SimpleNamespace(observe=lambda seconds: None)))
    made = frames()
    watched = Api._watched(api, made)  # type: ignore[arg-type]
    assert await anext(watched) == b"data"
    await watched.aclose()
    assert closed == [True]
