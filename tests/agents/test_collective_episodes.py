"""What experts did for a collective is kept, judged, and learnt: by examples, and by reinforcement."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.agents.collective.environment import Steps, StepsSettings
from shoal.agents.collective.episodes import EpisodeFile
from shoal.agents.collective.model import SamplerExpert, SamplerWriter
from shoal.agents.collective.work import SubTask, Work
from shoal.engine.local import LocalEngine
from shoal.engine.source import LocalModel
from shoal.errors import ConfigError, StorageError, TaskError
from shoal.learner.examples import read_examples
from shoal.protocol.codec import read_jsonl
from shoal.protocol.collective import Place
from shoal.protocol.episode import Episode
from shoal.protocol.sampling import Grammar, SamplingParams
from shoal.rollout.episode import EpisodeSpec, run_episode

PLACE = Place("0" * 16, "1" * 16, 0)
DIGITS = Grammar(kind="regex", text="[0-9]{1,3}")


async def test_what_was_drawn_is_kept_with_its_worth_and_learnt_again(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "kept" / "episodes.jsonl"
    kept = EpisodeFile(path, "ab" * 8)
    async with LocalEngine(LocalModel("tiny", model), dtype="fp32", device="cpu", context_tokens=2048) as engine:
        params = SamplingParams(max_tokens=24, temperature=1.0, seed=3)
        expert = SamplerExpert(engine, engine.tokenizer, {}, "You reckon.", params, DIGITS)
        works = [await expert.act(SubTask("sums", f"{n} + {n}", {0: "7"} if n else {})) for n in range(4)]
        for work, score in zip(works, (1.0, 1.0, 0.0, None), strict=True):
            kept.on_work(PLACE, work, score)
        kept.on_work(PLACE, Work("no tokens, from an endpoint"), 1.0)
        plan = await SamplerWriter(engine, engine.tokenizer, params, fallback="sums").write("6 * 7", ["sums"])
        kept.on_plan("1" * 16, plan, 1.0)

        episodes = list(read_jsonl(path, Episode))
        assert kept.num_kept == 5 == len(episodes) and {one.worker for one in episodes} == {"ab" * 8}
        assert [one.outcome for one in episodes] == ["done", "done", "done", "void", "done"]
        assert episodes[3].void_reason and [one.reward for one in episodes[:3]] == [1.0, 1.0, 0.0]
        drawn = episodes[0].turns[0]
        assert works[0].episode is not None and drawn == works[0].episode.turns[0] and drawn.grammar == DIGITS

        # `shoal sft` learns those that were right, in the very tokens that were drawn.
        items = read_examples(path, engine.tokenizer, max_tokens=2048, min_reward=1.0)
        assert len(items.items) == 3 and items.num_below_reward == 2
        assert tuple(items.items[0].token_ids) == (*drawn.context_ids, *drawn.completion.token_ids)

        # `shoal train` does the steps again: the same prompt, the same grammar, the answer that was right then.
        env = Steps(StepsSettings(path=str(path), heldout_fraction=0.0), name="steps")
        tasks = {task.id: task for task in (env.task("train", index, 0) for index in range(8))}
        assert len(tasks) == 2, "a wrong step, one that nobody judged and a chain are no tasks"
        for work in works[:2]:
            assert work.episode is not None
            task = tasks[work.episode.task.id]
            assert (await env.score(task, [work.result])).reward == 1.0
            assert (await env.score(task, [work.result + "9"])).reward == 0.0
            spec = EpisodeSpec(id="e", group="g", index=0, task=task, params=params)
            again = await run_episode(spec, engine, engine.tokenizer, env.fresh(), context_tokens=2048)
            assert again.outcome == "done" and again.turns[0].context_ids == work.episode.turns[0].context_ids
            assert again.reward == 1.0, "the same seed"


def test_files_that_cannot_be_used_say_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        EpisodeFile(tmp_path / "file" / "below.jsonl", "")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for path, complaint in ((tmp_path / "none", "cannot be read"), (empty, "holds no step"), (tmp_path, "no episodes")):
        with pytest.raises(TaskError, match=complaint):
            Steps(StepsSettings(path=str(path))).task("train", 0, 0)
    with pytest.raises(ConfigError):
        read_examples(empty, None, max_tokens=10, min_reward=1.0)  # type: ignore[arg-type]
