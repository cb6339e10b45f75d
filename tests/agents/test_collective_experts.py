"""Experts as settings, and opened: one model for several, adapters by request, policies and tools."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from adapter_files import make_adapter

from shoal.agents.collective.experts import Adapted, ExpertSettings, opened, read_experts, word_similarity
from shoal.agents.collective.model import SamplerExpert
from shoal.agents.collective.policies import PolicyExpert, PolicyWriter, RunsExpert
from shoal.agents.collective.work import NoChain, PlannedStep, StepFailed, SubTask
from shoal.agents.scheduler.log import EventLog
from shoal.agents.scheduler.policy import Decided, PolicyError, ScriptedPolicy, View
from shoal.agents.scheduler.records import Call, Decision, Spent
from shoal.agents.scheduler.service import Runs
from shoal.agents.tools.function import FunctionTool
from shoal.agents.tools.toolbox import Callee, Toolbox
from shoal.errors import ConfigError, ModelError, StorageError


@asynccontextmanager
async def no_tools(one: ExpertSettings) -> AsyncIterator[Sequence[Callee]]:
    yield []


def test_experts_are_read_and_wrong_ones_are_named(tmp_path: Path) -> None:
    path = tmp_path / "experts.toml"
    path.write_text(
        '[[expert]]\nname = "sums"\nlora = "loras/sums"\nskills = { "sums of numbers" = 0.8 }\n'
        '[[expert]]\nname = "far"\nmodel = "big"\nendpoint = "http://localhost:1/v1"\nslots = 4\n'
    )
    sums, far = read_experts(path)
    assert sums.lora == str(tmp_path / "loras/sums") and sums.skills == {"sums of numbers": 0.8} and sums.plans
    assert far.slots == 4 and far.lora == ""
    wrong = {
        "": "no experts",
        "[[expert]]": "name",
        '[[expert]]\nname = "../up"': "name",
        '[[expert]]\nname = "a"\nskils = 1': "skils",
        '[[expert]]\nname = "a"\nskills = { x = 2.0 }': "between 0 and 1",
        '[[expert]]\nname = "a"\nendpoint = "http://h"\nlora = "b"': "adapters",
        '[[expert]]\nname = "a"\n[[expert]]\nname = "a"': "alike",
        "[[expert": "no TOML",
    }
    for text, complaint in wrong.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=complaint):
            read_experts(path)
    with pytest.raises(StorageError):
        read_experts(tmp_path / "none.toml")


async def test_experts_of_one_model_share_it_and_differ_by_their_adapters(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))
    make_adapter(tmp_path / "lora", model, seed=1)
    common = {"model": str(model), "temperature": 0.0, "max_tokens": 12, "dtype": "fp32"}
    settings = [
        ExpertSettings.model_validate({"name": "plain", **common}),
        ExpertSettings.model_validate({"name": "adapted", "lora": str(tmp_path / "lora"), **common}),
        ExpertSettings.model_validate({"name": "digits", "answer": "[0-9]{2}", "plans": False, **common}),
    ]
    async with opened(settings, no_tools, device="cpu") as ready:
        plain, adapted, digits = (one.expert for one in ready)
        assert isinstance(plain, SamplerExpert) and isinstance(adapted, SamplerExpert)
        assert isinstance(plain.sampler, Adapted) and isinstance(adapted.sampler, Adapted)
        assert plain.sampler.engine is adapted.sampler.engine
        task = SubTask("sums", "2 + 2")
        said = [(await expert.act(task)).episode for expert in (plain, adapted, plain)]
        tokens = [one.turns[0].completion.token_ids for one in said if one is not None]
        assert tokens[0] == tokens[2] != tokens[1]
        assert (await digits.act(task)).result.isdigit()
        assert ready[0].writer is not None and ready[2].writer is None
    with pytest.raises(ModelError, match="no adapter"):
        async with opened([settings[1].model_copy(update={"lora": str(tmp_path / "none")})], no_tools):
            pass


async def test_a_policy_answers_and_plans_and_its_failures_are_told() -> None:
    def script(view: View) -> Decided:
        assert view.must_answer and not view.cards
        if "refuse" in view.task:
            raise PolicyError("no more tokens today.")
        said = '{"steps":[{"requirement":"sums","task":"1 + 1","needs":[]}]}' if "problem" in view.task else " 4 "
        return Decided(Decision(answer=said), spent=Spent(tokens_in=7, tokens_out=2))

    policy = ScriptedPolicy(script)
    work = await PolicyExpert(policy).act(SubTask("sums", "2 + 2", {0: "7"}))
    assert (work.result, work.tokens, work.episode) == ("4", 9, None)
    with pytest.raises(StepFailed, match="no more tokens"):
        await PolicyExpert(policy).act(SubTask("sums", "refuse"))
    plan = await PolicyWriter(policy).write("The problem is small.", ["sums"])
    assert list(plan.steps) == [PlannedStep("sums", "1 + 1")] and plan.as_asked
    mute = ScriptedPolicy(lambda view: Decided(Decision(answer="nonsense")))
    with pytest.raises(NoChain):
        await PolicyWriter(mute).write("2 + 2", [])
    assert list((await PolicyWriter(mute, "sums").write("2 + 2", [])).steps) == [PlannedStep("sums", "2 + 2")]


async def test_a_step_is_done_with_tools(tmp_path: Path) -> None:
    def add(x: int, y: int) -> int:
        """x plus y."""
        return x + y

    def script(view: View) -> Decision:
        if "despair" in view.task:
            return Decision(calls=())
        if not view.calls:
            return Decision(calls=(Call(id="a", tool="add", arguments={"x": 2, "y": 2}),))
        return Decision(answer=str(view.value("a")))

    log = EventLog(tmp_path / "runs.db")
    runs = Runs(log, Toolbox([FunctionTool(add)]), ScriptedPolicy(script))
    try:
        expert = RunsExpert(runs)
        assert (await expert.act(SubTask("sums", "2 + 2"))).result == "4"
        with pytest.raises(StepFailed):
            await expert.act(SubTask("sums", "despair"))
    finally:
        await runs.close()
        log.close()


def test_words_that_are_alike() -> None:
    similar = word_similarity()
    assert similar("sums of numbers", "sums of numbers") == 1.0
    assert similar("adding numbers: sums", "sums of numbers") > 0.3 > similar("French poetry", "sums of numbers")
