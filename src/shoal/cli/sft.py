"""`shoal sft`: supervised fine-tuning on conversations, or on what a run's episodes did well."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.cli.claimed import claim
from shoal.cli.output import console, note, print_json
from shoal.cli.parameters import Flag, Json
from shoal.errors import ConfigError

if TYPE_CHECKING:
    from shoal.config.learner import ColocatedLearner

SETTINGS = "sft.json"
METRICS = "metrics.jsonl"


def run(
    model: str,
    data: Path,
    /,
    *,
    out: Path,
    epochs: int = 1,
    batch_size: int = 16,
    lr: float = 1e-5,
    warmup_steps: int = 0,
    lr_schedule: str = "linear",
    max_tokens: int = 1024,
    min_reward: float = 1.0,
    heldout: float = 0.05,
    lora_rank: int = 0,
    dtype: str = "bf16",
    microbatch_tokens: int = 1024,
    checkpoint_every: int = 50,
    seed: int = 0,
    threads: int = 1,
    device: str = "auto",
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
        epochs: Times that every example is learnt.
        batch_size: Examples of one optimizer step.
        lr: Peak learning rate of AdamW.
        warmup_steps: Steps over which the learning rate rises.
        lr_schedule: constant, linear or cosine, after the warm-up.
        max_tokens: Longer examples are left out.
        min_reward: Episodes that earned less are left out.
        heldout: Share of the examples that is only measured.
        lora_rank: Train adapters of this rank instead of all weights; 0 trains all.
        dtype: bf16 or fp32.
        microbatch_tokens: Tokens of one pass; lower it where memory is short, the result stays the same.
        checkpoint_every: Steps between checkpoints; 0 writes only the last one.
        seed: Of the order and of what is held out.
        threads: CPU threads.
        device: auto, cpu, cuda or cuda:N.
        resume: Go on from the newest checkpoint in the folder.
    """
    if not 0 <= heldout < 1:
        raise ConfigError(f"--heldout {heldout:g} is not a share.", "Give a number from 0 to below 1.")
    if dtype not in ("bf16", "fp32"):
        raise ConfigError(f"--dtype {dtype} is neither bf16 nor fp32.")
    if min(epochs, batch_size, max_tokens) < 1 or checkpoint_every < 0:
        raise ConfigError("--epochs, --batch-size and --max-tokens must be at least 1, --checkpoint-every at least 0.")
    table: dict[str, Any] = {
        "mode": "colocated",
        "lr": lr,
        "warmup_steps": warmup_steps,
        "lr_schedule": lr_schedule,
        "microbatch_tokens": microbatch_tokens,
        "threads": threads,
        "device": device,
        **({"lora": {"rank": lora_rank}} if lora_rank else {}),
    }
    settings = learner_settings(table)
    what: dict[str, Any] = {
        "model": model,
        "data": str(data.resolve()),
        "epochs": epochs,
        "batch_size": batch_size,
        "max_tokens": max_tokens,
        "min_reward": min_reward,
        "heldout": heldout,
        "dtype": dtype,
        "seed": seed,
        "learner": {**table, "threads": None, "device": None},
    }
    claim(out, SETTINGS, what, resume=resume)
    result = fine_tune(out, what, settings, checkpoint_every)
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


def learner_settings(table: dict[str, Any]) -> ColocatedLearner:
    """The `[learner]` table that options of a command made.

    Raises:
        ConfigError: names the option that cannot be used.
    """
    from pydantic import ValidationError

    from shoal.config.learner import ColocatedLearner

    try:
        return ColocatedLearner.model_validate(table)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = "-".join(str(part) for part in first["loc"]).replace("_", "-")
        raise ConfigError(f"--{name}: {first['msg']}.") from None


def fine_tune(out: Path, what: dict[str, Any], settings: ColocatedLearner, checkpoint_every: int) -> dict[str, Any]:
    """Fine-tune in a folder that was claimed, from its newest checkpoint on; gives what the command reports.

    Args:
        what: model, data, epochs, batch_size, max_tokens, min_reward, heldout, dtype and seed, as options of `run`.
    """
    from shoal.engine.source import resolve
    from shoal.engine.tokenizer import Tokenizer
    from shoal.learner.examples import read_examples
    from shoal.learner.supervised import Plan, num_heldout, num_steps, run
    from shoal.rollout.host import model_cache

    local = resolve(what["model"], model_cache(), note)
    tokenizer = Tokenizer(local.directory)
    found = read_examples(Path(what["data"]), tokenizer, max_tokens=what["max_tokens"], min_reward=what["min_reward"])
    for count, why in ((found.num_too_long, "too long"), (found.num_below_reward, "episodes below the reward")):
        if count:
            note(f"{count} left out: {why}")
    measured_only = num_heldout(len(found.items), what["heldout"])
    plan = Plan(what["epochs"], what["batch_size"], what["seed"], checkpoint_every)
    path = out / METRICS
    lines = [json_module.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def on_resume(step: int) -> None:
        lines[:] = [line for line in lines if line["step"] <= step]
        path.write_text("".join(json_module.dumps(line) + "\n" for line in lines))
        note(f"continuing after step {step}")

    def on_metrics(line: dict[str, Any]) -> None:
        lines.append(line)
        with path.open("a") as file:
            file.write(json_module.dumps(line) + "\n")
        if line["kind"] == "eval":
            note(f"step {line['step']}: {line['nll']:.4f} nats a held-out token")
        else:
            total = num_steps(len(found.items) - measured_only, plan)
            note(f"step {line['step']}/{total}: loss {line['loss']:.4f}, {line['tokens']:.0f} tokens")

    try:
        run(
            local,
            settings,
            plan,
            found.items,
            what["heldout"],
            out,
            tokenizer,
            on_metrics,
            on_resume,
            dtype=what["dtype"],
        )
    except KeyboardInterrupt:
        note("Interrupted. Repeat the command with --resume to go on from the last checkpoint.")
        raise
    evals = [line["nll"] for line in lines if line["kind"] == "eval"]
    steps = [line for line in lines if line["kind"] == "step"]
    return {
        "model": str(out / "model"),
        "examples": len(found.items),
        "examples_heldout": measured_only,
        "examples_too_long": found.num_too_long,
        "steps": len(steps),
        "loss": steps[-1]["loss"],
        "heldout_nll_before": evals[0] if evals else None,
        "heldout_nll_after": evals[-1] if evals else None,
    }
