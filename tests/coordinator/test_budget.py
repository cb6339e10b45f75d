"""A run that may cost no more stops in order; the owner's commands run without a shell, and end with the run."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from made import config, new_control, report, submission, void
from msgspec.structs import replace

from shoal.coordinator.control import Control
from shoal.coordinator.costs import costs
from shoal.coordinator.draining import LAST_ROLLOUTS_S, MOST_S
from shoal.coordinator.hooks import Hooks
from shoal.coordinator.rundir import RunDir
from shoal.coordinator.summary import summarise
from shoal.errors import RunError
from shoal.planning.activation import Offer
from shoal.protocol.work import Submission

PRICES = {"budget__learner_usd_per_hour": 3600.0, "budget__max_usd": 100.0, "rollout__lease_timeout_s": 1e4}
"""A dollar a second, and what a drain takes counts with a minute: 40 s are left."""


def make(tmp_path: Path, **changes: Any) -> Control:
    control = new_control(
        config(tmp_path, eval__before=False, eval__after=False, **changes), tmp_path / "runs" / "tiny"
    )
    control.stepped(report(0, metrics=False), {})
    control.provisioning.see([], 0.0)
    return control


def events(tmp_path: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (tmp_path / "runs/tiny/events.jsonl").read_text().splitlines()]
    return [line["data"] for line in lines if line["kind"] == kind]


def test_without_a_bound_nothing_ends(tmp_path: Path) -> None:
    control = make(tmp_path, budget__learner_usd_per_hour=3600.0)
    control.tick(10.0**6)
    assert control.drain is None and not control.ended


def test_a_run_drains_saves_and_says_what_to_do(tmp_path: Path) -> None:
    control = make(tmp_path, **PRICES)
    held = control.lease("ann", 64, 0.0).lease
    assert held is not None
    control.tick(39.0)
    assert control.drain is None
    control.tick(41.0)
    assert control.drain is not None and not control.ended
    assert control.lease("bob", 64, 41.0).lease is None, "nothing new starts"
    assert control.why_idle("bob", 41.0) == ("parked", "the budget of 100 USD is used up")
    reply = control.batch(0, 42.0)
    assert reply.save and reply.episodes is None and not reply.ended
    control.stepped(report(0, metrics=False, checkpointed=True), {})
    control.drain.saved(43.0)
    assert not control.batch(0, 43.5).save, "once is enough"
    control.tick(44.0)
    assert not control.ended, "what runs may end"
    verdicts = asyncio.run(control.submit(submission(held, "ann"), "ann", 45.0))
    assert set(verdicts.values()) == {"accepted"}
    control.tick(46.0)
    assert control.ended and isinstance(control.failure, RunError)
    assert "100 USD is used up" in control.failure.problem and "its state is saved" in control.failure.problem
    assert "--resume" in control.failure.remedy
    assert events(tmp_path, "budget.drain")[0]["usd"] == pytest.approx(41.0)


def test_a_batch_that_was_formed_is_still_given(tmp_path: Path) -> None:
    control = make(tmp_path, **PRICES)
    for _ in range(3):
        held = control.lease("ann", 64, 0.0).lease
        assert held is not None
        asyncio.run(control.submit(submission(held, "ann"), "ann", 0.0))
    first = control.batch(0, 1.0).episodes
    control.tick(41.0)
    assert control.batch(0, 42.0).episodes == first, "the learner died in the step: it repeats it"
    assert control.batch(1, 43.0).save


def test_a_drain_ends_whatever_happens(tmp_path: Path) -> None:
    control = make(tmp_path, **PRICES)
    assert control.lease("ann", 64, 0.0).lease is not None
    control.tick(41.0)
    assert control.drain is not None
    control.drain.saved(50.0)
    control.tick(50.0 + LAST_ROLLOUTS_S - 1)
    assert not control.ended
    control.tick(50.0 + LAST_ROLLOUTS_S)
    assert control.ended
    silent = make(tmp_path / "silent", **PRICES)
    silent.tick(41.0)
    silent.tick(41.0 + MOST_S)
    assert silent.failure is not None and "did not save" in silent.failure.problem


# The owner's commands


def hooks(tmp_path: Path, **changes: Any) -> tuple[Hooks, RunDir]:
    run = RunDir.create(tmp_path / "runs" / "tiny")
    return Hooks(config(tmp_path, **{f"capacity__{key}": value for key, value in changes.items()}), run), run


async def until(tmp_path: Path, kind: str, count: int = 1) -> list[dict[str, Any]]:
    for _ in range(3000):
        if (tmp_path / "runs/tiny/events.jsonl").exists() and len(found := events(tmp_path, kind)) >= count:
            return found
        await asyncio.sleep(0.02)
    pytest.fail(f"no event {kind}")


def script(code: str) -> list[str]:
    return [sys.executable, "-c", code]


async def test_a_command_is_told_what_is_missing(tmp_path: Path) -> None:
    told = tmp_path / "told"
    code = f"import os; open({str(told)!r}, 'a').write(os.environ['SHOAL_RUN'] + os.environ['SHOAL_NEEDED_RATE'] + ' ')"
    made, _ = hooks(tmp_path, acquire=script(code))
    made.acquire(1.5, 0.5, 1000.0)
    assert (await until(tmp_path, "machine.acquire"))[0]["ok"]
    assert told.read_text() == "tiny2 "
    made.acquire(1.5, 0.5, 1299.0)
    made.acquire(1.5, 0.5, 1300.0)
    assert len(await until(tmp_path, "machine.acquire", 2)) == 2
    assert told.read_text() == "tiny2 tiny2 ", "not before acquire_every_s is over"
    await made.close()


async def test_a_machine_is_given_back_once(tmp_path: Path) -> None:
    told = tmp_path / "told"
    code = (
        f"import os; open({str(told)!r}, 'a').write(os.environ['SHOAL_NODE_NAME'] + ' '); raise SystemExit('no such')"
    )
    made, _ = hooks(tmp_path, release=script(code))
    made.release("f00", "attic")
    await until(tmp_path, "machine.release")
    made.release("f00", "attic")
    made.gone("f00")
    made.release("f00", "attic")
    found = await until(tmp_path, "machine.release", 2)
    assert told.read_text() == "attic attic "
    assert not found[0]["ok"] and "exit code 1: no such" in found[0]["why"]
    await made.close()


async def test_activations_and_parks_are_told_in_turn(tmp_path: Path) -> None:
    told = tmp_path / "told"

    def says(what: str) -> list[str]:
        return script(f"import os; open({str(told)!r}, 'a').write({what!r} + os.environ['SHOAL_NODE_NAME'] + ' ')")

    made, _ = hooks(tmp_path, on_activate=says("+"), on_park=says("-"))

    async def settled(**working: bool) -> str:
        """What is told until nothing is left to tell; one command of a kind at a time."""
        before = len(told.read_text().split()) if told.exists() else 0
        for _ in range(3000):
            made.settle(working, str.upper)
            if not any(not task.done() for task in made._tasks.values()):
                break
            await asyncio.sleep(0.02)
        return " ".join(sorted(told.read_text().split()[before:]) if told.exists() else [])

    assert await settled(ann=True, bob=True, cat=False) == "+ANN +BOB", "nobody is parked who never worked"
    assert await settled(ann=True, bob=True, cat=False) == ""
    assert await settled(ann=False, bob=True, cat=True) == "+CAT -ANN"
    made.gone("bob")
    assert await settled(ann=False, cat=True) == ""
    assert await settled(ann=True, bob=True, cat=True) == "+ANN +BOB"
    await made.close()


async def test_a_command_is_killed_with_its_children_when_its_time_is_over(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)"
    )
    made, _ = hooks(tmp_path, acquire=script(code), hook_timeout_s=2.0)
    made.acquire(1.0, 1.0, 0.0)
    found = await until(tmp_path, "machine.acquire")
    assert "longer than 2 s" in found[0]["why"]
    assert await _gone(int(pid.read_text()))
    await made.close()


async def test_closing_ends_what_runs_and_a_missing_program_is_an_event(tmp_path: Path) -> None:
    made, _ = hooks(tmp_path, acquire=script("import time; time.sleep(600)"), release=["/no/such/program"])
    made.acquire(1.0, 1.0, 0.0)
    made.release("f00", "attic")
    assert "No such file" in (await until(tmp_path, "machine.release"))[0]["why"]
    started = time.monotonic()
    await made.close()
    assert time.monotonic() - started < 600


async def _gone(pid: int) -> bool:
    async with asyncio.timeout(30):
        while True:
            try:
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                return True
            if state == "Z":
                return True
            await asyncio.sleep(0.05)


# What people are told


def test_the_summary_says_what_was_paid_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour of one worker at 8 USD: of four leases of four, one is void, one is rejected, one expires."""
    control = make(tmp_path, rollout__lease_timeout_s=1e4)
    control.provisioning.see([Offer("ann", rate=0.0, price_usd_per_hour=8.0)], 0.0)
    leases = [control.lease("ann", 64, 0.0).lease for _ in range(4)]
    held = [lease for lease in leases if lease is not None]
    assert len(held) == 4
    asyncio.run(control.submit(submission(held[0], "ann"), "ann", 1.0))
    nothing = Submission(lease=held[1].id, node_id="ann", episodes=tuple(void(held[1], i, "ann") for i in range(4)))
    asyncio.run(control.submit(nothing, "ann", 1.0))
    liar = submission(held[2], "ann")
    liar = replace(liar, episodes=tuple(replace(e, reward=9.0) for e in liar.episodes))
    asyncio.run(control.submit(liar, "ann", 1.0))
    control.tick(2e4)
    monkeypatch.setattr(time, "monotonic", lambda: 3600.0)
    told = summarise(control.config, control, seconds=1.0)
    assert told["usd"] == pytest.approx(8.0) and told["usd_idle"] == 0
    assert [told[f"usd_lost_{kind}"] for kind in ("void", "rejected", "expired", "stale")] == [2.0, 2.0, 2.0, 0.0]
    assert "usd_per_heldout_point" not in told and told["capacity"]["usd"] == pytest.approx(8.0)
    assert told["usd_by_machine"] == {"ann": pytest.approx(8.0)}
    control.evals.results.update({0: {"strict": 0.30}, 2: {"strict": 0.35}})
    assert costs(control, 3600.0)["usd_per_heldout_point"] == pytest.approx(8.0 / 5)
    control.evals.results[4] = {"strict": 0.29}
    assert "usd_per_heldout_point" not in costs(control, 3600.0), "nothing was gained"


def test_a_run_that_costs_nothing_tells_no_costs(tmp_path: Path) -> None:
    assert costs(make(tmp_path), 1e6) == {}
