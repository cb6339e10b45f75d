"""A run whose owner rents machines, and the bill for them, computed from what the run's commands wrote down.

    attic      from the beginning on, by use, dear and slow: too little alone, so the run asks for more
    spot       answers the first `acquire`, by use: alone enough, so attic is parked. It is taken away later
    hourly     answers the next one, by the begun hour: attic, which has worked in between, is parked again

`acquire`, `on_activate` and `on_park` each append one line to a log; a machine is a `shoal worker` that this module,
the "cloud", starts when `acquire` was run and there is one left to be had. The bill knows nothing of the ledger: by use
it is price · (seconds from an activation to a park, or to the machine's end), by the hour price · begun hours.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from _nat import tiny_model
from shoal.errors import RunError

ROLLOUT_S, TRAIN_S = 1.2, 2.0
GROUP_SIZE, GROUPS_PER_STEP = 4, 4
STEPS = 36

LONE_S = 15.0
"""`spot` is taken away so long after attic was parked."""

RUN_S = 540.0
START_S = 120.0
END_S = 30.0


@dataclass
class Machine:
    """One that can be rented."""

    name: str
    price_usd_per_hour: float
    billing: str
    slots: int
    """Groups at once."""
    process: subprocess.Popen[bytes] | None = None
    began_at: float = math.nan
    ended_at: float = math.nan
    spans: list[tuple[float, float]] = field(default_factory=list)
    """When it had work, by the log."""

    def usd(self) -> float:
        """What its owner is asked to pay."""
        if self.billing == "per_hour":
            return self.price_usd_per_hour * math.ceil((self.ended_at - self.began_at) / 3600)
        return self.price_usd_per_hour / 3600 * math.fsum(end - start for start, end in self.spans)


def bill() -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Play the run, and hold its dollars against the bill."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that what was started is ended
    with tempfile.TemporaryDirectory(prefix="shoal-bill-") as scratch, ExitStack() as stack:
        cloud = _Cloud(Path(scratch), stack)
        summary = cloud.play()
        return _compared(cloud, summary)


class _Cloud:
    """The run, its machines, and the log of its commands."""

    def __init__(self, scratch: Path, stack: ExitStack) -> None:
        self.scratch = scratch
        self.log = scratch / "commands.log"
        self.log.touch()
        self._stack = stack
        self.machines = [
            Machine("attic", 36.0, "per_use", slots=1),
            Machine("spot", 18.0, "per_use", slots=5),
            Machine("hourly", 0.9, "per_hour", slots=5),
        ]
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
            "SHOAL_HOME": str(scratch / "home"),
            "OMP_NUM_THREADS": "1",
            "PACED_TRAIN_S": repr(TRAIN_S),
        }

    def play(self) -> dict[str, Any]:
        """The run from start to end; gives its summary."""
        folder = self.scratch / "runs" / "bill"
        config = self.scratch / "bill.toml"
        config.write_text(tomli_w.dumps(self._config()))
        train = self._start("train", [str(config), "--json"], {})
        deadline = time.monotonic() + START_S
        while not (folder / "ticket.txt").exists():
            self._check(train, deadline, "the run did not begin")
            time.sleep(0.1)
        self._rent(self.machines[0], folder)
        deadline = time.monotonic() + RUN_S
        while train.poll() is None:
            self._check(train, deadline, "the run was not over")
            self._serve(folder)
            time.sleep(0.05)
        for machine in self.machines:
            self._wait(machine)
        if train.returncode != 0:
            raise RunError(f"the run failed: {self._tail('train')}")
        found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
        return found

    def lines(self) -> Iterator[tuple[float, str, str]]:
        """What the run's commands wrote down: when, which, about which machine."""
        for line in self.log.read_text().splitlines():
            at, what, *who = line.split()
            yield float(at), what, who[0] if who else ""

    def _serve(self, folder: Path) -> None:
        """Be the cloud: rent what is asked for, take `spot` away, and note who has ended."""
        said = list(self.lines())
        asked = sum(what == "acquire" for _, what, _ in said)
        rented = sum(machine.process is not None for machine in self.machines)
        spot = self.machines[1]
        parked = [at for at, what, who in said if what == "park" and who == "attic"]
        taken = not math.isnan(spot.ended_at)
        # The second machine answers a call made after the first was taken away: that call is what the test is about.
        after = sum(what == "acquire" and at > spot.ended_at for at, what, _ in said) if taken else 0
        if (rented == 1 and asked) or (rented == 2 and after):
            self._rent(self.machines[rented], folder)
        if parked and not taken and time.time() > parked[0] + LONE_S:
            print("  spot is taken away", file=sys.stderr, flush=True)
            assert spot.process is not None
            spot.process.kill()
            self._wait(spot)
        for machine in self.machines:
            if machine.process is not None and math.isnan(machine.ended_at) and machine.process.poll() is not None:
                machine.ended_at = time.time()

    def _rent(self, machine: Machine, folder: Path) -> None:
        print(f"  {machine.name} is rented", file=sys.stderr, flush=True)
        arguments = [str(folder / "ticket.txt"), "--name", machine.name, "--device", "cpu"]
        arguments += ["--max-sequences", str(machine.slots * GROUP_SIZE), "--cache-tokens", "4096"]
        arguments += ["--price", str(machine.price_usd_per_hour), "--billing", machine.billing]
        arguments += ["--identity", str(self.scratch / "identity" / machine.name)]
        machine.began_at = time.time()
        machine.process = self._start("worker", arguments, {"PRICED_ROLLOUT_S": repr(ROLLOUT_S)})

    def _wait(self, machine: Machine) -> None:
        """Until a machine has ended."""
        if machine.process is None or not math.isnan(machine.ended_at):
            return
        try:
            machine.process.wait(END_S)
        except subprocess.TimeoutExpired:
            raise RunError(f"machine {machine.name} did not end: {self._tail('worker')}") from None
        machine.ended_at = time.time()

    def _start(self, command: str, arguments: list[str], more: dict[str, str]) -> subprocess.Popen[bytes]:
        return self._stack.enter_context(
            _running(
                [sys.executable, "-m", "shoal.cli", command, *arguments],
                {**self._environment, **more},
                self.scratch / f"{command}.log",
            )
        )

    def _check(self, train: subprocess.Popen[bytes], deadline: float, problem: str) -> None:
        if train.poll() not in (None, 0) or time.monotonic() > deadline:
            raise RunError(f"{problem}: {self._tail('train')}")

    def _tail(self, name: str) -> str:
        return (self.scratch / f"{name}.log").read_text(errors="replace")[-1500:]

    def _says(self, what: str, who: str = "") -> list[str]:
        """A command that writes one line with the time into the log."""
        return ["/bin/sh", "-c", f'echo "$(date +%s.%N) {what} {who}" >> {shlex.quote(str(self.log))}']

    def _config(self) -> dict[str, Any]:
        return {
            "run": {"name": "bill", "dir": str(self.scratch / "runs"), "steps": STEPS},
            "model": {"name": str(tiny_model(self.scratch / "model")), "dtype": "fp32", "context_tokens": 64},
            "envs": {"digit": {"type": "_priced:Slow"}},
            "rollout": {
                "group_size": GROUP_SIZE,
                "groups_per_step": GROUPS_PER_STEP,
                "max_tokens": 8,
                "lease_timeout_s": 60.0,
            },
            "learner": {
                "mode": "async",
                "max_staleness": 4,
                "lr": 1e-2,
                "device": "cpu",
                "checkpoint_every": 0,
                "advantage": {"type": "_paced:padded"},
            },
            "workers": {"count": 0, "device": "cpu"},
            "eval": {"before": True, "after": True, "questions": 16, "max_tokens": 8},
            "capacity": {
                "replan_steps": 3,
                "acquire": self._says("acquire"),
                "on_activate": self._says("activate", "$SHOAL_NODE_NAME"),
                "on_park": self._says("park", "$SHOAL_NODE_NAME"),
                "acquire_every_s": 5.0,
            },
            "output": {"plots": False, "keep_episodes": False},
        }


@contextmanager
def _running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has ended when the context has."""
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(20.0)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()


def _compared(cloud: _Cloud, summary: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The bill, machine by machine, beside the run's dollars."""
    rows: list[dict[str, Any]] = []
    for machine in cloud.machines:
        if machine.process is None:
            raise RunError(f"the run never asked for {machine.name}.", f"Its commands: {list(cloud.lines())}")
        since = math.nan
        for at, what, who in cloud.lines():
            if who == machine.name and what == "activate" and math.isnan(since):
                since = at  # told again after its connection was lost, it has been working all the time
            elif who == machine.name and what == "park":
                machine.spans.append((since, at))
                since = math.nan
        if not math.isnan(since):
            machine.spans.append((since, machine.ended_at))
        ledger = float(summary["usd_by_machine"].get(machine.name, 0.0))
        rows.append(
            {
                "part": "bill",
                "machine": machine.name,
                "billing": machine.billing,
                "bill_usd": machine.usd(),
                "ledger_usd": ledger,
                "error": abs(ledger / machine.usd() - 1),
                "seconds_with_work": math.fsum(end - start for start, end in machine.spans),
                "times_activated": len(machine.spans),
            }
        )
    told = {key: value for key, value in summary.items() if key.startswith("usd") and key != "usd_by_machine"}
    rows.append({"part": "bill", "machine": "all", **told})
    total = math.fsum(machine.usd() for machine in cloud.machines)
    return rows, {
        "bill_error": abs(summary["usd"] / total - 1),
        "worst_machine_error": max(row["error"] for row in rows[:-1]),
        "times_parked": sum(what == "park" for _, what, _ in cloud.lines()),
    }
