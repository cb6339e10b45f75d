"""How fast quests are: typed actions through the environment and bare resets, on one core with pyrevm.

Every episode is the reference solution, written as the text an agent would write and read back: reset, actions,
checks, revert. `reset_ms` is the mean time to set the stage of a task and to note what its checks need. Times are
processor seconds of one thread, so that neighbours do not count.

    shoal bench evm --json
"""

from __future__ import annotations

import argparse
import asyncio
import time

from shoal.envs.evm.actions import write_action
from shoal.envs.evm.definition import shipped_tasks
from shoal.envs.evm.environment import EvmQuests
from shoal.envs.evm.pyrevm_chain import PyrevmChain
from shoal.envs.evm.sampling import sample
from shoal.envs.evm.selftest import reference
from shoal.envs.registry import make
from shoal.errors import RunError
from shoal.protocol.episode import Task

from _common import benchmark, emit


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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--episodes", type=int, default=535, help="quests of each kind")
    episodes = parser.parse_args().episodes
    composite = {task.group for task in shipped_tasks().values() if task.composite}
    atomic = [task.id for task in shipped_tasks().values() if not task.composite]
    rows = []
    for name, settings in (
        ("payments", {"groups": ["native"]}),
        ("atomic", {"tasks": atomic}),
        ("composite", {"groups": sorted(composite)}),
        ("all", {}),
    ):
        env = make("evm", settings)
        assert isinstance(env, EvmQuests)
        rows.append({"quests": name, **asyncio.run(measure(env, episodes))})
    by_name = {row["quests"]: row for row in rows}
    emit(
        rows,
        {"typed_per_s": by_name["all"]["episodes_per_s"], "reset_ms": by_name["all"]["reset_ms"]},
    )


if __name__ == "__main__":
    benchmark(main)
