"""Finished episodes give candidates by rules and by a model, and tell what their notes were worth."""

from __future__ import annotations

from pathlib import Path

import pytest
from memory_makers import make_context, make_entry, noisy_trials
from msgspec.structs import replace

from shoal.envs.registry import make
from shoal.memory.keeper import Keeper
from shoal.memory.learning import MIN_ALONE, learn, report_uses
from shoal.memory.recalling import noted
from shoal.memory.records import Context
from shoal.protocol.chat import Message
from shoal.protocol.episode import Episode, Task, Turn
from shoal.protocol.sampling import Completion


def run(task: str, action: str, reward: float, *recalled: str) -> Context:
    asked = (Message(role="user", content=f"What is {task}?"),)
    made = make_context(reward=reward, action=action, recalled=recalled)
    return replace(made, task=Task(env="arithmetic", id=task, seed=0), messages=asked)


class Writer:
    """Says what it is told to say."""

    def __init__(self, words: str) -> None:
        self.words = words

    async def write(self, worse: Context, better: Context) -> str:
        assert worse.reward < better.reward and worse.task == better.task
        return self.words


async def test_rules_and_a_writer_propose_and_everything_is_screened(tmp_path: Path) -> None:
    note = "Always write the tens before the ones and add a carry at the end."
    contexts = [
        run("11 + 12", "The answer is 23, by columns.", 1.0),
        run("11 + 12", "It is 24, I guess.", 0.0),
        run("13 + 14", f"{note} The answer is 27.", 1.0, note),
        run("15 + 16", "No idea.", 0.0),
    ]
    env = make("arithmetic", {})
    with Keeper(tmp_path, "n") as keeper:
        learnt = await learn(keeper, contexts, env=env, insight=Writer("Add the tens first, then the ones."))
        rules = {memory.entry.provenance.rule: memory for memory in keeper.store.memories()}
        assert set(rules) == {"worked_example", "correction", "insight"} and len(learnt.added) == 3
        assert learnt.refused["recalled text"] == 1 and learnt.refused["not rewarded"] == 1
        for memory in rules.values():
            assert memory.status == "candidate" and memory.entry.source_task == "11 + 12"
            source = keeper.store.context(memory.entry.provenance.context)
            assert source is not None and source.task.id == "11 + 12"
        again = await learn(keeper, contexts, env=env)
        assert not again.added and again.refused["known"] == 2
        # The answer of another task, in an insight, is refused.
        leak = await learn(keeper, [*contexts[:2], run("900 + 100", "1000", 1.0)], env=env, insight=Writer("Say 1000."))
        assert leak.refused["holds a sibling task's answer"] == 1
        assert (
            len((await learn(keeper, [run(f"2 + {n}", f"It is {n + 2}.", 1.0) for n in range(9)], most=4)).added) <= 4
        )


def episode(task: Task, reward: float, number: int) -> Episode:
    drawn = Completion(token_ids=(1,), logprobs=(0.0,), versions=(0,), finish="stop", text="x")
    turn = Turn(context_ids=(1,), observation="", completion=drawn)
    return Episode(id=f"e{number}", group="g", index=0, task=task, turns=(turn,), outcome="done", reward=reward)


def test_a_use_is_worth_its_reward_less_that_of_tasks_without_notes(tmp_path: Path) -> None:
    plain = Task(env="arithmetic", id="t", seed=0)
    with Keeper(tmp_path, "n") as keeper:
        entry = keeper.add(make_entry("Write the carry above the next column."))
        keeper.report(entry.id, noisy_trials(0.5, 200, 1))
        shown = noted(plain, "notes", (entry.id, "0" * 40))
        alone = [episode(plain, float(n % 2), n) for n in range(MIN_ALONE)]
        assert report_uses(keeper, [*alone[:-1], episode(shown, 1.0, 99)]) == 0
        assert report_uses(keeper, [*alone, *(episode(shown, 1.0, 100 + n) for n in range(4))]) == 4
        memory = keeper.memory(entry.id)
        assert memory.uses == 4 and memory.utility == pytest.approx(0.5)
