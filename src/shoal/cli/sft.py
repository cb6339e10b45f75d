"""`shoal sft`: supervised fine-tuning on conversations, or on what a run's episodes did well."""

from __future__ import annotations

from pathlib import Path

from shoal.cli.claimed import claim
from shoal.cli.output import console, print_json
from shoal.cli.parameters import Flag, Json
from shoal.cli.tuning import Tuning, fine_tune

SETTINGS = "sft.json"
USUAL = Tuning()


def run(
    model: str,
    data: Path,
    /,
    *,
    out: Path,
    min_reward: float = 1.0,
    tuning: Tuning = USUAL,
    resume: Flag = False,
    json: Json = False,
) -> None:
    """Fine-tune a model on examples.

    DATA has one JSON object a line: {"messages": [...]} as in chat APIs (every assistant turn is learnt),
    {"prompt": ..., "completion": ...}, or an episode as runs keep them in episodes/, which is learnt if it earned
    enough.

    For example:

        shoal sft embedded conversations.jsonl --out tuned
        shoal sft embedded runs/NAME/episodes/000039.jsonl --out tuned --min-reward 1 --epochs 2
        shoal sft embedded conversations.jsonl --out tuned --resume

    Args:
        model: embedded, a directory, a .gguf file or a hub name.
        data: The examples.
        out: A new folder for metrics, checkpoints and the model.
        min_reward: Episodes that earned less are left out.
        resume: Go on from the newest checkpoint in the folder.
    """
    tuning.check()
    what = {"model": model, "data": str(data.resolve()), "min_reward": min_reward, **tuning.facts()}
    claim(out, SETTINGS, what, resume=resume)
    result = fine_tune(out, model, data, min_reward, tuning)
    if json:
        print_json(result)
        return
    before, after = result["heldout_nll_before"], result["heldout_nll_after"]
    held = "" if before is None else f"; held out {before:.3f} → {after:.3f} nats a token"
    console().print(
        f"{result['examples']} examples, {result['steps']} steps, loss {result['loss']:.3f}{held}\n"
        f"Try it: shoal chat {result['model']}",
        markup=False,
        soft_wrap=True,
    )
