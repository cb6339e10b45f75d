"""`shoal solve`: a problem solved by a collective, here or elsewhere, with who said what and with what weight."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.cli.output import console, note, print_json
from shoal.cli.parameters import Flag, Json
from shoal.errors import ConfigError, NetworkError
from shoal.protocol.collective import MAX_LEASE_S

if TYPE_CHECKING:
    from shoal.agents.collective.baselines import Tried
    from shoal.agents.collective.experts import ExpertSettings, Opened
    from shoal.agents.collective.node import CollectiveNode
    from shoal.agents.collective.posing import ChainView, Solution
    from shoal.protocol.collective import StepView

MEET_S = 30.0
"""How long it may take until those who are there are seen."""

SETTLE_S = 1.0
"""After the first agent is seen, for the others to be as well."""

CONNECT_S = 10.0

LOCAL_LEASE_S = 20.0
"""Of experts that share this machine, and its cores, with their models."""

MAX_PLANNERS = 32


def run(
    problem: str,
    /,
    *,
    planners: int = 3,
    ticket: str = "",
    experts: Path | None = None,
    model: str = "embedded",
    timeout: float = 120.0,
    compare: Flag = False,
    answer: str = "",
    episodes: Path | None = None,
    threads: int = 1,
    device: str = "auto",
    json: Json = False,
) -> int:
    """Have a problem solved by a collective: several plans, each step by whoever does such things best, and a vote.

    With a ticket it asks the agents of that collective; without one it brings experts together on this machine, those
    of a file or three of the embedded model's, and ends them afterwards.

    For example:

        shoal solve "What is 17 + 25, in words?"
        shoal solve "What is 17 + 25, in words?" --experts experts.toml --planners 5
        shoal solve "Which is longer, 3 miles or 5 km?" --ticket ticket.txt --compare --answer "5 km"

    Args:
        problem: What is to be solved.
        planners: How many chains of steps are written and done.
        ticket: The line that `shoal agent host` printed, or a file that holds it.
        experts: A TOML file of experts (see docs/collective.md).
        model: What --compare asks directly: embedded, a directory, a .gguf file or a hub name.
        timeout: Seconds within which the answer is wanted.
        compare: Ask the model directly, by self-consistency with as many tokens, and a central scheduler, too.
        answer: The right answer, where it is known: chains are judged by it, and rows say who was right.
        episodes: Add to this file what experts on this machine did, to train on.
        threads: CPU threads of models in this process.
        device: auto, cpu, cuda or cuda:N.
    """
    if not 1 <= planners <= MAX_PLANNERS:
        raise ConfigError(f"a problem has 1 to {MAX_PLANNERS} planners.", "Change --planners.")
    if not problem.strip() or not 0 < timeout <= MAX_LEASE_S:
        raise ConfigError(
            "there is no problem, or no time to solve it.", f"Give a text, and up to {MAX_LEASE_S:.0f} s by --timeout."
        )
    if ticket and (experts is not None or episodes is not None):
        raise ConfigError(
            "--experts and --episodes are for experts on this machine.",
            "Bring experts to a ticket's collective by shoal agent join.",
        )
    wanted = Wanted(problem, planners, timeout, compare, answer, model, threads, device)
    found = asyncio.run(_elsewhere(ticket, wanted) if ticket else _here(experts, episodes, wanted))
    if json:
        print_json(found)
    else:
        _show(found)
    return 0 if found["answer"] is not None else 1


@dataclass(frozen=True)
class Wanted:
    """What the user asked for."""

    problem: str
    planners: int
    timeout_s: float
    compare: bool
    answer: str
    model: str
    threads: int
    device: str

    @property
    def asked_directly(self) -> list[ExpertSettings]:
        """The model that baselines ask: greedily, and with chance."""
        from shoal.agents.collective.experts import ExpertSettings

        if not self.compare:
            return []
        return [ExpertSettings(name=f"direct-{t}", model=self.model, temperature=t) for t in (0.0, 0.7)]


async def _elsewhere(text: str, wanted: Wanted) -> dict[str, Any]:
    """Ask the agents of a ticket's collective."""
    from shoal.cli.worker import read_ticket
    from shoal.fabric.ticket import Ticket

    ticket = Ticket.decode(read_ticket(text))
    from shoal.cli.agent_join import bringing, opening

    async with AsyncExitStack() as stack:
        asked = await stack.enter_async_context(opening(wanted.asked_directly, threads=wanted.threads))
        node = await stack.enter_async_context(bringing(ticket, "poser", None))
        await meet(node, 1, f"collective {ticket.run}")
        await asyncio.sleep(SETTLE_S)
        return await _solve(node, wanted, asked)


async def _here(experts: Path | None, episodes: Path | None, wanted: Wanted) -> dict[str, Any]:
    """Bring experts together on this machine, ask them, and end them."""
    from shoal.agents.collective.experts import read_experts
    from shoal.cli.agent_join import opening

    settings = read_experts(experts) if experts is not None else default_experts(wanted.model)
    if not any(one.plans for one in settings):
        raise ConfigError("none of these experts writes chains.", "Leave out `plans = false` of at least one.")
    async with (
        opening([*settings, *wanted.asked_directly], threads=wanted.threads, device=wanted.device) as ready,
        gathered(ready[: len(settings)], episodes) as node,
    ):
        return await _solve(node, wanted, ready[len(settings) :])


def default_experts(model: str) -> list[ExpertSettings]:
    """Three experts of one model."""
    from shoal.agents.collective.experts import ExpertSettings

    told = {
        "reckoner": ("You reckon. Reply with the result alone.", "arithmetic: sums, products, numbers"),
        "reader": ("You read carefully and answer in a few words.", "reading a text and answering questions about it"),
        "writer": ("You put things into other words or forms.", "writing: wording, spelling, formats"),
    }
    return [
        ExpertSettings(name=name, model=model, prompt=prompt, skills={skill: 0.5})
        for name, (prompt, skill) in told.items()
    ]


@asynccontextmanager
async def gathered(experts: Sequence[Opened], episodes: Path | None = None) -> AsyncIterator[CollectiveNode]:
    """A collective on this machine that ends with the context, and the node that asks it."""
    from shoal.agents.collective.experts import word_similarity
    from shoal.agents.collective.life import living
    from shoal.cli.issuing import issuing
    from shoal.fabric.fabric import Fabric
    from shoal.fabric.identity import Identity

    similar = word_similarity()
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="shoal-collective-"))
        issuer = await stack.enter_async_context(issuing(Path(folder) / "collective"))

        async def enter(name: str, expert: Opened | None) -> CollectiveNode:
            fabric = await Fabric.connect(Identity.generate(), issuer.ticket, CONNECT_S)
            await stack.enter_async_context(fabric)
            life = living(
                fabric, issuer.ticket, name, expert, similar=similar, episodes=episodes, lease_s=LOCAL_LEASE_S
            )
            return await stack.enter_async_context(life)

        nodes = [await enter(one.settings.name, one) for one in experts]
        poser = await enter("poser", None)
        for node in (*nodes, poser):
            await meet(node, len(nodes), "the collective on this machine")
        yield poser


async def meet(node: CollectiveNode, others: int, where: str) -> None:
    """Wait until a node sees so many other agents.

    Raises:
        NetworkError: it does not.
    """
    try:
        async with asyncio.timeout(MEET_S):
            while node.num_peers < others:  # noqa: ASYNC110  The roster changes often; a look now and then is cheaper.
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise NetworkError(
            f"nobody is in {where} yet." if not node.num_peers else f"only {node.num_peers} agents are in {where}.",
            "Bring experts by shoal agent join, and ask again.",
        ) from None


async def _solve(node: CollectiveNode, wanted: Wanted, asked: Sequence[Opened]) -> dict[str, Any]:
    from shoal.agents.collective.answers import is_right
    from shoal.agents.collective.baselines import Tried

    def score(answer: str) -> float:
        return float(is_right(answer, wanted.answer))

    found = await node.solve(
        wanted.problem,
        planners=wanted.planners,
        timeout_s=wanted.timeout_s,
        score=score if wanted.answer else None,
        on_progress=_Told(node.name_of),
    )
    result = described(found, node.name_of)
    if asked:
        rows = [Tried("collective", found.answer, found.tokens, found.seconds, len(found.chains))]
        rows += await compared(node, wanted, asked, found.tokens)
        result["compare"] = [
            {
                "method": row.method,
                "answer": row.answer,
                **({"right": is_right(row.answer, wanted.answer)} if wanted.answer else {}),
                "tokens": row.tokens,
                "seconds": round(row.seconds, 3),
                "samples": row.samples,
                **({"reason": row.reason} if row.reason else {}),
            }
            for row in rows
        ]
    await node.told()
    return result


async def compared(node: CollectiveNode, wanted: Wanted, asked: Sequence[Opened], tokens: int) -> list[Tried]:
    """The baselines on the same problem: see `agents.collective.baselines`."""
    from shoal.agents.collective.baselines import central, direct, self_consistency

    greedy, sampled = asked
    rows = [
        await direct(greedy.expert, wanted.problem),
        await self_consistency(sampled.expert, wanted.problem, tokens),
    ]
    if sampled.writer is not None:
        rows.append(await central(node, sampled.writer, wanted.problem, node.skills(), wanted.timeout_s))
    return rows


class _Told:
    """Says when a step is somebody's, and when it is done."""

    def __init__(self, name_of: Callable[[str], str]) -> None:
        self._name_of = name_of
        self._said: set[tuple[str, int, bytes, bool]] = set()
        self._planned: set[str] = set()

    def __call__(self, chain: str, planner: str, steps: Sequence[StepView]) -> None:
        from shoal.fabric.identity import node_id_of

        if chain not in self._planned and steps:
            self._planned.add(chain)
            note(f"{self._name_of(planner)} plans: {'; '.join(step.requirement for step in steps)}")
        for number, step in enumerate(steps):
            mark = (chain, number, step.executor, bool(step.result))
            if step.executor and mark not in self._said:
                self._said.add(mark)
                who = self._name_of(node_id_of(step.executor))
                what = f"said {step.result[:80]!r}" if step.result else "is at it"
                note(f"  {self._name_of(planner)}'s step {number + 1} ({step.requirement[:60]}): {who} {what}")


def described(found: Solution, name_of: Callable[[str], str]) -> dict[str, Any]:
    """A solution as JSON: the answer, and who said what with what weight."""
    return {
        "answer": found.answer,
        "support": found.support,
        "seconds": round(found.seconds, 3),
        "tokens": found.tokens,
        "chains": [_chain(chain, name_of) for chain in found.chains],
    }


def _chain(chain: ChainView, name_of: Callable[[str], str]) -> dict[str, Any]:
    from math import prod

    steps = []
    for number, step in enumerate(chain.steps):
        done = number < len(chain.executors)
        steps.append(
            {
                "requirement": step.requirement,
                "task": step.task,
                "result": step.result,
                "executor": name_of(chain.executors[number]) if done else None,
                "node_id": chain.executors[number] if done else None,
                "weight": chain.weights[number] if done else None,
            }
        )
    return {
        "planner": name_of(chain.planner),
        "node_id": chain.planner,
        "answer": chain.answer,
        "weight": prod(chain.weights) if chain.weights else 0.0,
        "reason": chain.reason,
        "tokens": chain.tokens,
        "steps": steps,
    }


def _show(found: dict[str, Any]) -> None:
    def say(text: str) -> None:
        console().print(text, markup=False, soft_wrap=True)

    if found["answer"] is None:
        say("no answer")
    else:
        say(f"{found['answer']}    ({found['support']:.0%} of the weight, {found['seconds']:.1f} s)")
    for chain in found["chains"]:
        ended = chain["answer"] if chain["answer"] is not None else f"nothing: {chain['reason']}"
        say(f"\n{chain['planner']}'s chain, weight {chain['weight']:.2f}, says {ended}")
        for number, step in enumerate(chain["steps"], start=1):
            who = f"{step['executor']} ({step['weight']:.2f})" if step["executor"] else "nobody"
            say(f"  {number} {step['requirement']}: {who}: {step['task'][:100]} → {step['result'][:100] or '?'}")
    for row in found.get("compare", ()):
        right = {True: "right, ", False: "wrong, ", None: ""}[row.get("right")]
        say(f"{row['method']:17} {right}{row['answer']!r}: {row['tokens']} tokens, {row['seconds']:.1f} s")
