"""Adapters that Shoal trained, as folders that engines and other tools load: what peft writes.

    `shoal sft --lora-rank` ──▶ checkpoints/step…  ──▶ FOLDER/adapter: adapter_config.json, adapter_model.safetensors

Invariant: a folder that peft has saved is used as it is; one of `shoal sft` gets its newest checkpoint's adapter beside
it, made again only where there is a newer one.
"""

from __future__ import annotations

import json
from pathlib import Path

from shoal.errors import ModelError, StorageError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MADE_BY_SFT = "sft.json"


def adapter_folder(folder: Path) -> Path:
    """The adapter in a folder: peft's own, or that of a fine-tuning.

    Raises:
        ModelError: it holds neither.
        StorageError: its checkpoint is damaged, or the adapter cannot be written.
    """
    if (folder / CONFIG).is_file() or not (folder / MADE_BY_SFT).is_file():
        return folder
    from safetensors.numpy import save_file

    from shoal.config.learner import ColocatedLearner
    from shoal.learner import checkpoint
    from shoal.learner.lora import ADAPTER

    try:
        made = json.loads((folder / MADE_BY_SFT).read_text())
        learner = {key: value for key, value in made["learner"].items() if value is not None}
        lora = ColocatedLearner.model_validate(learner).lora
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{folder / MADE_BY_SFT} cannot be read: {error}.", "Fine-tune again.") from None
    found = checkpoint.load_latest(folder / "checkpoints")
    if lora is None or found is None:
        raise ModelError(
            f"{folder} was fine-tuned without an adapter, or has no checkpoint yet.",
            "Fine-tune with shoal sft --lora-rank, or use its model/ as the model.",
        )
    target = folder / "adapter"
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": made.get("model", ""),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": list(lora.targets),
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "shoal_version": found.version,
    }
    if (target / CONFIG).is_file() and json.loads((target / CONFIG).read_text()).get("shoal_version") == found.version:
        return target
    weights = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": tensor.float().contiguous().numpy()
        for name, tensor in found.weights.items()
    }
    try:
        target.mkdir(exist_ok=True)
        save_file(weights, target / WEIGHTS)
        (target / CONFIG).write_text(json.dumps(config, indent=1))
    except OSError as error:
        raise StorageError(f"{target} cannot be written: {error.strerror}.", "Free some space.") from None
    return target
