"""Memory in whole runs, and between machines: processes as users start them."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import Process, Runs, processes_of, until

from shoal.memory.keeper import Keeper
from shoal.memory.recalling import entries_of, without_notes
from shoal.memory.screening import RECALLED_CLOSE, RECALLED_OPEN
from tiny import tiny_config, write_config

sys.path.append(str(Path(__file__).parents[1] / "memory"))

from memory_makers import make_entry, make_trial

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ADVICE = "Begin with a digit: 0? 1? 2? 3? 4? 5? 6? 7? 8? 9? 10? 11? 12? 13?"
"""About the first questions of `FirstDigit`, so that it is found for them."""


def test_a_run_that_recalls_shows_notes_and_learns_what_they_were_worth(runs: Runs) -> None:
    folder = runs.path / "memories"
    with Keeper(folder, "somebody") as keeper:
        entry = keeper.add(make_entry(ADVICE, family="digit"))
        trials = [make_trial(number, 0.0, 1.0, family="digit") for number in range(100)]
        assert keeper.report(entry.id, trials).verdict == "accept"
    changes = {
        "model__context_tokens": 250,
        "workers__cache_tokens": 8192,
        "memory": {"recall": True, "folder": str(folder), "share": 0.5, "max_tokens": 220},
        "run__steps": 6,
        "eval": {"before": False, "after": False},
    }
    train = runs.train(**changes)
    assert train.wait() == 0, train.said + runs.run.logs()
    runs.run.check(steps=6)
    episodes = [one for batch in runs.run.episodes().values() for one in batch]
    noted = [one for one in episodes if entries_of(one.task)]
    assert 0 < len(noted) < len(episodes), "a share of the tasks goes without"
    for one in episodes:
        notes = without_notes(one.task)[1]
        assert bool(notes) == (entries_of(one.task) == (entry.id,))
        assert not notes or (notes.startswith(RECALLED_OPEN) and notes.endswith(RECALLED_CLOSE) and ADVICE in notes)
        # What was sampled from is what the task says.
        assert (len(one.turns[0].context_ids) > len(ADVICE)) == bool(notes)

    learnt = runs.shoal("memory", "learn", runs.path / "runs" / "tiny", "--folder", folder, "--json")
    assert learnt.wait() == 0, learnt.said
    assert learnt.result["episodes"] == len(episodes) and learnt.result["uses"] == len(noted)
    with Keeper(folder, "somebody") as keeper:
        assert keeper.memory(entry.id).uses == len(noted)


def test_machines_share_memories_and_try_each_others_candidates(runs: Runs) -> None:
    host = runs.shoal("agent", "host", "pond", "--json")
    until(lambda: host.out.read_text().strip(), host)
    ticket = runs.path / "ticket.txt"
    ticket.write_text(host.result["ticket"])
    tables = tiny_config(runs.model, runs.path / "runs", model__context_tokens=250, workers__cache_tokens=8192)
    config = write_config(runs.path / "world.toml", tables)

    def memory(machine: str, *words: str | Path) -> Process:
        folder, home = runs.path / machine / "memories", runs.path / machine / "home"
        return runs.shoal("memory", *words, "--folder", folder, SHOAL_HOME=str(home))

    def result(machine: str, *words: str) -> dict[str, Any]:
        done = memory(machine, *words, "--json")
        assert done.wait() == 0, done.said
        return done.result

    written = result("ann", "add", "Begin with a digit.", "--family", "digit")
    ann, bob = (memory(name, "join", ticket, "--config", config, "--name", name) for name in ("ann", "bob"))
    until(lambda: "trials of: digit" in ann.said, ann)
    until(lambda: "trials of: digit" in bob.said, bob)

    def known(machine: str) -> dict[str, Any]:
        rows = (
            result(machine, "list", "--status", "all")["memories"]
            if (runs.path / machine / "memories").exists()
            else []
        )
        return {row["id"]: row["status"] for row in rows}

    until(lambda: known("bob").get(written["id"], "candidate") != "candidate", bob)
    decided = known("bob")[written["id"]]
    until(lambda: known("ann").get(written["id"]) == decided, ann)
    for process in (ann, bob):
        process.send(signal.SIGTERM)
        assert process.wait() == 0, process.said
    ran = {
        name: int(process.said.split(" trials run for")[0].split()[-1])
        for name, process in (("ann", ann), ("bob", bob))
    }
    shown = result("bob", "show", written["id"])
    assert shown["trials"] > 0 and ran["bob"] > 0 and sum(ran.values()) >= shown["trials"]
    audited = result("bob", "audit")
    assert [row["entry"] for row in audited["decisions"]] == [written["id"]] and audited["wrong"] == 0
    host.send(signal.SIGTERM)
    assert host.wait() == 0
    assert processes_of(runs.path) == []
