"""A training run from start to end on this machine: coordinator here, learner and local workers as children.

Shared by `shoal train` and `shoal demo`. Invariants: whatever happens, every child has ended when `train` returns;
a learner or worker that dies is started again, a few times; a run that is interrupted can be resumed, and one that
never began leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.config import Config, load_config, to_toml
from shoal.coordinator.admission import Admission
from shoal.coordinator.control import Control
from shoal.coordinator.processes import Child, Children, child_of_this
from shoal.coordinator.rundir import RunDir
from shoal.coordinator.service import Coordinator
from shoal.coordinator.summary import local_name, summarise
from shoal.coordinator.tasks import make_environments
from shoal.coordinator.tickets import OWN_TICKET, kept_port, write_tickets
from shoal.coordinator.tracker import check_tracker, tracking
from shoal.errors import ConfigError, ModelError, NetworkError, RunError, ShoalError, StorageError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.ticket import RouterAddress
from shoal.fabric.waits import waiting

MAX_RESTARTS = 5
"""A child that has died this often, each time soon after its start, will not be started again."""

HEALTHY_S = 300.0
"""A child that has lived this long before it died has not died soon after its start."""

RESTART_PAUSE_S = 1.0

PREPARE_TIMEOUT_S = 1800.0
"""The longest that fetching and converting a model may take."""

FINISH_GRACE_S = 60.0
"""Children end by themselves when the run is over; what has not by then is told to."""

FINISH_USUAL_S = 8.0
"""It takes no longer where all is well."""

DISMISS_S = 10.0
"""Workers elsewhere hear within a heartbeat that the run is over; those that have not by then find out later."""

LOCAL_GRACE_S = 2.0
"""Local workers end this soon after Ctrl-C: rollouts that are cut off are leased again when the run is resumed."""

UNKNOWN_VOCABULARY = 2**31
"""Where a model does not say how many token ids it knows."""

ROUTERS_S = 3.0
"""How long a run that begins waits for its routers before it says which do not answer."""


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

Beside = Callable[[Session], AbstractAsyncContextManager[None]]
"""Something that goes on beside a run, such as its console."""


def nothing_beside(_: Session) -> AbstractAsyncContextManager[None]:
    return nullcontext()


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


async def prepare_model(name: str, say: Callable[[str], None]) -> Path:
    """Fetch and convert the model in a process of its own, so that this one stays small; gives its directory.

    Raises:
        ModelError: it cannot be had.
    """
    if (Path(name) / "config.json").is_file():
        return Path(name)
    command = [sys.executable, "-m", "shoal.cli", "_prepare", name]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, env={**os.environ, **child_of_this()}
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
    except TimeoutError:
        raise ModelError(
            f"model '{name}' was not fetched within {PREPARE_TIMEOUT_S / 60:.0f} minutes.", "Try again later."
        ) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if "error" in result:
        raise ModelError(result["error"]["problem"], result["error"]["remedy"])
    if process.returncode or "directory" not in result:
        raise ModelError(f"preparing model '{name}' ended with exit code {process.returncode}.")
    return Path(result["directory"])


async def train(
    config: Config,
    run: RunDir,
    *,
    say: Callable[[str], None],
    view: View = lambda _: None,
    on_ready: Callable[[Session], None] = lambda _: None,
    beside: Beside = nothing_beside,
) -> dict[str, Any]:
    """Run the whole training and give its summary, which is also written to `summary.json`.

    Args:
        beside: opened when the run has begun, and closed at its end.

    Raises:
        ShoalError: the run cannot go on; if its folder is still there, it can be resumed.
        KeyboardInterrupt: Ctrl-C or SIGTERM; every child has ended and the run can be resumed.
    """
    try:
        run.lock()
        return await _train(config, run, say, view, on_ready, beside)
    except (ShoalError, asyncio.CancelledError):
        run.discard_unstarted()
        raise
    finally:
        run.close()


async def _train(
    config: Config,
    run: RunDir,
    say: Callable[[str], None],
    view: View,
    on_ready: Callable[[Session], None],
    beside: Beside,
) -> dict[str, Any]:
    environments = make_environments(config)
    check_tracker(config)
    model = await prepare_model(config.model.name, say)
    facts = _facts(model)
    _check_context(config, facts)
    known = facts.get("vocab_size")
    vocab_size = known if isinstance(known, int) else UNKNOWN_VOCABULARY
    control = Control(config, environments, run, vocab_size=vocab_size)
    admission = Admission.of(run, colocated=config.learner.mode == "colocated")
    children = Children(run.path / "logs")
    started = time.monotonic()
    async with await _listen(config, run, kept_port(run), say) as fabric, contextlib.AsyncExitStack() as opened:
        coordinator = Coordinator(config, control, run, fabric, admission)
        opened.push_async_callback(coordinator.close)  # whatever goes wrong from here on: its tasks use the fabric
        await coordinator.start()
        ticket = write_tickets(config, run, fabric, admission)
        session = Session(config, run, coordinator, ticket, started)
        run.event("run.started", steps=config.run.steps)
        try:
            with tracking(config, run):
                async with beside(session), signals() as interrupted:
                    await _supervise(session, children, interrupted, view, on_ready)
        finally:
            await children.end_all()
            await opened.aclose()
            with contextlib.suppress(StorageError):  # the full disk may be why the run ends
                run.event("run.ended", version=control.version)
            view(session)
    summary = summarise(config, control, seconds=time.monotonic() - started)
    run.write_atomic("summary.json", json.dumps(summary, ensure_ascii=False, indent=1).encode())
    return summary


async def _supervise(
    session: Session,
    children: Children,
    interrupted: asyncio.Event,
    view: View,
    on_ready: Callable[[Session], None],
) -> None:
    """Start the children and wait for the run's end, and for theirs."""
    coordinator = session.coordinator
    on_ready(session)
    ended, stop = asyncio.create_task(coordinator.finished()), asyncio.create_task(interrupted.wait())
    viewing = asyncio.create_task(_show(session, view))
    keepers = [
        asyncio.create_task(_keep_alive(children, coordinator, name, arguments))
        for name, arguments in _children(session.config, session.run)
    ]
    tasks = [ended, stop, viewing, *keepers]
    try:
        await _until(ended, stop, [viewing, *keepers])
        finishing = asyncio.create_task(_finish(children, coordinator))
        tasks.append(finishing)
        await _until(finishing, stop, [viewing])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _finish(children: Children, coordinator: Coordinator) -> None:
    """Let everyone hear that the run is over and leave."""

    async def ended() -> None:
        with waiting("its own processes to end", deadline_s=FINISH_GRACE_S, usual_s=FINISH_USUAL_S):
            await children.wait_all(FINISH_GRACE_S)

    async def dismissed() -> None:
        with waiting("workers to leave", deadline_s=DISMISS_S, usual_s=FINISH_USUAL_S):
            await coordinator.dismissed(DISMISS_S)

    await asyncio.gather(ended(), dismissed())


async def _until(what: asyncio.Task[Any], stop: asyncio.Task[Any], others: Iterable[asyncio.Task[Any]]) -> None:
    """Wait for a task; one of the others that fails, or Ctrl-C, comes out here."""
    waiting = {what, stop, *others}
    while not what.done():
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if stop in done:
            raise KeyboardInterrupt
        for task in done:
            task.result()


async def _listen(config: Config, run: RunDir, kept_port: int, say: Callable[[str], None]) -> Fabric:
    """Listen where the configuration says; a resumed run on the port it had, so that old tickets stay valid."""
    identity = Identity.load_or_create(run.path / "identity" / "coordinator")
    network = config.network
    tls = {"auto": None, "on": True, "off": False}[network.tls]
    routers = [RouterAddress.find(line) for line in network.routers]
    fabric = None
    if network.port == 0 and kept_port:
        try:
            fabric = await Fabric.listen(identity, network.host, kept_port, tls=tls, routers=routers)
        except NetworkError:
            say(f"port {kept_port}, which the run had before, is taken: workers elsewhere need the new ticket")
    if fabric is None:
        fabric = await Fabric.listen(identity, network.host, network.port, tls=tls, routers=routers)
    await _await_routers(fabric, say)
    return fabric


async def _await_routers(fabric: Fabric, say: Callable[[str], None]) -> None:
    """Give routers a moment; the run begins without those that do not answer, which are dialled on."""
    for name, why in (await fabric.unconnected(ROUTERS_S)).items():
        say(f"{name} is not connected yet and will be tried again: {why}")


def _facts(model: Path) -> dict[str, Any]:
    """What the model's configuration says; nothing where there is none."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((model / "config.json").read_text())
        return found if isinstance(found, dict) else {}
    return {}


def _check_context(config: Config, facts: dict[str, Any]) -> None:
    """Raises: ConfigError where a run's sequences may be longer than its model takes: groups would fail one by one."""
    asked, most = config.model.context_tokens, facts.get("max_position_embeddings")
    if isinstance(most, int) and asked > most:
        raise ConfigError(
            f"model.context_tokens = {asked} is more than the {most} tokens that the model takes.",
            f"Set it to {most} or less.",
        )


def _children(config: Config, run: RunDir) -> list[tuple[str, list[str]]]:
    ticket = str(run.path / OWN_TICKET)
    found = [("learner", ["_learner", str(run.path)])]
    if config.learner.mode == "colocated":
        return found
    for number in range(config.workers.count):
        name = local_name(number)
        arguments = ["worker", ticket, "--name", name, "--threads", str(config.workers.threads)]
        arguments += ["--max-sequences", str(config.workers.max_sequences), "--device", config.workers.device]
        arguments += ["--cache-tokens", str(config.workers.cache_tokens), "--grace", str(LOCAL_GRACE_S)]
        arguments += ["--prefix-tokens", str(config.workers.prefix_tokens)]
        arguments += ["--identity", str(run.path / "identity" / name), "--local-store", str(run.path / "snapshots")]
        arguments += ["--allow-programs"]  # they are those that whoever starts this has configured
        found.append((name, arguments))
    return found


async def _keep_alive(children: Children, coordinator: Coordinator, name: str, arguments: list[str]) -> None:
    """Start a child, and again when it dies before the run is over."""
    settings = {
        "OMP_NUM_THREADS": str(_threads_of(coordinator.config, name)),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "0",  # some task generators' draws depend on it
    }

    def is_over() -> bool:
        return coordinator.control.ended

    restarts = 0
    last_code: int | None = RunError.exit_code
    while not is_over():
        born = time.monotonic()
        child = await children.start(name, arguments, settings)
        coordinator.watch.process_started(name, child.process.pid)
        try:
            code = await child.process.wait()
        finally:
            coordinator.watch.process_ended(name)
        if is_over():
            return
        children.all.remove(child)
        coordinator.run.event("process.died", name, exit_code=code, restarts=restarts)
        if code == last_code == RunError.exit_code or restarts == MAX_RESTARTS:
            # It said why it cannot work, at once or twice in a row: trying again changes nothing.
            coordinator.fail(_died(child, name))
            return
        last_code = code
        restarts = 0 if time.monotonic() - born > HEALTHY_S else restarts + 1
        await asyncio.sleep(RESTART_PAUSE_S)


def _died(child: Child, name: str) -> RunError:
    last = child.tail.splitlines()[-1] if child.tail else "it printed nothing"
    code = child.process.returncode
    if code == RunError.exit_code:
        return RunError(f"process '{name}' stopped: {last.removeprefix('Error: ')}", f"Its log is {child.log}.")
    return RunError(
        f"process '{name}' keeps dying (exit code {code}): {last}", f"See {child.log}; then continue with --resume."
    )


def _threads_of(config: Config, name: str) -> int:
    return config.learner.threads if name == "learner" else config.workers.threads


async def _show(session: Session, view: View) -> None:
    while True:
        view(session)
        await asyncio.sleep(1.0)


@asynccontextmanager
async def signals() -> AsyncIterator[asyncio.Event]:
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
