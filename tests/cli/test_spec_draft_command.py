"""`shoal draft train` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import Runs

from shoal.cli.app import main


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_head_is_trained_and_goes_on_where_it_stopped(runs: Runs) -> None:
    prompts, out = runs.path / "prompts.jsonl", runs.path / "drafter"
    prompts.write_text("".join(json.dumps({"prompt": f"{n}?"}) + "\n" for n in range(24)))
    words = ["draft", "train", runs.model, prompts, "--out", out, "--tokens", "600", "--max-tokens", "40"]
    words += ["--draft-vocab", "48", "--epochs", "4", "--lr", "5e-3", "--dtype", "fp32", "--device", "cpu"]
    words += ["--eval-every", "5", "--checkpoint-every", "5", "--test-steps", "3"]
    done = runs.shoal(*words, "--json")
    assert done.wait() == 0, done.said
    result = done.result
    assert result["texts_heldout"] >= 1 and len(result["heldout_accept"]) == 3
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "step"]
    # What a random model says is nearly noise: there is little to be learnt, but not nothing.
    assert len(losses) == result["steps"] and losses[-1] < losses[0]
    head = Path(result["drafter"])
    assert {path.name for path in head.iterdir()} == {"config.json", "model.safetensors"}
    texts = (out / "texts.jsonl").read_text()
    # As if it had been killed in training, when all texts were written: the newest checkpoint is gone.
    newest = max((out / "checkpoints").iterdir())
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    weights = (head / "model.safetensors").read_bytes()
    resumed = runs.shoal(*words, "--resume", "--json")
    other = runs.shoal(*words, "--resume", "--seed", "1")
    assert resumed.wait() == 0 and "continuing after step" in resumed.said, resumed.said
    assert (head / "model.safetensors").read_bytes() == weights, "the same head as without the interruption"
    assert (out / "texts.jsonl").read_text() == texts
    assert other.wait() == 2 and "was begun with another seed" in other.said


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_student_is_distilled_and_drafts(runs: Runs) -> None:
    prompts, out = runs.path / "prompts.jsonl", runs.path / "drafter"
    prompts.write_text("".join(json.dumps({"prompt": f"{n}?"}) + "\n" for n in range(12)))
    words = ["draft", "train", runs.model, prompts, "--out", out, "--kind", "student", "--layers", "1"]
    words += ["--tokens", "200", "--max-tokens", "30", "--epochs", "2", "--dtype", "fp32", "--device", "cpu"]
    done = runs.shoal(*words, "--test-steps", "2", "--json")
    assert done.wait() == 0, done.said
    student = Path(done.result["drafter"])
    assert student == out / "student" and len(done.result["heldout_accept"]) == 2
    resumed = runs.shoal(*words, "--test-steps", "2", "--resume", "--json")
    assert resumed.wait() == 0, resumed.said
    words = ["chat", runs.model, "--message", "7?", "--max-tokens", "12", "--json"]
    plain, drafted = runs.shoal(*words), runs.shoal(*words, "--draft", str(student))
    assert plain.wait() == 0 and drafted.wait() == 0, plain.said + drafted.said
    assert "answer" in drafted.result and drafted.result.keys() == plain.result.keys()


@pytest.mark.parametrize(
    ("content", "options", "complaint"),
    [
        (None, [], "there is no file"),
        ("", [], "is empty"),
        ('{"prompt": "1?"}\n{"question": 2}\n', [], "line 2 is no prompt"),
        ('{"messages": [{"role": "assistant", "content": "only me"}]}\n', [], "line 1 is no prompt"),
        ('{"prompt": "1?"}\n', ["--heldout", "0"], "is not a share"),
        ('{"prompt": "1?"}\n', ["--epochs", "0"], "at least 1"),
        ('{"prompt": "1?"}\n', ["--resume"], "nothing in"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(
    content: str | None, options: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    if content is not None:
        prompts.write_text(content)
    words = ["draft", "train", "embedded", str(prompts), "--out", str(tmp_path / "out"), *options, "--json"]
    assert main(words) == 2
    assert complaint in json.loads(capsys.readouterr().out)["error"]["problem"]
