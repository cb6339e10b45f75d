"""`shoal worker`: joining by ticket from elsewhere, leaving, and being refused with the reason."""

from __future__ import annotations

import secrets
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace
from runs import Runs, is_alive, processes_of, until

from shoal import PROTOCOL_VERSION
from shoal.fabric.identity import Identity
from shoal.fabric.ticket import Ticket

pytestmark = pytest.mark.timeout(300)


@pytest.mark.slow
def test_workers_join_by_ticket_and_one_leaves(runs: Runs, tmp_path: Path) -> None:
    """No worker starts with the run; one joins from another directory, one midway, one is sent away on the way."""
    changes = {"envs__digit__type": "tiny:Slow", "run__steps": 30, "workers__max_sequences": 8}
    train = runs.train("--workers", "0", **changes)
    run = runs.run
    until(lambda: "shoal worker shoal1" in train.said, train)
    assert "it waits until one joins" in train.said
    ticket = train.said.split("shoal worker ")[1].split()[0]
    assert ticket == run.ticket
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    join = ["--device", "cpu", "--max-sequences", "8", "--cache-tokens", "2048"]
    first = runs.shoal("worker", ticket, "--name", "attic", "--json", *join, cwd=elsewhere)
    second = runs.shoal("worker", run.path / "ticket.txt", "--name", "barn", "--json", *join, cwd=elsewhere)
    until(lambda: len(run.steps) >= 1, train, run)
    third = runs.shoal("worker", ticket, "--name", "cellar", "--json", *join, cwd=elsewhere)
    until(lambda: {e["name"] for e in run.events("node.joined")} >= {"attic", "barn", "cellar"}, train, run)
    until(lambda: any("rollouts/cellar" in step for step in run.steps), train, run)
    first.send(signal.SIGTERM)
    assert first.wait() == 0, first.said
    assert first.result["rollouts"] > 0 and f"left run tiny after {first.result['rollouts']} rollouts" in first.said
    assert train.wait() == 0, train.said + run.logs()
    assert second.wait() == 0 and third.wait() == 0, second.said + third.said
    run.check(steps=30)
    assert set(train.result["worker_rollouts"]) == {"attic", "barn", "cellar"}
    left = {e["name"]: e["reason"] for e in run.events("node.left") if e["role"] == "worker"}
    assert left == {"attic": "left", "barn": "left", "cellar": "left"}
    assert sum(p.result["rollouts"] for p in (first, second, third)) == train.result["rollouts"]["accepted"]
    assert not run.events("lease.expired")
    assert "Traceback" not in first.said + second.said + third.said


@pytest.mark.netns
def test_a_worker_in_another_network_namespace_joins_over_tls(runs: Runs, namespace: Namespace) -> None:
    changes = {"eval__before": False, "network__host": namespace.host, "run__steps": 3}
    train = runs.train("--workers", "0", **changes)
    run = runs.run
    until(lambda: (run.path / "ticket.txt").exists(), train)
    assert Ticket.decode(run.ticket).endpoints[0].startswith(f"tls/{namespace.host}:")
    imposter = replace(Ticket.decode(run.ticket), coordinator_key=Identity.generate().public_key).encode()
    deceived = runs.shoal("worker", imposter, "--device", "cpu", prefix=namespace.prefix)
    worker = runs.shoal("worker", run.ticket, "--name", "far", "--device", "cpu", "--json", prefix=namespace.prefix)
    assert deceived.wait() == 2 and "a certificate that is not the ticket's" in deceived.said, deceived.said
    assert train.wait() == 0, train.said + run.logs()
    assert worker.wait() == 0, worker.said
    run.check(steps=3)
    assert worker.result["rollouts"] >= 36 and train.result["worker_rollouts"] == {"far": 36}


class Namespace:
    """A network of its own behind a virtual cable."""

    def __init__(self) -> None:
        tag = secrets.token_hex(3)
        self.name, self.near, self.far = f"shoal-{tag}", f"sh{tag}a", f"sh{tag}b"
        third = 64 + secrets.randbelow(64)
        self.host, self.guest = f"10.213.{third}.1", f"10.213.{third}.2"
        self.prefix = ("ip", "netns", "exec", self.name)

    def open(self) -> None:
        ip("netns", "add", self.name)
        ip("link", "add", self.near, "type", "veth", "peer", "name", self.far, "netns", self.name)
        ip("addr", "add", f"{self.host}/30", "dev", self.near)
        ip("link", "set", self.near, "up")
        ip("-n", self.name, "addr", "add", f"{self.guest}/30", "dev", self.far)
        ip("-n", self.name, "link", "set", self.far, "up")

    def close(self) -> None:
        subprocess.run(["ip", "netns", "delete", self.name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "delete", self.near], capture_output=True, check=False)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    made = Namespace()
    try:
        made.open()
        yield made
    finally:
        made.close()


def test_a_wrong_ticket_is_refused_with_the_reason(runs: Runs) -> None:
    """Mistyped, with another secret, of another version."""
    train = runs.train("--workers", "0", eval__before=False)
    until(lambda: (runs.run.path / "ticket.txt").exists(), train)
    good = Ticket.decode(runs.run.ticket)
    text = good.encode()
    typo = text[:40] + ("A" if text[40] != "A" else "B") + text[41:]
    wrong = {
        typo: "cut off or mistyped",
        text[:-9]: "cut off or mistyped",
        text[1:]: "it would start with",
        "runs/tiny/ticket.text": "there is no ticket file",
        "nonsense": "it would start with",
        "shoal2" + text[6:]: "another version of Shoal",
        replace(good, protocol_version=99).encode(): "speaks version",
        replace(good, secret=b"x" * 16).encode(): "secret",
    }
    asked = {given: runs.shoal("worker", given, "--device", "cpu") for given in wrong}
    for given, reason in wrong.items():
        code = asked[given].wait()
        said = asked[given].said
        assert code == 2, (reason, said)
        error = said[said.index("Error: ") :].strip()
        assert reason in error and "\n\n" not in error and "Traceback" not in said, (reason, said)
    refused = {e["code"] for e in runs.run.events("node.refused")}
    assert refused == {"secret"}
    assert not runs.run.events("node.joined") or {e["role"] for e in runs.run.events("node.joined")} == {"learner"}
    train.send(signal.SIGINT)
    assert train.wait() == 130


@pytest.mark.slow
def test_a_run_that_is_not_there(runs: Runs) -> None:
    """It is tried for a while, because a run may be about to start; then the reason is told."""
    ticket = Ticket(PROTOCOL_VERSION, "gone", ("tcp/127.0.0.1:9",), Identity.generate().public_key, b"s" * 16)
    worker = runs.shoal("worker", ticket.encode(), "--device", "cpu")
    assert worker.wait() == 2 and "127.0.0.1:9 cannot be reached: Connection refused" in worker.said


@pytest.mark.slow
def test_a_worker_elsewhere_outlives_its_coordinators_death(runs: Runs) -> None:
    """The parent is killed and the run resumed: the worker joins again by itself, with the ticket that it has."""
    train = runs.train("--workers", "0", envs__digit__type="tiny:Slow", run__steps=12)
    run = runs.run
    until(lambda: (run.path / "ticket.txt").exists(), train)
    worker = runs.shoal("worker", run.ticket, "--name", "far", "--device", "cpu", "--json")
    until(lambda: len(run.steps) >= 3, train, run)
    train.send(signal.SIGKILL)
    train.wait()
    until(lambda: len(processes_of(run.path)) == 0)
    assert is_alive(worker.pid)
    resumed = runs.shoal("train", "--resume", run.path, "--json")
    assert resumed.wait() == 0, resumed.said + run.logs()
    assert worker.wait() == 0, worker.said
    run.check(steps=12)
    assert run.summary["worker_rollouts"] == {"far": 144}


@pytest.mark.slow
def test_workers_of_one_machine_have_keys_of_their_own(runs: Runs) -> None:
    train = runs.train("--workers", "0", run__steps=3)
    until(lambda: (runs.run.path / "ticket.txt").exists(), train)
    workers = [runs.shoal("worker", runs.run.ticket, "--device", "cpu") for _ in range(3)]
    assert train.wait() == 0, train.said
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    nodes = [e["node"] for e in runs.run.events("node.joined") if e["role"] == "worker"]
    assert len(set(nodes)) == len(nodes)
    assert all((runs.home / "workers" / str(number)).is_dir() for number in range(len(nodes)))
