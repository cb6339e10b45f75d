"""`shoal dream fit`: a world model, fine-tuned on collected episodes by the learner's own machinery."""

from __future__ import annotations

import json as json_codec
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from shoal.cli.claimed import claim
from shoal.cli.output import console, note, print_json
from shoal.cli.parameters import Flag, Json
from shoal.cli.tuning import WorldTuning, fine_tune
from shoal.errors import ConfigError

if TYPE_CHECKING:
    from shoal.envs.dream.dataset import Example

EXAMPLES = "examples.jsonl"
USUAL = WorldTuning()


def fit(
    *data: Path,
    out: Path,
    model: str = "embedded",
    examples: int = 3400,
    judging: float = 0.12,
    page_tokens: int = 288,
    link_tokens: int = 96,
    field_tokens: int = 96,
    done_tokens: int = 256,
    tuning: WorldTuning = USUAL,
    resume: Flag = False,
    json: Json = False,
) -> None:
    """Fit a world model to episodes that shoal dream collect wrote.

    It learns, of every transition, a reason and the change of the page, and of every episode whether its task is done.
    A run that was ended goes on with --resume. The result is OUT/model, and OUT is what dreams name as their world.

    For example:

        shoal dream fit dreams/experts dreams/wandering --out world
        shoal dream fit dreams/experts dreams/wandering --out world --resume
        shoal dream eval world dreams/heldout

    Args:
        data: Folders of episodes.
        out: A new folder for examples, metrics, checkpoints and the model.
        model: embedded, a directory, a .gguf file or a hub name.
        examples: At most so many, drawn by the seed.
        judging: Share of them that asks whether a task is done.
        page_tokens: About how many tokens of a page are shown for an act that may change it.
        link_tokens: The same for a click on a link.
        field_tokens: The same for an act that fills in a field.
        done_tokens: The same of the last page, for the question whether a task is done.
        resume: Go on from the newest checkpoint in the folder.
    """
    if not data:
        raise ConfigError("there is nothing to learn from.", "Name folders that shoal dream collect wrote.")
    if examples < 1 or not 0 <= judging < 1:
        raise ConfigError("--examples must be at least 1, --judging a share below 1.")
    tuning.check()
    from shoal.envs.base import parse_settings
    from shoal.envs.dream.prompt import Sight
    from shoal.envs.dream.world import CARD

    given = {
        "page_tokens": page_tokens,
        "link_tokens": link_tokens,
        "field_tokens": field_tokens,
        "done_tokens": done_tokens,
    }
    sight = parse_settings(Sight, given, "the world model")
    what: dict[str, Any] = {
        "model": model,
        "episodes": [str(folder.resolve()) for folder in data],
        "data": str((out / EXAMPLES).resolve()),
        "sight": sight.model_dump(),
        "examples": examples,
        "judging": judging,
        "min_reward": 1.0,
        **tuning.facts(),
    }
    claim(out, CARD, what, resume=resume)
    counts = _write_examples(list(data), out / EXAMPLES, what)
    result = {**counts, **fine_tune(out, model, out / EXAMPLES, 1.0, tuning), "world": str(out)}
    if json:
        print_json(result)
        return
    console().print(
        f"{result['examples']} examples, {result['steps']} steps, loss {result['loss']:.3f}\n"
        f"Measure it: shoal dream eval {out} HELD_OUT_EPISODES",
        markup=False,
        soft_wrap=True,
    )


def _write_examples(data: list[Path], path: Path, what: dict[str, Any]) -> dict[str, Any]:
    """Make the examples, the same for the same settings; and say how many there are, and how long."""
    from shoal.envs.dream.dataset import balanced, done_examples, next_examples, read_episodes, thinned
    from shoal.envs.dream.prompt import Sight

    sight, seed, limit = Sight.model_validate(what["sight"]), what["seed"], what["examples"]
    episodes = read_episodes(data)
    nexts = balanced(next_examples(episodes, sight, seed))
    dones = thinned(done_examples(episodes, sight, seed))
    chosen = _drawn(dones, round(limit * what["judging"]), seed)
    chosen += _drawn(nexts, limit - len(chosen), seed)
    lines = (json_codec.dumps({"prompt": one.prompt, "completion": one.completion}) for one in chosen)
    path.write_text("".join(f"{line}\n" for line in lines))
    found = {
        "episodes": len(episodes),
        "transitions_there": len(nexts),
        "judgements_there": len(dones),
        **_lengths(chosen, what["model"]),
    }
    note(
        f"{len(episodes)} episodes: {len(nexts)} transitions and {len(dones)} judgements, of which {len(chosen)} are"
        f" learnt; a question has {found['question_tokens_mean']:.0f} tokens (at most {found['question_tokens_max']}),"
        f" an answer {found['answer_tokens_mean']:.0f} (at most {found['answer_tokens_max']})"
    )
    return found


def _drawn(examples: list[Example], count: int, seed: int) -> list[Example]:
    """At most `count` of them; which, the seed says."""
    from shoal.envs.base import stable_int

    if len(examples) <= count:
        return list(examples)
    return Random(stable_int("world examples", seed)).sample(examples, count)


def _lengths(examples: list[Example], model: str) -> dict[str, Any]:
    """Tokens of questions and answers."""
    from shoal.engine.source import resolve
    from shoal.engine.tokenizer import Tokenizer
    from shoal.rollout.host import model_cache

    if not examples:
        raise ConfigError("the episodes hold nothing to learn from.", "Collect more of them.")
    tokenizer = Tokenizer(resolve(model, model_cache(), note).directory)
    asked = [len(tokenizer.encode(one.prompt)) for one in examples]
    said = [len(tokenizer.encode(one.completion)) for one in examples]
    return {
        "question_tokens_mean": sum(asked) / len(asked),
        "question_tokens_max": max(asked),
        "answer_tokens_mean": sum(said) / len(said),
        "answer_tokens_max": max(said),
    }
