"""`shoal worker`: join a run from anywhere with its ticket, and sample rollouts for it or compute a model's layers."""

from __future__ import annotations

import asyncio
import logging
import shlex
import signal
from pathlib import Path
from typing import Any, Literal

from shoal.cli.output import note, print_json
from shoal.cli.parameters import Flag, Json
from shoal.errors import TicketError

CONNECT_S = 30.0
"""How long a stage tries to reach its server."""

MAX_TICKET_BYTES = 2**16
"""Read of a ticket file; a ticket is far shorter."""


def run(
    ticket: str,
    /,
    *,
    name: str = "",
    threads: int = 1,
    device: str = "auto",
    max_sequences: int = 64,
    cache_tokens: int = 16384,
    prefix_tokens: int = 0,
    grace: float = 30.0,
    price: float = 0.0,
    billing: Literal["per_use", "per_hour"] = "per_use",
    region: str = "",
    identity: Path | None = None,
    local_store: Path | None = None,
    relay: str = "",
    snapshots_gb: float | None = None,
    allow_programs: Flag = False,
    engine: Literal["local", "vllm"] = "local",
    vllm_python: str = "",
    vllm_args: str = "",
    stage: Flag = False,
    stage_host: str = "127.0.0.1",
    max_layers: int = 0,
    local_model: Path | None = None,
    json: Json = False,
) -> None:
    """Join a run with its ticket and sample rollouts for it until the run ends.

    With --stage: join a server (`shoal serve --stages`) and compute some of its model's layers until it ends.

    For example:

        shoal worker shoal1AbC...
        shoal worker ticket.txt --threads 4 --name attic
        shoal worker shoal1AbC... --stage --stage-host 0.0.0.0

    Args:
        ticket: The line that `shoal train` printed, or a file that holds it.
        name: What the run calls this worker; by default host name and process id.
        threads: CPU threads for sampling.
        device: auto, cpu, cuda or cuda:N.
        max_sequences: Sequences sampled at once.
        cache_tokens: Tokens the key-value cache holds, over all sequences.
        prefix_tokens: Tokens of ended turns kept beside it, for the next turns of their episodes.
        grace: Seconds in which running rollouts may end after Ctrl-C or SIGTERM.
        price: US dollars an hour that this machine costs; told to the run.
        billing: Whether it is paid for by the second of work (per_use) or by the begun hour (per_hour).
        region: Where this machine stands, in your words; told to the run.
        identity: Folder of this worker's key; by default one under the user's data directory.
        local_store: The run's snapshot folder, if it lies on this machine.
        relay: Address of this machine on which other workers may take new weights from it, as 0.0.0.0; then it takes
            them from others as well.
        snapshots_gb: Most disk that new weights may take, in GB; by default as much as two versions need.
        allow_programs: Start the agent programs that the run's configuration names (environments of type external),
            with this user's rights.
        engine: What samples: local is Shoal's own engine, vllm is vLLM's server, started here (docs/vllm.md).
        vllm_python: The Python of an environment that holds vLLM; by default SHOAL_VLLM_PYTHON.
        vllm_args: Further arguments of vLLM's server, as one text: "--tensor-parallel-size 2".
        stage: Compute layers for a server instead of sampling for a run.
        stage_host: Address of this machine on which the stage before links to this one.
        max_layers: Most layers to take; 0: as many as fit the memory that is free.
        local_model: The served checkpoint, if it lies on this machine; else layers come from the server.
    """
    from shoal.coordinator.processes import die_with_parent

    die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if stage:
        given: dict[str, Any] = {"name": name, "threads": threads, "device": device, "host": stage_host}
        given |= {"max_layers": max_layers, "local_model": local_model}
        asyncio.run(_compute(read_ticket(ticket), identity, given))
        return
    result = asyncio.run(
        _work(
            read_ticket(ticket),
            grace,
            {
                "name": name,
                "threads": threads,
                "device": device,
                "max_sequences": max_sequences,
                "cache_tokens": cache_tokens,
                "prefix_tokens": prefix_tokens,
                "price_usd_per_hour": price,
                "billing": billing,
                "region": region,
                "identity": identity,
                "local_store": local_store,
                "relay_host": relay,
                "snapshots_gb": snapshots_gb,
                "allow_programs": allow_programs,
                "engine": engine,
            },
            (vllm_python, vllm_args),
        )
    )
    if json:
        print_json(result)


async def _compute(ticket_text: str, identity_folder: Path | None, given: dict[str, Any]) -> None:
    """Be a stage until told to end."""
    from shoal.fabric.fabric import Fabric
    from shoal.fabric.ticket import Ticket

    ticket = Ticket.decode(ticket_text)
    from shoal.rollout.host import worker_identity
    from shoal.serving.stage_host import StageOptions, serve_stage

    with worker_identity(identity_folder) as identity:
        async with await Fabric.connect(identity, ticket, CONNECT_S) as fabric:
            serving = asyncio.ensure_future(serve_stage(fabric, ticket, StageOptions(**given), note))
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, serving.cancel)
            try:
                await serving
            except asyncio.CancelledError:
                note(f"left {ticket.run}")


def read_ticket(text: str) -> str:
    """The ticket itself, read from a file if `text` names one."""
    path = Path(text)
    try:
        if path.is_file():
            with path.open("rb") as file:
                return file.read(MAX_TICKET_BYTES).decode(errors="replace")
    except OSError:
        pass  # too long for a file's name, as a mistyped ticket is; or a file that cannot be read, said below
    if "/" in text and not text.startswith("shoal"):
        raise TicketError(
            f"there is no ticket file {text} that can be read.",
            "Give the ticket's line itself, or a file that holds it.",
        )
    return text


async def _work(ticket_text: str, grace_s: float, given: dict[str, Any], vllm: tuple[str, str]) -> dict[str, Any]:
    from shoal.fabric.fabric import Fabric
    from shoal.fabric.ticket import Ticket

    ticket = Ticket.decode(ticket_text)  # before torch is imported, so that a mistyped one is answered at once
    from shoal.rollout.host import WorkerOptions, worker_identity, working
    from shoal.rollout.vllm_server import VllmOptions
    from shoal.serving.sessions_host import hosting

    python, arguments = vllm
    options = WorkerOptions(**given, vllm=VllmOptions(python, tuple(shlex.split(arguments))))
    with worker_identity(options.identity) as identity:
        async with await Fabric.connect(identity, ticket, options.join_timeout_s) as fabric:

            def on_event(kind: str, data: dict[str, Any]) -> None:
                if kind == "policy.swapped":
                    note(
                        f"policy {data['version']} (fetched in {data['fetch_s']:.1f} s, {data['pause_s']:.2f} s pause)"
                    )

            async with working(fabric, ticket, options, sessions=hosting, progress=note, on_event=on_event) as worker:
                loop = asyncio.get_running_loop()
                for number in (signal.SIGINT, signal.SIGTERM):
                    loop.add_signal_handler(number, worker.stop)
                note(f"joined run {ticket.run} as {identity.node_id}")
                await worker.run(grace_s)
                note(f"left run {ticket.run} after {worker.num_submitted} rollouts")
                return {"run": ticket.run, "node_id": identity.node_id, "rollouts": worker.num_submitted}
