"""`shoal sft` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

from runs import Runs


def test_a_model_is_tuned_and_can_be_used(runs: Runs) -> None:
    data, out = runs.path / "echo.jsonl", runs.path / "tuned"
    data.write_text("".join(json.dumps({"prompt": f"{n}?", "completion": f"{n}!"}) + "\n" for n in range(8)))
    words = ["sft", runs.model, data, "--out", out, "--epochs", "5", "--batch-size", "4", "--heldout", "0.25"]
    words += ["--lr", "1e-2", "--dtype", "fp32", "--device", "cpu"]
    done = runs.shoal(*words, "--json")
    assert done.wait() == 0, done.said
    assert done.result["steps"] == 10 and done.result["examples_heldout"] == 2
    assert done.result["heldout_nll_after"] < done.result["heldout_nll_before"]
    assert "step 10/10: loss" in done.said
    assert (Path(done.result["model"]) / "config.json").exists()
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 16
    again = runs.shoal(*words)
    other = runs.shoal(*words, "--resume", "--seed", "1")
    assert again.wait() == 2 and "is not empty" in again.said
    assert other.wait() == 2 and "was begun with another seed" in other.said
    resumed = runs.shoal(*words, "--resume", "--json")
    assert resumed.wait() == 0 and resumed.result == done.result, resumed.said
