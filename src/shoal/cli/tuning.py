"""Supervised fine-tuning as commands offer it: its options, and the run that they say.

`shoal sft` and `shoal dream fit` differ in what they learn from, and in defaults.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import Parameter

from shoal.cli.output import note
from shoal.errors import ConfigError

if TYPE_CHECKING:
    from shoal.config.learner import ColocatedLearner

METRICS = "metrics.jsonl"


@Parameter(name="*")
@dataclass(frozen=True)
class Tuning:
    """Options of a fine-tuning; a command with other defaults derives from it."""

    epochs: int = 1
    """Times that every example is learnt."""
    batch_size: int = 16
    """Examples of one optimizer step."""
    lr: float = 1e-5
    """Peak learning rate of AdamW."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """After the warm-up."""
    max_tokens: int = 1024
    """Longer examples are left out."""
    heldout: float = 0.05
    """Share of the examples that is only measured, by its likelihood."""
    lora_rank: int = 0
    """Train adapters of this rank instead of all weights; 0 trains all."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Of the weights that compute; masters are fp32."""
    microbatch_tokens: int = 1024
    """Tokens of one pass; lower it where memory is short, the result stays the same."""
    checkpoint_every: int = 50
    """Steps between checkpoints; 0 writes only the last one."""
    seed: int = 0
    """Of the order, of what is held out and of what is drawn."""
    threads: int = 1
    """CPU threads."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def check(self) -> None:
        """Raises:
        ConfigError: names the option that cannot be used.
        """
        if not 0 <= self.heldout < 1:
            raise ConfigError(f"--heldout {self.heldout:g} is not a share.", "Give a number from 0 to below 1.")
        if min(self.epochs, self.batch_size, self.max_tokens) < 1 or self.checkpoint_every < 0:
            raise ConfigError(
                "--epochs, --batch-size and --max-tokens must be at least 1, --checkpoint-every at least 0."
            )
        self.learner()

    def learner(self) -> ColocatedLearner:
        """The `[learner]` table that the options make.

        Raises:
            ConfigError: names the option that cannot be used.
        """
        from pydantic import ValidationError

        from shoal.config.learner import ColocatedLearner

        try:
            return ColocatedLearner.model_validate(self._table())
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = "-".join(str(part) for part in first["loc"]).replace("_", "-")
            raise ConfigError(f"--{name}: {first['msg']}.") from None

    def facts(self) -> dict[str, Any]:
        """What must be the same when a folder is gone on with: all but the machine's part and how often it saves."""
        return {
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "max_tokens": self.max_tokens,
            "heldout": self.heldout,
            "dtype": self.dtype,
            "seed": self.seed,
            "learner": {**self._table(), "threads": None, "device": None},
        }

    def _table(self) -> dict[str, Any]:
        return {
            "mode": "colocated",
            "lr": self.lr,
            "warmup_steps": self.warmup_steps,
            "lr_schedule": self.lr_schedule,
            "microbatch_tokens": self.microbatch_tokens,
            "threads": self.threads,
            "device": self.device,
            **({"lora": {"rank": self.lora_rank}} if self.lora_rank else {}),
        }


@Parameter(name="*")
@dataclass(frozen=True)
class WorldTuning(Tuning):
    """What teaches a small model a site in one pass."""

    batch_size: int = 8
    lr: float = 2e-4
    warmup_steps: int = 20
    heldout: float = 0.02
    microbatch_tokens: int = 2048


def fine_tune(out: Path, model: str, data: Path, min_reward: float, tuning: Tuning) -> dict[str, Any]:
    """Fine-tune in a folder that was claimed, from its newest checkpoint on; gives what the command reports.

    Args:
        model: embedded, a directory, a .gguf file or a hub name.
        data: The examples, one JSON object a line.
        min_reward: Episodes that earned less are left out.
    """
    from shoal.engine.source import resolve
    from shoal.engine.tokenizer import Tokenizer
    from shoal.learner.examples import read_examples
    from shoal.learner.supervised import Plan, num_heldout, num_steps, run
    from shoal.rollout.host import model_cache

    local = resolve(model, model_cache(), note)
    tokenizer = Tokenizer(local.directory)
    found = read_examples(data, tokenizer, max_tokens=tuning.max_tokens, min_reward=min_reward)
    for count, why in ((found.num_too_long, "too long"), (found.num_below_reward, "episodes below the reward")):
        if count:
            note(f"{count} left out: {why}")
    measured_only = num_heldout(len(found.items), tuning.heldout)
    plan = Plan(tuning.epochs, tuning.batch_size, tuning.seed, tuning.checkpoint_every)
    path = out / METRICS
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def on_resume(step: int) -> None:
        lines[:] = [line for line in lines if line["step"] <= step]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        note(f"continuing after step {step}")

    def on_metrics(line: dict[str, Any]) -> None:
        lines.append(line)
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if line["kind"] == "eval":
            note(f"step {line['step']}: {line['nll']:.4f} nats a held-out token")
        else:
            total = num_steps(len(found.items) - measured_only, plan)
            note(f"step {line['step']}/{total}: loss {line['loss']:.4f}, {line['tokens']:.0f} tokens")

    try:
        run(
            local,
            tuning.learner(),
            plan,
            found.items,
            tuning.heldout,
            out,
            tokenizer,
            on_metrics,
            on_resume,
            dtype=tuning.dtype,
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
