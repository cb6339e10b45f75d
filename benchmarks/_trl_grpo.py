"""TRL's own GRPO trainer on the tests' task: run as a process, by `training`, with one JSON object of settings.

Nothing of Shoal is imported: model, tokenizer, data, rewards and hyper-parameters come in, a trained model goes out.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def first_digit(completions: list[Any], **_: Any) -> list[float]:
    """The environment's reward: 1 for a reply that begins with a digit."""
    return [float(reply[0]["content"][:1].isdigit()) for reply in completions]


class Progress(TrainerCallback):  # type: ignore[misc]
    """Says each step's reward."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "reward" in logs:
            print(json.dumps({"step": state.global_step, "reward": float(logs["reward"])}), flush=True)


def main() -> None:
    given = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    rows = given["groups_per_step"] * given["group_size"]
    config = GRPOConfig(
        output_dir=given["output"],
        per_device_train_batch_size=rows,
        num_generations=given["group_size"],
        max_completion_length=given["max_tokens"],
        temperature=given["temperature"],
        learning_rate=given["lr"],
        adam_beta1=given["betas"][0],
        adam_beta2=given["betas"][1],
        adam_epsilon=given["eps"],
        weight_decay=given["weight_decay"],
        max_grad_norm=given["grad_clip"],
        lr_scheduler_type="linear",
        warmup_steps=0,
        beta=given["kl_beta"],
        epsilon=given["clip"],
        loss_type="dapo",
        scale_rewards="none",
        max_steps=given["steps"],
        seed=given["seed"],
        bf16=False,
        use_cpu=True,
        shuffle_dataset=False,
        disable_dropout=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in given["prompts"]])
    trainer = GRPOTrainer(
        model=given["model"], reward_funcs=first_digit, args=config, train_dataset=data, callbacks=[Progress()]
    )
    started = time.monotonic()
    trainer.train()
    trainer.save_model(given["output"])
    print(json.dumps({"seconds": time.monotonic() - started}), flush=True)


if __name__ == "__main__":
    main()
