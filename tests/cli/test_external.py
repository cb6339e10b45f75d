"""Training an agent that is a program of its own, with real processes: what is recorded, void, and learnt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from runs import Runs, processes_of, until

from shoal.protocol.episode import Episode

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

AGENT = Path(__file__).parents[1] / "agent_script.py"


def external(mode: str = "one", **settings: Any) -> dict[str, Any]:
    """The tiny run's environment, acted in by the agent."""
    given = {"command": [sys.executable, str(AGENT), mode], "tasks": "tiny:FirstDigit", "preload": ["urllib.request"]}
    return {"envs__digit__type": "external", "envs__digit__settings": given | settings}


def trained(runs: Runs, **changes: Any) -> list[Episode]:
    """All episodes of a run of two steps."""
    train = runs.train(**{"run__steps": 2, "eval__before": False, "eval__after": False, **changes})
    assert train.wait() == 0, train.said + runs.run.logs()
    runs.run.check(steps=2)
    return [episode for batch in runs.run.episodes().values() for episode in batch]


def test_two_calls_of_one_conversation_are_one_sequence(runs: Runs) -> None:
    episodes = trained(runs, **external("two"))
    for episode in episodes:
        assert episode.branches == ((0, 1),) and episode.temperature == 1.0
        assert episode.turns[1].observation == "again?" and episode.output.startswith("thinking aloud\n{")
        assert episode.reward == float(episode.turns[1].completion.text[:1].isdigit())
    assert {episode.reward for episode in episodes} == {0.0, 1.0}, "drawn at the run's temperature, not the agent's"
    assert all(line["ratio_max"] < 1.1 for line in runs.run.steps[:1]), "what was recorded is what was drawn"


def test_calls_side_by_side_are_branches_that_train(runs: Runs) -> None:
    """In colocated mode, with a reward that the agent prints."""
    changes = external("side", reward="stdout", max_calls=3)
    changes |= {"learner__mode": "colocated", "learner__skip_zero_advantage": False}
    train = runs.train(**{"run__steps": 1, "eval__before": False, "eval__after": False, **changes})
    assert train.wait() == 0, train.said + runs.run.logs()
    (episodes,) = runs.run.episodes().values()
    for episode in episodes:
        assert episode.branches == ((0, 1), (0, 2)) and (episode.reward, episode.reward_parts) == (0.5, {"half": 0.5})
    (step,) = runs.run.steps
    assert step["tokens"] == sum(episode.num_tokens for episode in episodes), "the shared turn counts once"
    assert step["ratio_max"] < 1.01 and step["ratio_min"] > 0.99
    assert processes_of(runs.path) == []


def test_a_reward_that_is_posted(runs: Runs) -> None:
    episodes = trained(runs, **external("post", reward="post"))
    assert {(e.reward, e.reward_parts["posted"]) for e in episodes} == {(0.25, 1.0)}


@pytest.mark.parametrize(
    ("mode", "settings", "words"),
    [
        ("silent", {}, "asked the model nothing"),
        ("crash", {}, "ended with 1: ValueError: the agent divided by a banana"),
        ("hang", {"deadline_s": 1.5}, "took longer than 1.5 s"),
        ("one", {"output_bytes": 64}, "printed more than 64 bytes"),
        ("one", {"reward": "post"}, "without posting a reward"),
        ("two", {"max_calls": 1}, "HTTP Error 400"),
    ],
)
def test_what_fails_is_void_and_says_why(runs: Runs, mode: str, settings: dict[str, Any], words: str) -> None:
    train = runs.train(**{"eval__before": False, "eval__after": False, **external(mode, **settings)})
    assert train.wait() == 2
    assert words in train.said, train.said
    refused = runs.run.events("rollout.refused")
    assert refused and all(words in event["reason"] for event in refused)
    assert not any(runs.run.episodes().values()) and processes_of(runs.path) == []


def test_a_crash_can_have_a_price(runs: Runs) -> None:
    episodes = trained(runs, **external("crash", crash_reward=-1.0))
    assert {(e.reward, e.outcome, tuple(e.reward_parts)) for e in episodes} == {(-1.0, "done", ("crashed",))}


def test_a_worker_from_elsewhere_starts_no_programs_unless_it_is_told_to(runs: Runs) -> None:
    train = runs.train("--workers", "0", **external(), run__steps=2, eval__before=False, eval__after=False)
    until(lambda: (runs.run.path / "ticket.txt").exists(), train, runs.run)
    refused = runs.shoal("worker", runs.run.ticket, "--device", "cpu")
    assert refused.wait() == 2 and "--allow-programs" in refused.said
    willing = runs.shoal("worker", runs.run.ticket, "--device", "cpu", "--allow-programs")
    assert train.wait() == 0, train.said + willing.said
    runs.run.check(steps=2)


def test_the_reward_rises(runs: Runs) -> None:
    from test_train import LEARNS, mean_reward

    train = runs.train(**{**LEARNS, **external()})
    assert train.wait() == 0, train.said + runs.run.logs()
    assert mean_reward(runs.run, 15, 20) > mean_reward(runs.run, 0, 5) + 0.3
    assert train.result["accuracy_after"] > train.result["accuracy_before"] + 0.3
