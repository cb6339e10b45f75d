"""`shoal agent join`: bring experts into a collective, from any machine with its ticket."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from shoal.cli.output import note, print_json
from shoal.cli.parameters import Flag, Json
from shoal.errors import ConfigError

if TYPE_CHECKING:
    from shoal.agents.collective.experts import ExpertSettings, Opened
    from shoal.agents.collective.node import CollectiveNode
    from shoal.agents.tools.toolbox import Callee
    from shoal.fabric.identity import Identity
    from shoal.fabric.ticket import Ticket

CONNECT_S = 30.0
"""How long it is tried to reach the collective."""

Many = Annotated[tuple[str, ...], Parameter(negative="")]


def run(
    ticket: str,
    /,
    *,
    name: str = "",
    model: str = "embedded",
    lora: str = "",
    prompt: str = "",
    tools: Many = (),
    skills: Many = (),
    endpoint: str = "",
    answer: str = "",
    price: float = 0.0,
    slots: int = 1,
    no_plans: Flag = False,
    experts: Path | None = None,
    episodes: Path | None = None,
    follow: str = "",
    identity: Path | None = None,
    threads: int = 1,
    device: str = "auto",
    grace: float = 30.0,
    json: Json = False,
) -> None:
    """Bring an expert into a collective until Ctrl-C or SIGTERM, or several with --experts.

    A key for --endpoint is taken from SHOAL_AGENT_KEY.

    For example:

        shoal agent join shoal1AbC... --name sums --lora loras/sums --skills "sums of numbers=0.8"
        shoal agent join ticket.txt --name clerk --tools calculator --skills "reckoning with a calculator"
        shoal agent join ticket.txt --name big --model qwen3 --endpoint http://localhost:8000/v1 --skills "hard words"
        shoal agent join ticket.txt --experts experts.toml --episodes episodes.jsonl

    Args:
        ticket: The line that `shoal agent host` printed (or a run's, from shoal ticket RUN --role agent), or a file.
        name: What the collective calls this expert; by default host name and process id.
        model: embedded, a directory, a .gguf file or a hub name; with --endpoint the name that it knows; or the
            endpoint itself (http://...).
        lora: A LoRA adapter of the model: a folder that peft saved, or one of shoal sft --lora-rank.
        prompt: What the expert is, and how it replies.
        tools: Built-in tools that it may call (see shoal tools list); may be given several times.
        skills: What it is good at, in words, as SKILL or SKILL=0.8; may be given several times. Others believe what
            they see.
        endpoint: An OpenAI-compatible endpoint up to /v1, in place of a model in this process.
        answer: A regular expression that its replies match.
        price: US dollars that it asks for a step.
        slots: Steps at once.
        no_plans: It does steps only, and writes no chains.
        experts: A TOML file of experts, in place of all of the above; those of one model share its weights.
        episodes: Add what was done to this file: shoal sft learns it.
        follow: A training run whose versions the experts' model takes on as they come: its folder, or its ticket.
        identity: Folder of the expert's key, with one expert; by default one under the user's data directory.
        threads: CPU threads of models in this process.
        device: auto, cpu, cuda or cuda:N.
        grace: Seconds in which steps at work may end after Ctrl-C or SIGTERM.
    """
    from shoal.cli.worker import read_ticket
    from shoal.coordinator.processes import die_with_parent
    from shoal.fabric.ticket import Ticket

    die_with_parent()
    found = Ticket.decode(read_ticket(ticket))
    if model.startswith(("http://", "https://")) and not endpoint:
        model, endpoint = "default", model
    from shoal.agents.collective.experts import expert_of, read_experts

    if experts is not None:
        brought = read_experts(experts)
    else:
        table: dict[str, Any] = {"name": name or f"{socket.gethostname()}-{os.getpid()}", "model": model, "lora": lora}
        table |= {"prompt": prompt, "tools": tools, "skills": claims_of(skills), "endpoint": endpoint}
        table |= {"answer": answer, "price_usd": price, "slots": slots, "plans": not no_plans}
        brought = [expert_of(table, "this expert")]
    if identity is not None and len(brought) > 1:
        raise ConfigError("several experts cannot share one --identity.", "Leave it out: each has a key of its own.")
    result = asyncio.run(_join(found, brought, identity, episodes, follow, threads, device, grace))
    if json:
        print_json(result)


def claims_of(skills: Sequence[str]) -> dict[str, float]:
    """Skills as people write them: `sums` or `sums=0.8`.

    Raises:
        ConfigError: what stands behind = is no number.
    """
    found = {}
    for text in skills:
        skill, equals, claim = text.partition("=")
        try:
            found[skill.strip()] = float(claim) if equals else 0.5
        except ValueError:
            raise ConfigError(f"{text!r} is no skill with a number.", "Write SKILL or SKILL=0.8.") from None
    return found


async def _join(
    ticket: Ticket,
    settings: Sequence[ExpertSettings],
    identity: Path | None,
    episodes: Path | None,
    follow: str,
    threads: int,
    device: str,
    grace_s: float,
) -> dict[str, Any]:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping.set)
    async with AsyncExitStack() as stack:
        experts = await stack.enter_async_context(opening(settings, threads=threads, device=device))
        if follow:
            await _follow(stack, follow, experts)
        nodes = [
            await stack.enter_async_context(bringing(ticket, one.settings.name, one, identity, episodes))
            for one in experts
        ]
        for one, node in zip(experts, nodes, strict=True):
            note(f"{one.settings.name} joined {ticket.run} as {node.id}")
        await stopping.wait()
        for node in nodes:
            node.executor.drain()
        at_work = sum(node.executor.num_at_work for node in nodes)
        if at_work and grace_s > 0:
            note(f"{at_work} steps at work may end within {grace_s:g} s")
        try:
            async with asyncio.timeout(grace_s):
                await asyncio.gather(*(node.executor.idle() for node in nodes))
        except TimeoutError:
            note("steps that have not ended are given up")
        result = {
            "run": ticket.run,
            "experts": [
                {"name": one.settings.name, "node_id": node.id, "steps": node.executor.done}
                for one, node in zip(experts, nodes, strict=True)
            ],
        }
    note(f"left {ticket.run} after {sum(node.executor.done for node in nodes)} steps")
    return result


async def _follow(stack: AsyncExitStack, run_text: str, experts: Sequence[Opened]) -> None:
    """Have the experts' one model take on a run's versions from now on."""
    from shoal.agents.collective.experts import Adapted
    from shoal.agents.collective.model import SamplerExpert
    from shoal.serving.following import following, ticket_in

    samplers = [one.expert.sampler for one in experts if isinstance(one.expert, SamplerExpert)]
    engines = {id(one.engine): one.engine for one in samplers if isinstance(one, Adapted)}
    if len(samplers) < len(experts) or len(engines) != 1:
        raise ConfigError(
            "--follow is for experts that are one model of this process.",
            "Leave out endpoints, tools and other models.",
        )
    run = await stack.enter_async_context(following(ticket_in(run_text), "experts", note))
    for engine in engines.values():
        await stack.enter_async_context(run.into(engine))


@asynccontextmanager
async def opening(
    settings: Sequence[ExpertSettings], *, threads: int = 1, device: str = "auto"
) -> AsyncIterator[list[Opened]]:
    """Experts with their models and tools, as a command's options say."""
    from shoal.agents.collective.experts import opened
    from shoal.cli.adapters import adapter_folder
    from shoal.cli.agent import KEY_VARIABLE
    from shoal.cli.tools import need_packages

    if any(one.tools for one in settings):
        need_packages()
    key = os.environ.get(KEY_VARIABLE, "")
    found = [
        one.model_copy(
            update={
                name: str(adapter_folder(Path(folder)))
                for name, folder in (("lora", one.lora), ("planner_lora", one.planner_lora))
                if folder
            }
        )
        for one in settings
    ]
    async with opened(found, _tools, key=key, threads=threads, device=device, say=note) as experts:
        yield experts


@asynccontextmanager
async def _tools(one: ExpertSettings) -> AsyncIterator[Sequence[Callee]]:
    """An expert's built-in tools, each in a process of its own."""
    from shoal.agents.tools.mcp_client import McpServers
    from shoal.cli.agent import builtin_servers

    async with McpServers(builtin_servers(one.tools, None)) as connected:
        yield connected.tools


@asynccontextmanager
async def bringing(
    ticket: Ticket, name: str, expert: Opened | None, identity: Path | None = None, episodes: Path | None = None
) -> AsyncIterator[CollectiveNode]:
    """One node of a collective on a connection of its own, with a key that lasts, and what it said with it."""
    from shoal.agents.collective.experts import word_similarity
    from shoal.agents.collective.life import living
    from shoal.fabric.fabric import Fabric
    from shoal.fabric.identity import node_id_of
    from shoal.rollout.host import worker_identity

    with worker_identity(identity, f"agents/{node_id_of(ticket.coordinator_key)}/{name}") as key:
        async with (
            await Fabric.connect(key, ticket, CONNECT_S) as fabric,
            living(
                fabric,
                ticket,
                name,
                expert,
                similar=word_similarity(),
                own=_said(ticket, key),
                episodes=episodes,
            ) as node,
        ):
            yield node


def _said(ticket: Ticket, key: Identity) -> Path:
    """Where a key keeps what it says in a run."""
    from shoal.fabric.identity import data_dir, node_id_of

    return data_dir() / "agents" / node_id_of(ticket.coordinator_key) / "said" / f"{key.node_id}.jsonl"
