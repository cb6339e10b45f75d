"""How fast quests are: typed actions, bare resets, and scripts in their sandboxes, on one core with pyrevm.

Every episode is the reference solution, written as the text an agent would write and read back: reset, actions,
checks, revert. `reset_ms` is the mean time to set the stage of a task and to note what its checks need. Times are
processor seconds of one thread, so that neighbours do not count.

A script's work is spread over processes; `python_per_s` and `typescript_per_s` count the processor seconds of them all,
the sandboxes' and Deno's included, less what opening and closing the runner takes by itself. Each act of an episode is
a script of its own.

`lost_transactions` is how many of 1,000 cycles of snapshot, transaction and revert on Anvil went wrong while a busy
process for every core competed with it; without Anvil there is no such number.

    shoal bench evm --json
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from shoal.envs.evm.actions import Action, Submit, write_action
from shoal.envs.evm.anvil import AnvilChain, find_anvil
from shoal.envs.evm.chain import ChainError, Transaction
from shoal.envs.evm.definition import shipped_tasks
from shoal.envs.evm.environment import EvmQuests
from shoal.envs.evm.genesis import AGENT
from shoal.envs.evm.pyrevm_chain import PyrevmChain
from shoal.envs.evm.quest import Quest
from shoal.envs.evm.reference import STRANGER
from shoal.envs.evm.sampling import Instance, sample
from shoal.envs.evm.scripts import Language, ScriptRunner
from shoal.envs.evm.scripts.reference import write_script
from shoal.envs.evm.selftest import reference
from shoal.envs.registry import make
from shoal.errors import RunError, ShoalError
from shoal.protocol.episode import Task

from _common import benchmark, emit

REAP_S = 30.0
PR_SET_CHILD_SUBREAPER = 36
"""Linux's name for 'orphans below me become my children'."""


def solution(task: Task, chain: PyrevmChain) -> list[str]:
    """The reference's actions as text, with the `submit` that ends a workflow."""
    definition = shipped_tasks()[task.id.partition("/")[0]]
    actions, _ = reference(sample(definition, task.seed), chain)
    texts = [write_action(action) for action in actions]
    return [*texts, '{"action": "submit"}'] if definition.composite else texts


async def measure(env: EvmQuests, episodes: int) -> dict[str, float]:
    """Episodes a second and milliseconds a reset, over `episodes` held-out quests."""
    chain = PyrevmChain()
    tasks = env.heldout(episodes)
    solutions = [solution(task, chain) for task in tasks]
    resets = 0.0
    started = time.process_time()
    for task, actions in zip(tasks, solutions, strict=True):
        before = time.process_time()
        await env.reset(task)
        resets += time.process_time() - before
        reward = 0.0
        for action in actions:
            step = await env.step(action)
            reward += step.reward
            if step.done:
                break
        if reward != 1.0:
            raise RunError(f"the reference solution of {task.id} earned {reward}.", "Run shoal evm selftest.")
    seconds = time.process_time() - started
    return {"episodes": len(tasks), "episodes_per_s": len(tasks) / seconds, "reset_ms": 1000 * resets / len(tasks)}


def processor_seconds() -> float:
    """Of this process and of all below it that have ended; waits for those that are ending.

    Orphans become children of this process, so none gets away with its seconds.
    """
    deadline = time.monotonic() + REAP_S
    try:
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.01)
    except ChildProcessError:
        pass
    below = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + below.ru_utime + below.ru_stime


@contextmanager
def busy_cores() -> Iterator[None]:
    """A process for every core that does nothing but compute."""
    burn = [sys.executable, "-c", "while True: pass"]
    burners = [subprocess.Popen(burn) for _ in os.sched_getaffinity(0)]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


async def play_scripts(runner: ScriptRunner, instance: Instance, actions: list[Action], chain: PyrevmChain) -> None:
    quest = Quest(instance, chain)
    quest.begin()
    try:
        for action in actions:
            if quest.act(await runner.run(quest, write_script(action, runner.language))).done:  # type: ignore[arg-type]
                break
        else:
            quest.act(Submit(action="submit"))
        if quest.verdict().strict != 100:
            raise RunError(f"the scripts for {instance.definition.id} earned {quest.verdict().strict}.")
    finally:
        quest.end()


def measure_scripts(language: Language, episodes: int) -> dict[str, Any]:
    """Episodes a second of one core, the workers warm."""
    chain = PyrevmChain()
    env = make("evm", {})
    instances = [sample(shipped_tasks()[task.id.partition("/")[0]], task.seed) for task in env.heldout(episodes)]
    solutions = [(instance, reference(instance, chain)[0]) for instance in instances]

    async def play(wanted: list[tuple[Instance, list[Action]]]) -> None:
        async with ScriptRunner(language, workers=1) as runner:
            for instance, actions in wanted:
                await play_scripts(runner, instance, actions, chain)

    spent = []
    for wanted in ([], solutions):
        before = processor_seconds()
        asyncio.run(play(wanted))
        spent.append(processor_seconds() - before)
    seconds = spent[1] - spent[0]
    scripts = sum(len(actions) for _, actions in solutions)
    return {"episodes": episodes, "episodes_per_s": episodes / seconds, "scripts_per_s": scripts / seconds}


def lost_transactions(cycles: int) -> int:
    """How many of so many cycles on Anvil did not do what they should."""
    lost = 0
    with closing(AnvilChain()) as chain, busy_cores():
        for _ in range(cycles):
            point = chain.snapshot()
            try:
                done = chain.send(Transaction(AGENT, STRANGER, value=1)).success and chain.balance(STRANGER) == 1
            except ChainError:
                done = False
            lost += not done
            chain.revert(point)
    return lost


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--episodes", type=int, default=535, help="quests of each kind")
    parser.add_argument("--script-episodes", type=int, default=107, help="quests done by scripts, in each language")
    parser.add_argument("--cycles", type=int, default=1000, help="snapshots on Anvil")
    options = parser.parse_args()
    episodes = options.episodes
    composite = {task.group for task in shipped_tasks().values() if task.composite}
    atomic = [task.id for task in shipped_tasks().values() if not task.composite]
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    rows: list[dict[str, Any]] = []
    for name, settings in (
        ("payments", {"groups": ["native"]}),
        ("atomic", {"tasks": atomic}),
        ("composite", {"groups": sorted(composite)}),
        ("all", {}),
    ):
        env = make("evm", settings)
        assert isinstance(env, EvmQuests)
        rows.append({"quests": name, **asyncio.run(measure(env, episodes))})
    headline = {"typed_per_s": rows[-1]["episodes_per_s"], "reset_ms": rows[-1]["reset_ms"]}
    for language in ("python", "typescript"):
        try:
            measured = measure_scripts(language, options.script_episodes)
        except ShoalError as error:
            rows.append({"quests": f"{language} scripts", "missing": error.problem})
            continue
        rows.append({"quests": f"{language} scripts", **measured})
        headline[f"{language}_per_s"] = measured["episodes_per_s"]
    if find_anvil() is not None:
        headline["lost_transactions"] = lost_transactions(options.cycles)
        rows.append({"quests": "cycles on Anvil", "episodes": options.cycles})
    emit(rows, headline)


if __name__ == "__main__":
    benchmark(main)
