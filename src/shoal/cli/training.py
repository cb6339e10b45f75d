"""A training run from start to end on this machine: coordinator here, learner and local workers as children.

Shared by `shoal train` and `shoal demo`. Invariants: whatever happens, every child has ended when `train` returns;
a learner or worker that dies is started again, a few times; a run that is interrupted can be resumed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.config import Config, load_config, to_toml
from shoal.coordinator.control import Control
from shoal.coordinator.reporting.paired import paired_interval
from shoal.coordinator.processes import Child, Children
from shoal.coordinator.rundir import RunDir
from shoal.coordinator.service import Coordinator
from shoal.coordinator.tasks import make_environments
from shoal.errors import ModelError, RunError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity

MAX_RESTARTS = 5
"""A child that has died this often will not be started again."""

PREPARE_TIMEOUT_S = 1800.0
"""The longest that fetching and converting a model may take."""

FINISH_GRACE_S = 60.0
"""Children end by themselves when the run is over; what has not by then is told to."""

NUM_SAMPLES = 3

SECRET_BYTES = 16


@dataclass(frozen=True)
class Session:
    """What a view may look at while a run goes on."""

    config: Config
    run: RunDir
    coordinator: Coordinator
    ticket: str
    started: float
    """Monotonic seconds when the run's own time began."""


View = Callable[[Session], None]
"""Called about once a second."""


def new_run(config: Config, config_name: str) -> RunDir:
    """The folder of a new run, its resolved configuration written."""
    name = config.run.name or f"{Path(config_name).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    run = RunDir.create(Path(config.run.dir) / name)
    run.write_atomic("config.toml", to_toml(config).encode())
    return run


def resumed_run(where: str) -> tuple[RunDir, Config]:
    """An existing run, by its folder or by its name below `runs`, and its configuration."""
    path = Path(where)
    run = RunDir.open(path if (path / "config.toml").exists() else Path("runs") / where)
    return run, load_config(str(run.path / "config.toml"), [])


async def prepare_model(name: str, say: Callable[[str], None]) -> None:
    """Fetch and convert the model in a process of its own, so that this one stays small.

    Raises:
        ModelError: it cannot be had.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "shoal.cli", "_prepare", name, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    result: dict[str, Any] = {}
    try:
        async with asyncio.timeout(PREPARE_TIMEOUT_S):
            async for line in process.stdout:
                message = json.loads(line)
                if "say" in message:
                    say(message["say"])
                else:
                    result = message
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if "error" in result:
        raise ModelError(result["error"]["problem"], result["error"]["remedy"])
    if process.returncode:
        raise ModelError(f"preparing model '{name}' ended with exit code {process.returncode}.")


async def train(
    config: Config,
    run: RunDir,
    *,
    say: Callable[[str], None],
    view: View = lambda _: None,
    on_ready: Callable[[Session], None] = lambda _: None,
) -> dict[str, Any]:
    """Run the whole training and give its summary, which is also written to `summary.json`.

    Raises:
        RunError: the run cannot go on; it can be resumed.
        KeyboardInterrupt: Ctrl-C or SIGTERM; every child has ended and the run can be resumed.
    """
    environments = make_environments(config)
    control = Control(config, environments, run)
    await prepare_model(config.model.name, say)
    kept = _kept_secrets(run)
    identity = Identity.load_or_create(run.path / "identity" / "coordinator")
    learner = Identity.load_or_create(run.path / "identity" / "learner")
    network = config.network
    children = Children(run.path / "logs")
    started = time.monotonic()
    tls = {"auto": None, "on": True, "off": False}[network.tls]
    port = network.port or kept.get("port", 0)
    async with await Fabric.listen(identity, network.host, port, tls=tls) as fabric:
        kept["port"] = int(fabric.endpoints[0].rsplit(":", 1)[1])
        run.write_atomic("secrets.json", json.dumps(kept).encode(), mode=0o600)
        secret = bytes.fromhex(kept["secret"])
        coordinator = Coordinator(
            config, control, run, fabric, learner_key=learner.public_key, secret=secret
        )
        await coordinator.start()
        ticket = fabric.ticket(run.name, secret).encode()
        run.write_atomic("ticket.txt", ticket.encode() + b"\n", mode=0o600)
        session = Session(config, run, coordinator, ticket, started)
        run.event("run.started", steps=config.run.steps)
        try:
            async with _signals() as interrupted, asyncio.TaskGroup() as group:
                on_ready(session)
                watchers = [
                    group.create_task(_keep_alive(children, coordinator, name, arguments))
                    for name, arguments in _children(config, run)
                ]
                viewing = group.create_task(_show(session, view))
                ended = asyncio.create_task(coordinator.finished())
                stop = asyncio.create_task(interrupted.wait())
                try:
                    await asyncio.wait([ended, stop], return_when=asyncio.FIRST_COMPLETED)
                    if not ended.done():
                        raise KeyboardInterrupt
                    await ended
                    await children.wait_all(FINISH_GRACE_S)
                finally:
                    for task in (*watchers, viewing, ended, stop):
                        task.cancel()
        except* RunError as errors:
            raise errors.exceptions[0] from None
        finally:
            await children.end_all()
            await coordinator.close()
            run.event("run.ended", version=control.version)
            view(session)
    summary = summarise(config, control, seconds=time.monotonic() - started)
    run.write_atomic("summary.json", json.dumps(summary, ensure_ascii=False, indent=1).encode())
    return summary


def _children(config: Config, run: RunDir) -> list[tuple[str, list[str]]]:
    ticket = str(run.path / "ticket.txt")
    found = [("learner", ["_learner", str(run.path)])]
    if config.learner.mode == "colocated":
        return found
    for number in range(config.workers.count):
        name = f"local-{number}"
        arguments = ["worker", ticket, "--name", name, "--threads", str(config.workers.threads)]
        arguments += ["--max-sequences", str(config.workers.max_sequences), "--device", config.workers.device]
        arguments += ["--cache-tokens", str(config.workers.cache_tokens)]
        arguments += ["--identity", str(run.path / "identity" / name), "--local-store", str(run.path / "snapshots")]
        found.append((name, arguments))
    return found


async def _keep_alive(children: Children, coordinator: Coordinator, name: str, arguments: list[str]) -> None:
    """Start a child, and again when it dies before the run is over."""
    settings = {
        "OMP_NUM_THREADS": str(_threads_of(coordinator.config, name)),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "0",  # some task generators' draws depend on it
    }
    for attempt in range(MAX_RESTARTS + 1):
        child = await children.start(name, arguments, settings)
        code = await child.process.wait()
        if coordinator.control.ended:
            return
        children.all.remove(child)
        coordinator.run.event("process.died", name, exit_code=code, restarts=attempt)
        if code == RunError.exit_code and attempt == 0:
            break  # it said why it cannot work: trying again changes nothing
        await asyncio.sleep(1.0)
    coordinator.fail(_died(child, name))


def _died(child: Child, name: str) -> RunError:
    last = child.tail.splitlines()[-1] if child.tail else "it printed nothing"
    return RunError(
        f"process '{name}' keeps dying (exit code {child.process.returncode}): {last}",
        f"See {child.log}; then continue with --resume.",
    )


def _threads_of(config: Config, name: str) -> int:
    return config.learner.threads if name == "learner" else config.workers.threads


async def _show(session: Session, view: View) -> None:
    while True:
        view(session)
        await asyncio.sleep(1.0)


@asynccontextmanager
async def _signals() -> AsyncIterator[asyncio.Event]:
    """An event that Ctrl-C and SIGTERM set, instead of tearing the loop down in the middle of something."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, event.set)
    try:
        yield event
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _kept_secrets(run: RunDir) -> dict[str, Any]:
    """The run's join secret and port: a resumed run keeps them, so tickets stay valid."""
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads((run.path / "secrets.json").read_text()))
    return {"secret": secrets.token_hex(SECRET_BYTES)}


def summarise(config: Config, control: Control, *, seconds: float) -> dict[str, Any]:
    """What people and machines want to know of a finished run."""
    steps = config.run.steps
    rollouts = dict(control.consumed_by)
    total = sum(rollouts.values())
    summary: dict[str, Any] = {
        "steps": control.version,
        "seconds": round(seconds, 1),
        "max_staleness": control.max_staleness_seen,
        "S": config.learner.max_staleness,
        "worker_rollouts": rollouts,
        "min_worker_share": min(rollouts.values()) / total if total else 0.0,
        "rollouts": _counts(control),
    }
    before, after = control.answers(0), control.answers(steps)
    if after:
        summary |= {"heldout_questions": len(after), **_accuracy(after, "after")}
    if before:
        summary |= _accuracy(before, "before")
    if before and after:
        for kind, suffix in (("strict", ""), ("lenient", "_lenient")):
            low, high = paired_interval([a[kind] >= 1 for a in before], [a[kind] >= 1 for a in after])
            summary[f"gain_interval{suffix}"] = [low, high]
        summary["samples"] = _samples(before, after)
    return summary


def _accuracy(answers: list[dict[str, Any]], when: str) -> dict[str, float]:
    return {
        f"accuracy_{when}": sum(a["strict"] for a in answers) / len(answers),
        f"accuracy_{when}_lenient": sum(a["lenient"] for a in answers) / len(answers),
    }


def _samples(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A few questions evenly spread over the held-out list, chosen by position and not by how they came out."""
    stride = max(1, len(before) // NUM_SAMPLES)
    return [
        {
            "question": b["question"],
            "before": b["answer"],
            "after": a["answer"],
            "correct_before": b["strict"],
            "correct_after": a["strict"],
        }
        for b, a in list(zip(before, after, strict=True))[::stride][:NUM_SAMPLES]
    ]


def _counts(control: Control) -> dict[str, int]:
    counts: Counter[str] = Counter(control.book.counts)
    counts["consumed_groups"] = control.queue.counts["consumed"]
    counts["swept_groups"] = control.queue.counts["swept"]
    return dict(counts)
