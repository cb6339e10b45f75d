"""`shoal ticket` and `shoal revoke`: on a run that goes on, and on one that does not."""

from __future__ import annotations

import signal

import pytest
from runs import Runs, until

pytestmark = pytest.mark.timeout(300)

JOIN = ("--device", "cpu", "--max-sequences", "8", "--cache-tokens", "2048", "--json")


@pytest.mark.slow
def test_the_owner_lets_nodes_in_and_puts_them_out(runs: Runs) -> None:
    """A ticket for one admits one; a revoked worker ends and says why; a ticket that is taken back admits nobody."""
    train = runs.train("--workers", "0", envs__digit__type="tiny:Slow", run__steps=400)
    run = runs.run
    until(lambda: (run.path / "ticket.txt").exists(), train)
    made = runs.shoal("ticket", run.path, "--json")
    assert made.wait() == 0, made.said
    ticket = made.result["ticket"]
    assert made.result["uses"] == 1 and made.result["roles"] == ["worker"] and ticket != run.ticket
    worker = runs.shoal("worker", ticket, "--name", "attic", "--price", "0.25", "--region", "home", *JOIN)
    until(lambda: [e for e in run.events("node.joined") if e["name"] == "attic"], train, run)
    node_id = next(e["node"] for e in run.events("node.joined") if e["name"] == "attic")
    thief = runs.shoal("worker", ticket, "--name", "thief", *JOIN)
    assert thief.wait() == 2 and "as often as it may" in thief.said, thief.said

    revoked = runs.shoal("revoke", run.path, "attic", "--ticket", ticket, "--json")
    assert revoked.wait() == 0, revoked.said
    assert revoked.result == {"nodes": [node_id], "tickets": 1, "admitted": [], "open_tickets": 0}
    assert worker.wait() == 2 and "taken back" in worker.said and "Traceback" not in worker.said, worker.said
    left = {e["name"]: e["reason"] for e in run.events("node.left")}
    assert left["attic"] == "revoked"
    unknown = runs.shoal("revoke", run.path, "nobody")
    assert unknown.wait() == 2 and "no node nobody" in unknown.said

    train.send(signal.SIGINT)
    assert train.wait() == 130, train.said
    late = runs.shoal("ticket", run.path, "--role", "observer", "--uses", "2", "--hours", "0.5", "--json")
    assert late.wait() == 0, late.said
    assert late.result["ticket"] not in (ticket, run.ticket) and late.result["roles"] == ["observer"]
    taken = runs.shoal("revoke", run.path, "--ticket", run.path / "ticket.txt")
    assert taken.wait() == 0 and "tickets taken back: 1" in taken.out.read_text(), taken.said
    again = runs.shoal("revoke", run.path, "--ticket", run.path / "ticket.txt")
    assert again.wait() == 2 and "taken back already" in again.said


def test_what_cannot_be_asked_is_said(runs: Runs) -> None:
    wrong = {
        ("ticket", "runs/none"): "there is no run",
        ("ticket", "runs/none", "--role", "learner"): "only the run's own learner",
        ("ticket", "runs/none", "--uses", "0"): "uses",
        ("revoke", "runs/none"): "nothing to take back",
        ("revoke", "runs/none", "0123456789abcdef"): "there is no run",
    }
    asked = {arguments: runs.shoal(*arguments) for arguments in wrong}
    for arguments, reason in wrong.items():
        assert asked[arguments].wait() == 2 and reason in asked[arguments].said, asked[arguments].said
        assert "Traceback" not in asked[arguments].said
