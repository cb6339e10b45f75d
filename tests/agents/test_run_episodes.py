"""A recorded run is an episode: the tokens that were drawn, in the order in which they were."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from agent_cases import House, add, answer, call, of_kind, plan, tool, turns
from test_agent_tools import over_http

from shoal.agents.scheduler.episodes import context_of, episode_of
from shoal.agents.scheduler.local import SamplerPolicy
from shoal.agents.scheduler.policy import Decided, View
from shoal.agents.scheduler.records import Budget, RunEvent
from shoal.cli.agent_serving import http_app
from shoal.engine.local import LocalEngine
from shoal.engine.source import LocalModel
from shoal.errors import RunError
from shoal.memory.replay import tool_result
from shoal.protocol.codec import from_json, to_json
from shoal.protocol.episode import Episode
from shoal.protocol.sampling import Completion, SampleRequest, SamplingParams
from shoal.serving.keys import Keys

BUDGET = Budget(steps=5, seconds=100)


class Deciding:
    """A model whose first decision is a call and whose second is an answer, whatever it would have said."""

    def __init__(self, engine: LocalEngine) -> None:
        self.engine, self.requests = engine, list[SampleRequest]()
        tokens = engine.tokenizer
        said = ('{"calls":[{"tool":"add","arguments":{"x":1,"y":2}}]}', '{"answer":"3"}')
        self.left = [(*tokens.encode(text), tokens.end_of_turn) for text in said]

    async def sample(self, request: SampleRequest) -> Completion:
        self.requests.append(request)
        ids = self.left.pop(0)
        text = self.engine.tokenizer.decode(ids)
        return Completion(
            token_ids=ids, logprobs=(-0.5,) * len(ids), versions=(3,) * len(ids), finish="stop", text=text
        )


async def recorded(house_path: Path, model: Path) -> tuple[list[RunEvent], list[SampleRequest], str]:
    async with LocalEngine(LocalModel("tiny", model), dtype="fp32", device="cpu", context_tokens=4096) as engine:
        deciding = Deciding(engine)
        policy = SamplerPolicy(deciding, engine.tokenizer, SamplingParams(max_tokens=300, temperature=0.7))
        async with House(house_path, [tool(add)], policy) as house:
            events = await house.run("what is 1 + 2?", record=True, budget=BUDGET)
            async with over_http(http_app(house.runs, Keys({}))) as url, httpx.AsyncClient(base_url=url) as client:
                where = f"/runs/{events[0].run}/episode"
                told = (await client.get(where, params={"reward": "0.5"})).text
                assert (await client.get(where, params={"reward": "nan"})).status_code == 400
    return events, deciding.requests, told


async def test_the_tokens_of_a_run_are_what_the_model_read_and_drew(model: Path, tmp_path: Path) -> None:
    events, asked, told = await recorded(tmp_path, model)
    episode = episode_of(events, reward=0.5)
    episode.check()
    assert from_json(told, Episode) == episode and from_json(to_json(episode), Episode) == episode
    assert episode.outcome == "done" and episode.reward == 0.5 and episode.temperature == 0.7 and episode.version == 3
    sequence: list[int] = []
    for turn, request in zip(episode.turns, asked, strict=True):
        sequence += turn.context_ids
        assert tuple(sequence) == request.prompt_ids, "nothing was tokenised again"
        assert turn.grammar == request.grammar
        sequence += turn.completion.token_ids
    assert [turn.observation for turn in episode.turns][1] == 'c1 (add) gave this data: "3"'
    context = context_of(events, {"add": tool(add).card}, model="tiny", reward=0.5)
    assert tool_result(context, "add", {"x": 1, "y": 2}).result == "3"
    assert context.actions[1] == '{"answer":"3"}' and context.task.data == {"task": "what is 1 + 2?"}


async def test_a_real_model_draws_an_episode_whose_log_probabilities_are_its_own(model: Path, tmp_path: Path) -> None:
    async with LocalEngine(LocalModel("tiny", model), dtype="fp32", device="cpu", context_tokens=4096) as engine:
        policy = SamplerPolicy(engine, engine.tokenizer, SamplingParams(max_tokens=150, temperature=1.0, seed=4))
        async with House(tmp_path, [tool(add)], policy) as house:
            events = await house.run("add", record=True, budget=BUDGET)
    episode = episode_of(events)
    episode.check()
    assert len(episode.turns) == len(of_kind(events, "thought")) and episode.num_tokens > 0
    assert all(one <= 1e-3 for turn in episode.turns for one in turn.completion.logprobs)
    assert any(one < -1e-3 for turn in episode.turns for one in turn.completion.logprobs)


async def test_a_conversation_that_outgrows_the_model_ends_there(model: Path, tmp_path: Path) -> None:
    async with LocalEngine(LocalModel("tiny", model), dtype="fp32", device="cpu", context_tokens=2048) as engine:
        policy = SamplerPolicy(engine, engine.tokenizer, SamplingParams(max_tokens=64, temperature=1.0, seed=1))
        async with House(tmp_path, [tool(add)], policy) as house:
            events = await house.run("add " * 2000, budget=BUDGET)
    assert events[-1].data["reason"] == "context", "and not for want of a model"


async def test_who_gives_no_tokens_cannot_be_recorded(tmp_path: Path) -> None:
    async with House(tmp_path, [tool(add)], turns(plan(call("a", "add", x=1, y=2)), answer("ok"))) as house:
        refused = await house.run(record=True)
        assert refused[-1].data["reason"] == "policy" and "tokens" in refused[-1].data["message"]
        with pytest.raises(RunError, match="no tokens"):
            episode_of(refused)
        with pytest.raises(RunError, match="has not ended"):
            episode_of(refused[:-1])


async def test_a_run_that_its_surroundings_ended_is_void(model: Path, tmp_path: Path) -> None:
    events, _, _ = await recorded(tmp_path, model)
    last = RunEvent(
        run=events[0].run, seq=events[-1].seq, time=0.0, kind="error", data={"reason": "cancelled", "message": "m"}
    )
    void = episode_of([*events[:-1], last], reward=1.0)
    assert void.outcome == "void" and void.reward == 0.0 and void.void_reason == "cancelled"
    spent = RunEvent(run=last.run, seq=last.seq, time=0.0, kind="error", data={"reason": "budget", "message": "m"})
    assert episode_of([*events[:-1], spent], reward=0.0).outcome == "done"


def test_views_of_unrecorded_runs_ask_for_no_tokens() -> None:
    assert View(task="t", cards={}).record is False and Decided(None).drawn is None
