"""The memory store as the console reads it."""

from __future__ import annotations

from pathlib import Path

from shoal.memory.events import Added, Decided, Used
from shoal.memory.records import Entry, Provenance
from shoal.memory.store import Store
from shoal.serving.console.memories import STORE, Memories


def remember(folder: Path, *texts: str) -> list[str]:
    """Entries that were admitted and used once; gives their ids."""
    entries = [Entry(text=text, family="shop", provenance=Provenance(rule="manual")) for text in texts]
    with Store(folder / STORE, "here") as store:
        for number, entry in enumerate(entries, start=1):
            store.record(
                Added(entry=entry),
                Decided(
                    entry=entry.id, accepted=True, reason="it helps", weight=0.1 * number, candidate=number,
                    discoveries=number - 1, num_trials=0, log_e=3.0,
                ),
                Used(entry=entry.id, utility=0.5, share=0.1),
            )  # fmt: skip
    return [entry.id for entry in entries]


def test_entries_weights_and_audits(tmp_path: Path) -> None:
    memories = Memories(tmp_path)
    assert not memories.read()
    assert memories.memory("0" * 40) is None
    first, second = remember(tmp_path, "Write the answer alone.", "Pay in wei.")
    assert memories.read()
    assert not memories.read()
    assert [(row.id, row.status, row.uses) for row in memories.rows] == [(second, "active", 1), (first, "active", 1)]
    assert memories.held[0] == 2
    assert [row.id for row, _ in memories.weightiest] == [second, first]
    found = memories.memory(first)
    assert found is not None
    assert [moment.kind for moment in found.moments] == ["added", "decided", "used"]
    assert found.moments[0].weight == 0.0
    assert found.moments[1].weight == 0.1
    assert found.moments[-1].weight == found.memory.weight
    ((node, wrong),) = found.audits
    assert node == "here"
    assert wrong, "no trial is kept that says so"
    assert memories.memory("0" * 40) is None
    memories.close()


def test_a_file_that_is_no_store_is_said_to_be(tmp_path: Path) -> None:
    (tmp_path / STORE).write_bytes(b"nonsense " * 1000)
    memories = Memories(tmp_path)
    assert memories.read()
    assert "cannot be" in memories.problem
