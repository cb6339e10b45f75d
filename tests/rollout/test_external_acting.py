"""Programs that act: real ones, over a real engine's sessions; what their episodes hold, and what makes them void."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoal.engine.local import LocalEngine
from shoal.envs.external import External
from shoal.envs.registry import make
from shoal.errors import ConfigError, TaskError
from shoal.protocol.episode import Episode
from shoal.protocol.sampling import SamplingParams
from shoal.rollout.episode import EpisodeSpec
from shoal.rollout.external import ExternalActing
from shoal.serving.sessions_host import hosting

AGENT = Path(__file__).parents[1] / "agent_script.py"

Act = Callable[..., Awaitable[Episode]]


def judge(task: dict[str, Any], result: Any) -> dict[str, Any]:
    """A checker: half a point for an answer, and how long the question was."""
    return {"reward": 0.5, "parts": {"question": len(task["messages"][0]["content"]), "is_mapping": "answer" in result}}


def wrong(task: dict[str, Any], result: Any) -> float:
    raise ValueError("the author of the checker divided by a banana")


def environment(mode: str = "one", **settings: Any) -> External:
    given = {"command": [sys.executable, str(AGENT), mode], "tasks": "tiny:FirstDigit", "preload": ["urllib.request"]}
    made = make("external", given | settings, name=f"digit-{mode}")
    assert isinstance(made, External)
    return made


@pytest.fixture
async def act(engine: LocalEngine) -> AsyncIterator[Act]:
    """Runs one episode."""
    async with hosting(engine) as sessions:
        acting = ExternalActing(sessions, context_tokens=64)

        async def one(env: External, *, index: int = 0, **params: Any) -> Episode:
            spec = EpisodeSpec("e", "g", index, env.task("train", 0, 0), SamplingParams(max_tokens=4, seed=7 + index))
            spec = replace(spec, params=SamplingParams(**{"max_tokens": 4, "seed": 7 + index, **params}))
            episode = await acting.run_episode(spec, env, engine.draws)
            episode.check()
            if episode.outcome == "done":
                step = await env.fresh().judge(episode)
                assert (step.reward, step.info) == (episode.reward, episode.reward_parts), "it can be judged again"
            return episode

        yield one
        await acting.close()


async def test_one_call(act: Act, engine: LocalEngine) -> None:
    env = environment()
    episode = await act(env)
    (turn,) = episode.turns
    opening = await env.told(episode.task)
    assert turn.observation == opening["messages"][0]["content"] == "0?"
    assert turn.context_ids == tuple(engine.tokenizer.conversation(opening["messages"]))
    assert len(turn.completion.token_ids) <= 4 and episode.outcome == "done"
    assert episode.reward == episode.reward_parts["strict"] == float(turn.completion.text[:1].isdigit())
    again, other = await act(env), await act(env, index=1)
    assert again.turns == episode.turns and other.turns != episode.turns, "the seed decides, the agent's does not"


async def test_two_calls_of_one_conversation_are_one_sequence(act: Act, engine: LocalEngine) -> None:
    episode = await act(environment("two"))
    first, second = episode.turns
    assert episode.branches == ((0, 1),)
    ids = (*first.context_ids, *first.completion.token_ids)
    assert second.context_ids == tuple(engine.tokenizer.continuation(ids, "again?"))
    assert episode.reward == float(second.completion.text[:1].isdigit())


async def test_calls_side_by_side_are_branches(act: Act) -> None:
    episode = await act(environment("side", reward="stdout"))
    assert episode.branches == ((0, 1), (0, 2)) and {t.observation for t in episode.turns[1:]} == {"0?", "1?"}
    assert (episode.reward, episode.reward_parts) == (0.5, {"half": 0.5})


async def test_rewards_that_are_posted_or_checked(act: Act) -> None:
    posted = await act(environment("post", reward="post"))
    assert (posted.reward, posted.reward_parts) == (0.25, {"posted": 1.0})
    checked = await act(environment(reward=f"{__name__}:judge"))
    assert checked.outcome == "done", checked.void_reason
    assert (checked.reward, checked.reward_parts) == (0.5, {"question": 2.0, "is_mapping": 1.0})
    with pytest.raises(TaskError, match="cannot be imported"):
        environment(reward="no_such_module:judge")
    with pytest.raises(ConfigError, match="reward"):
        environment(reward="maybe")


@pytest.mark.parametrize(
    ("mode", "settings", "words"),
    [
        ("silent", {}, "asked the model nothing"),
        ("crash", {}, "ended with 1: ValueError: the agent divided by a banana"),
        ("hang", {"deadline_s": 3.0}, "took longer than 3 s"),
        ("one", {"output_bytes": 64}, "printed more than 64 bytes"),
        ("one", {"reward": "post"}, "without posting a reward"),
        ("post", {}, "ended with 1: urllib.error.HTTPError: HTTP Error 401"),
        ("two", {"max_calls": 1}, "ended with 1: urllib.error.HTTPError: HTTP Error 400"),
        ("one", {"reward": f"{__name__}:wrong"}, "divided by a banana"),
        ("one", {"tasks": "tiny:TwoTurns"}, "episodes of several turns"),
    ],
)
async def test_what_fails_is_void_and_says_why(act: Act, mode: str, settings: dict[str, Any], words: str) -> None:
    episode = await act(environment(mode, **settings))
    assert (episode.outcome, episode.reward) == ("void", 0.0) and words in episode.void_reason


async def test_a_crash_can_have_a_price(act: Act) -> None:
    episode = await act(environment("crash", crash_reward=-1.0))
    assert (episode.outcome, episode.reward, episode.reward_parts) == ("done", -1.0, {"crashed": 1.0})


async def test_a_program_sees_its_own_session_alone(act: Act, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHOAL_API_KEYS", "a secret of the worker's")
    script = tmp_path / "look.py"
    script.write_text(
        f"import sys; sys.argv = ['x', 'one']; sys.path.insert(0, {str(AGENT.parent)!r})\n"
        "import agent_script, os, urllib.error\n"
        "agent_script.main()\n"
        "url = os.environ['OPENAI_BASE_URL']\n"
        "found = [name for name in os.environ if name.startswith('SHOAL_')]\n"
        "for other in ('f' * 32, ''):\n"
        "    try:\n"
        "        agent_script.post(f'{url[:-35]}{other}/v1/chat/completions', {})\n"
        "    except urllib.error.HTTPError as error:\n"
        "        found.append(error.code)\n"
        "print(agent_script.json.dumps({'reward': 0, 'answer': sorted(map(str, found))}))\n"
    )
    env = environment(reward="stdout", command=[sys.executable, str(script)])
    episode = await act(env)
    assert episode.outcome == "done", episode.void_reason
    assert '"404", "404", "SHOAL_AGENT", "SHOAL_REWARD_URL", "SHOAL_TASK"' in episode.output
    assert os.environ["SHOAL_API_KEYS"]


async def test_many_at_once_keep_to_their_slots(act: Act) -> None:
    env = environment(parallel=3)
    episodes = await asyncio.gather(*(act(env, index=index) for index in range(12)))
    assert all(episode.outcome == "done" for episode in episodes)
    assert len({episode.turns for episode in episodes}) > 6
