"""`shoal status`, `logs`, `debug dump`, `doctor` beside a real run; and what they and its terminal say of silence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import PATIENCE_S, Process, Run, Runs, child, until

from shoal.fabric.ticket import Ticket

pytestmark = pytest.mark.timeout(400)

LASTS = {"envs__digit__type": "tiny:Slow", "run__steps": 4000, "workers__max_sequences": 8, "eval__before": False}
"""A run that ends only when it is told to."""


def ask(runs: Runs, *arguments: str | Path, code: int = 0) -> Process:
    """A command that has ended."""
    process = runs.shoal(*arguments)
    assert process.wait() == code, process.said
    return process


def status(runs: Runs) -> dict[str, Any]:
    return ask(runs, "status", "--json").result


def until_status(runs: Runs, holds: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """Ask until it holds; each answer is a new process, as a user's is."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds(found := status(runs)):
        assert time.monotonic() < deadline, f"what was waited for is not told: {json.dumps(found)[:4000]}"
    return found


def node(told: dict[str, Any], name: str) -> dict[str, Any]:
    return next((dict(n) for n in told["nodes"] if n["name"] == name), {"state": "absent"})


def started(runs: Runs, **changes: Any) -> tuple[Process, Run]:
    """A run that has taken a step; its terminal's lines are in `.said`."""
    train = runs.shoal("train", runs.config(**LASTS, **changes))
    until(lambda: runs.run.steps, train, runs.run)
    return train, runs.run


@pytest.mark.slow
def test_silence_is_named_and_its_end_too(runs: Runs) -> None:
    """SIGSTOP a worker, the learner, the coordinator: the terminal and `shoal status` name it, until SIGCONT."""
    train, _ = started(runs)
    for name, word in (("local-1", "local-1"), ("learner", "_learner")):
        pid = child(train.pid, word)
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        told = until_status(runs, lambda s, name=name: any(t.startswith(f"{name} silent for") for t in s["silent"]))
        assert node(told, name)["state"] in ("silent", "lost")
        (sentence,) = [text for text in told["silent"] if text.startswith(f"{name} silent for")]
        assert f"process {pid} is stopped; `kill -CONT {pid}` lets it go on" in sentence
        until(lambda name=name: f"Waiting: {name}" in train.said, train)
        os.kill(pid, signal.SIGCONT)
        told = until_status(
            runs,
            lambda s, name=name: (
                node(s, name)["state"] in ("active", "idle") and not any(t.startswith(name) for t in s["silent"])
            ),
        )
        until(lambda name=name: f"No longer: {name} is silent" in train.said, train)
    steps = told["step"]
    until_status(runs, lambda s: s["step"] > steps)

    train.send(signal.SIGSTOP)
    said = ask(runs, "status", code=2).said
    assert f"its process {train.pid} is stopped; `kill -CONT {train.pid}`" in said and "Traceback" not in said
    dumped = ask(runs, "debug", "dump", "--output", "stopped.txt", "--json").result
    assert [row["answered"] for row in dumped["nodes"]] == [False]
    assert "State: T (stopped)" in (runs.path / "stopped.txt").read_text()
    log = runs.run.path / "logs" / "local-0.log"
    until(lambda: "the coordinator has been silent for" in log.read_text())
    train.send(signal.SIGCONT)
    until(lambda: "the coordinator answers again" in log.read_text(), train)
    steps = until_status(runs, lambda s: s["running"])["step"]
    until_status(runs, lambda s: s["step"] > steps)


def test_looking_at_a_run(runs: Runs) -> None:
    """As its owner and with a ticket, while it runs and after."""
    train, run = started(runs)
    told = until_status(runs, lambda s: all(node(s, n)["state"] == "active" for n in ("local-0", "local-1", "learner")))
    assert told["run"] == "tiny" and told["steps"] == 4000 and told["max_staleness"] == 2 and told["usd_per_hour"] == 0
    for name in ("local-0", "local-1"):
        seen = node(told, name)
        assert seen["role"] == "worker" and seen["status"]["doing"] and seen["status"]["pid"] != train.pid
    page = ask(runs, "status", "tiny").out.read_text()
    for words in ("run tiny, async: step", "coordinator", "learner", "local-0", "local-1", "no price named"):
        assert words in page, page

    elsewhere = runs.path / "elsewhere"
    elsewhere.mkdir()
    guest = runs.shoal("status", run.ticket, "--json", cwd=elsewhere)
    assert guest.wait() == 0, guest.said
    assert {n["name"] for n in guest.result["nodes"]} >= {"learner", "local-0", "local-1"}
    far = runs.shoal("logs", "local-0", "--run", run.ticket, "--json", cwd=elsewhere)
    assert far.wait() == 0 and far.result["file"] is None, far.said

    doctor = runs.shoal("doctor", run.ticket, "--json", cwd=elsewhere)
    assert doctor.wait() in (0, 1), doctor.said
    checks = {check["name"].split()[0]: check for check in doctor.result["checks"]}
    for name in ("processor", "memory", "disk", "keys", "coordinator", "admission", "clock", "versions", "round"):
        assert name in checks, [check for check in checks.values() if check["state"] != "ok"]
    for name in ("keys", "admission", "clock", "versions", "coordinator"):
        assert checks[name]["state"] == "ok", checks[name]
    assert all(check["state"] == "ok" or check["remedy"] for check in checks.values())

    dumped = ask(runs, "debug", "dump", "--output", "dump.txt", "--json").result
    assert {row["name"] for row in dumped["nodes"] if row["answered"]} >= {"coordinator", "learner", "local-0"}
    text = (runs.path / "dump.txt").read_text()
    assert (runs.path / "dump.txt").stat().st_mode & 0o077 == 0
    for words in ("shoal-engine", "learner/process.py", "Worker._lease_loop", "Coordinator._tick", "open files"):
        assert words in text, words
    secret = Ticket.decode(run.ticket).secret
    assert run.ticket not in text and secret.hex() not in text

    assert "step" in ask(runs, "logs", "coordinator").out.read_text()
    assert "no node 'nobody'" in ask(runs, "logs", "nobody", code=2).said
    following = runs.shoal("logs", "local-1", "--follow")
    train.send(signal.SIGINT)
    assert train.wait() == 130
    assert following.wait() == 0, following.said

    over = ask(runs, "status", "--json").result
    assert (over["running"], over["how"], over["last_event"]["kind"]) == (False, "stopped", "run.ended")
    assert over["next"] == f"shoal train --resume {run.path}" and over["step"] >= 1
    assert "is not running. It was stopped at step" in ask(runs, "status").out.read_text()
    assert "not running" in ask(runs, "debug", "dump", code=2).said
    left = ask(runs, "logs", "local-1", "--json").result
    assert any("left run tiny" in line for line in left["lines"])
    joined = {e["name"]: e["node"] for e in run.events("node.joined")}
    assert ask(runs, "logs", joined["local-1"], "--json").result["lines"] == left["lines"], "by its id, too"
    assert "It has ended" in ask(runs, "status", run.ticket, code=2).said


def test_runs_that_are_not_there(runs: Runs) -> None:
    assert "there is no run below 'runs'" in ask(runs, "status", code=2).said
    assert "there is no run 'nowhere' here" in ask(runs, "status", "nowhere", code=2).said
    assert "mistyped" in ask(runs, "status", "shoal1abcdefgh", code=2).said
    assert "exclude each other" in ask(runs, "status", "--watch", "--json", code=2).said
    assert "Ask for 1 to" in ask(runs, "logs", "learner", "--lines", "0", code=2).said


def test_doctor_fails_where_others_can_read_a_key(runs: Runs) -> None:
    key = runs.home / "workers" / "0" / "identity.key"
    key.parent.mkdir(parents=True)
    key.write_text("a key")
    key.chmod(0o644)
    checked = runs.shoal("doctor", "--json")
    assert checked.wait() == 1, checked.said
    (keys,) = [check for check in checked.result["checks"] if check["name"] == "keys"]
    assert keys["state"] == "failed" and keys["remedy"] == f"chmod 600 {key}"
    assert not [path.name for path in runs.home.iterdir() if path.name.startswith(".probe")], "nothing is left"
    key.chmod(0o600)
    mended = runs.shoal("doctor")
    mended.wait()
    assert "keys: 1 keys and tickets, readable by you alone" in mended.out.read_text()


def test_help_has_examples_and_no_torch_is_imported(runs: Runs) -> None:
    for command in ("status", "logs", "doctor"):
        page = ask(runs, command, "--help").out.read_text()
        assert "For example:" in page and f"shoal {command} " in page
    page = ask(runs, "debug", "dump", "--help").out.read_text()
    assert "shoal debug dump" in page and "For example:" in page
    code = (
        "import sys, shoal.cli.status, shoal.cli.logs, shoal.cli.doctor, shoal.cli.debug, shoal.cli.checks_network\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_S)
