"""`shoal router` and runs that go through it: everybody dials out, nobody is dialled."""

from __future__ import annotations

import json
import signal

import pytest
from runs import Process, Runs, until

from shoal.fabric.ticket import RouterAddress, Ticket


def start_router(runs: Runs, name: str, port: int = 0) -> tuple[Process, RouterAddress]:
    """A router with the identity of a name."""
    folder = runs.path / name
    router = runs.shoal("router", "--host", "127.0.0.1", "--port", str(port), "--identity", folder, "--json")
    said = until(lambda: router.out.read_text(), router)
    return router, RouterAddress.decode(json.loads(said)["line"])


def port_of(address: RouterAddress) -> int:
    return address.endpoints[0].port


def join(runs: Runs, number: int) -> Process:
    """A worker that knows only the run's ticket."""
    name = f"far-{number}"
    ticket = until(lambda: (runs.run.path / "ticket.txt").exists() and runs.run.ticket)
    assert Ticket.decode(ticket).endpoints == ()
    return runs.shoal("worker", ticket, "--name", name, "--identity", runs.path / name, "--json")


def test_a_run_through_a_router(runs: Runs) -> None:
    router, address = start_router(runs, "router")
    train = runs.train("--network.routers", address.encode(), run__steps=3, workers__count=0)
    workers = [join(runs, number) for number in range(2)]
    assert train.wait() == 0, train.said
    for worker in workers:
        assert worker.wait() == 0, worker.said
    router.send(signal.SIGTERM)
    assert router.wait() == 0
    runs.run.check(steps=3)


@pytest.mark.slow
def test_the_router_is_killed_and_started_again(runs: Runs) -> None:
    router, address = start_router(runs, "router")
    (runs.path / "line").write_text(address.encode() + "\n")
    train = runs.train("--network.routers", str(runs.path / "line"), run__steps=12, workers__count=0)
    worker = join(runs, 0)
    until(lambda: len(runs.run.steps) >= 2, train, runs.run)
    router.send(signal.SIGKILL)
    router.wait()
    _, again = start_router(runs, "router", port_of(address))
    assert again == address
    assert train.wait() == 0, train.said
    assert worker.wait() == 0, worker.said
    runs.run.check(steps=12)


@pytest.mark.slow
def test_one_of_two_routers_is_killed(runs: Runs) -> None:
    (first, one), (_, two) = start_router(runs, "one"), start_router(runs, "two")
    lines = f"{one.encode()},{two.encode()}"
    train = runs.train("--network.routers", lines, run__steps=12, workers__count=0)
    worker = join(runs, 0)
    until(lambda: len(runs.run.steps) >= 2, train, runs.run)
    first.send(signal.SIGKILL)
    assert train.wait() == 0, train.said
    assert worker.wait() == 0, worker.said
    runs.run.check(steps=12)
