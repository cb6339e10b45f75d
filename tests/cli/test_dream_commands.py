"""`shoal dream` from collected episodes to a measured world model, and `shoal train` in its dreams."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from runs import Runs, processes_of, until

from dream_cases import WEB, episode, make_reader, write_episodes
from shoal.cli.app import main
from shoal.envs.web.browser import BrowserError, require_browser
from shoal.errors import ConfigError
from shoal.protocol.episode import Episode

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reader(tmp_path_factory.mktemp("reader") / "model")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Episodes to learn from, and such as are held out."""
    root = tmp_path_factory.mktemp("dreams")
    train = write_episodes(root / "experts", [episode(seed) for seed in range(5)])
    return train, write_episodes(root / "heldout", [episode(50, split="heldout"), episode(51, reward=0.0)])


def shoal(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


@pytest.mark.timeout(300)
def test_a_world_model_is_fitted_measured_and_shown(
    folders: tuple[Path, Path], reader: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, heldout = folders
    out = tmp_path / "world"
    fit = ["dream", "fit", train, "--out", out, "--model", reader, "--max-tokens", 4000, "--device", "cpu"]
    fit += ["--dtype", "fp32", "--lr", "3e-3", "--batch-size", 4, "--microbatch-tokens", 4000, "--checkpoint-every", 1]
    found = shoal(capsys, *fit, "--examples", 12, "--judging", 0.25, "--heldout", 0.1)
    assert (found["episodes"], found["transitions_there"], found["examples"], found["steps"]) == (5, 16, 12, 3)
    assert found["examples_too_long"] == 0 and found["question_tokens_max"] > found["answer_tokens_mean"] > 50
    examples = [json.loads(line) for line in (out / "examples.jsonl").read_text().splitlines()]
    assert sum(one["completion"] in ("yes", "no") for one in examples) == 3
    assert json.loads((out / "world.json").read_text())["sight"]["page_tokens"] == 288
    model = (out / "model" / "model.safetensors").read_bytes()
    # The same once more changes nothing; with other settings it does not go on.
    again = [*fit, "--examples", 12, "--judging", 0.25, "--heldout", 0.1, "--resume"]
    assert shoal(capsys, *again)["steps"] == 3
    assert (out / "model" / "model.safetensors").read_bytes() == model
    assert main([*map(str, fit), "--examples", "11", "--resume"]) == 2
    assert "another examples" in capsys.readouterr().err

    asked = ["--limit", 2, "--dreams", 2, "--judged", 2, "--depth", 2, "--device", "cpu", "--max-tokens", 60]
    measured = shoal(capsys, "dream", "eval", out, heldout, *asked)
    place = measured["held_out"]["template"]
    assert place["world"]["transitions"] == place["untuned"]["transitions"] == place["copy"]["transitions"] == 2
    assert place["copy"]["exact"] == 0 == place["copy"]["edit_f1"] and place["available"] == 4
    assert 0 <= place["world"]["edit_f1"] <= 1 and set(place["world"]["by_action"]) == {"click"}
    assert measured["held_out"]["site"]["available"] == 0
    assert [row["depth"] for row in measured["depth"]] == [1.0, 2.0] and measured["depth"][0]["dreams"] == 2.0
    assert measured["judging"]["episodes"] == 2.0
    assert measured["bound"]["template"]["transitions"] == 4 and 0 < measured["bound"]["template"]["edit_f1"] <= 1

    (tmp_path / "eval.json").write_text(json.dumps(measured))
    trained = {
        "before": 0.1,
        "after": 0.3,
        "gain_points": 20.0,
        "interval_points": [1.0, 39.0],
        "episodes": 9,
        "runs": 1,
    }
    rows = {"part": "report", "dreams": trained, "length-3": trained, "share-50": trained}
    (tmp_path / "rows.json").write_text(json.dumps({"rows": [rows]}))
    html = tmp_path / "dreams.html"
    files = ["--measured", tmp_path / "eval.json", "--measured", tmp_path / "rows.json"]
    shown = shoal(capsys, "dream", "show", "copy", heldout, "--out", html, "--depth", 2, *files)
    assert shown["dreams"] == 2
    text = html.read_text()
    for heading in ("The next page", "Deeper in a dream", "Trained", "Length of dreams", "Share of experts"):
        assert f"<h2>{heading}</h2>" in text


def test_mistakes(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["fit", "--out", tmp_path / "w"], "nothing to learn from"),
        (["fit", folders[0], "--out", tmp_path / "w", "--judging", "1"], "share below 1"),
        (["fit", folders[0], "--out", tmp_path / "v", "--page-tokens", "3"], "page_tokens"),
        (["fit", tmp_path, "--out", tmp_path / "u"], "no episodes"),
        (["eval", "copy"], "nothing to foresee"),
        (["show", "copy", folders[1], "--measured", folders[1] / "episodes.jsonl"], "no result of"),
    ):
        assert main(["dream", *map(str, arguments)]) == ConfigError("").exit_code, arguments
        assert words in capsys.readouterr().err


def test_what_can_be_known(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = shoal(capsys, "dream", "bound", folders[0], "--heldout", folders[1])
    assert found["template"]["transitions"] == 4 and found["template"]["change_rate"] == 1.0
    assert found["site"]["transitions"] == 0 and found["site"]["unknown"] == []
    row = found["template"]
    assert row["determined"] < 1 and 0 < sum(one["unknown"] for one in row["unknown"]) <= 4
    main(["dream", "bound", str(folders[0]), "--heldout", str(folders[1])])
    said = capsys.readouterr().out
    assert "held-out template: 4 transitions" in said and "shop/price_of, click link '" in said


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_world_model_is_served_as_any_model_is(
    runs: Runs, reader: Path, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    server = runs.shoal("serve", reader, "--port", "0", "--dtype", "fp32", "--device", "cpu", "--json")
    until(lambda: server.out.read_text().endswith("\n"), server)
    asked = ["--limit", 2, "--dreams", 1, "--judged", 2, "--depth", 2, "--max-tokens", 40]
    found = shoal(capsys, "dream", "eval", server.result["url"], folders[1], *asked)
    near = shoal(capsys, "dream", "eval", reader, folders[1], *asked, "--no-untuned", "--device", "cpu")
    assert found["held_out"]["template"]["world"]["transitions"] == 2
    assert set(found["held_out"]["template"]["world"]) == set(near["held_out"]["template"]["world"])
    server.send(signal.SIGTERM)
    server.wait()
    assert main(["dream", "eval", server.result["url"], str(folders[1])]) != 0
    assert "does not answer" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_training_in_dreams(runs: Runs, reader: Path, folders: tuple[Path, Path]) -> None:
    """All processes of a run, in a world that needs no browser: the pages stay as they are, or an expert goes on."""
    env = {
        "type": "dream",
        "settings": {
            "data": [str(folders[0])],
            "world": "copy",
            "max_dream_steps": 3,
            "web": {**WEB, "worlds": list(WEB["worlds"])},  # type: ignore[call-overload]
        },
    }
    process = runs.train(
        envs={"dream": env},
        model__name=str(reader),
        model__context_tokens=8000,
        run__steps=2,
        rollout__max_tokens=24,
        rollout__groups_per_step=2,
        rollout__lease_timeout_s=60.0,
        learner__loss={"type": "gspo", "eps_low": 0.2, "eps_high": 0.2},
        learner__microbatch_tokens=4000,
        workers__count=1,
        workers__cache_tokens=65536,
        workers__prefix_tokens=16384,
        eval__before=False,
        eval__after=False,
    )
    assert process.wait() == 0, process.said
    runs.run.check(steps=2, groups=2)
    found: list[Episode] = [one for batch in runs.run.episodes().values() for one in batch]
    given = [one for one in found if one.turns[0].given]
    assert 0 < len(given) < len(found)
    assert all(one.reward == 1.0 for one in given)
    assert {step["nonfinite"] for step in runs.run.steps} == {0.0}
    assert processes_of(runs.path) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_training_and_evaluating_on_real_pages(runs: Runs, reader: Path, folders: tuple[Path, Path]) -> None:
    """The real browser in the worker and in the coordinator, which plays again; dreams are evaluated on real pages."""
    try:
        require_browser()
    except BrowserError as error:
        pytest.skip(f"needs a browser: {error}")
    web = {**WEB, "worlds": ["shop"], "levels": [1], "max_steps": 2}
    dream = {"data": [str(folders[0])], "world": "copy", "max_dream_steps": 3, "web": web}
    process = runs.train(
        envs={"web": {"type": "web", "settings": web}, "dream": {"type": "dream", "settings": dream}},
        model__name=str(reader),
        model__context_tokens=8000,
        run__steps=2,
        rollout__max_tokens=24,
        rollout__groups_per_step=2,
        rollout__lease_timeout_s=120.0,
        learner__microbatch_tokens=4000,
        workers__count=1,
        workers__cache_tokens=65536,
        workers__prefix_tokens=16384,
        eval__questions=4,
        eval__max_tokens=24,
    )
    assert process.wait() == 0, process.said
    runs.run.check(steps=2, groups=2)
    assert runs.run.summary["heldout_questions"] == 4 and 0 <= runs.run.summary["accuracy_after"] <= 1
    assert {one.task.env for batch in runs.run.episodes().values() for one in batch} <= {"web", "dream"}
    assert processes_of(runs.path) == []
