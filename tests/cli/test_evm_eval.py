"""`shoal eval evm`: real models, in this process and behind `shoal serve`; folders that are continued."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from runs import Runs, until

# The checkpoints and servers are those of other rooms' tests.
sys.path.append(str(Path(__file__).parents[1] / "engine"))
sys.path.append(str(Path(__file__).parents[1] / "serving"))

from engine_cases import make_checkpoint
from serving_cases import ChatServer, start

from shoal.cli.app import main
from shoal.cli.evaluation import EPISODES, REPORT, SETTINGS, SUMMARY
from shoal.envs.evm.anvil import AnvilChain, find_anvil
from shoal.envs.evm.evaluation import Played
from shoal.protocol.codec import read_jsonl

TYPED = ("--actions", "typed", "--brief", "--constrain", "form", "--max-tokens", "100", "--temperature", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama over bytes, which writes nonsense."""
    return make_checkpoint(tmp_path_factory.mktemp("evm") / "model", max_position_embeddings=2048)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatServer]:
    with start(model, tmp_path_factory.mktemp("evm-server")) as running:
        yield running


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 0) -> dict[str, Any]:
    assert main(["eval", "evm", *map(str, arguments), "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def episodes(path: Path) -> list[Played]:
    found = list(read_jsonl(path / EPISODES, Played))
    assert len({one.key for one in found}) == len(found), "nothing is played twice"
    return found


def test_a_served_model_is_measured_and_the_folder_continued(
    server: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "evaluation"
    asked = ("--model", server.url, *TYPED, "--groups", "native", "approve", "--limit", "8", "--out", out)
    found = evaluate(capsys, *asked, "--rounds", "2")
    assert found["model"] == "tiny" and found["episodes"] == 16 and found["missing"] == 0
    assert found["maximum"] == 800 and set(found["groups"]) == {"native", "approve"}
    assert found["total_strict"] == found["splits"]["total"]["strict"]
    first = episodes(out)
    assert {one.round for one in first} == {0, 1}
    assert all(turn.tokens > 0 and turn.prompt_tokens > 0 for one in first for turn in one.turns)
    whole = [act for one in first for turn in one.turns if turn.finish == "stop" for act in turn.acts]
    assert whole and all(act.understood for act in whole), "the grammar went along"
    assert all(one.instruction[:20] in (out / REPORT).read_text() for one in first)
    assert json.loads((out / SUMMARY).read_text())["episodes"] == 16

    before = (out / EPISODES).read_bytes()
    drawn = server.metric("shoal_tokens_drawn_total")
    again = evaluate(capsys, *asked, "--rounds", "2")
    assert again["total_strict"] == found["total_strict"] and (out / EPISODES).read_bytes() == before
    assert server.metric("shoal_tokens_drawn_total") == drawn, "nothing was asked"

    lines = before.splitlines(keepends=True)
    (out / EPISODES).write_bytes(b"".join(lines[:10]) + lines[10][:30])
    assert evaluate(capsys, "--resume", out, "--rounds", "3")["episodes"] == 24
    continued = episodes(out)
    assert len(continued) == 24 and continued[:10] == first[:10]

    refused = evaluate(capsys, *asked, "--rounds", "3", "--seed", "9", code=2)
    assert "seed = 0, not 9" in refused["error"]["problem"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--groups", "nativ"], "no group 'nativ'"),
        (["--tasks", "fly"], "no task 'fly'"),
        (["--groups", "native", "--tasks", "erc20_permit"], "nothing is left"),
        (["--brief"], "--actions typed"),
        (["--actions", "typed", "--constrain", "form", "--mode", "naive"], "--mode naive"),
        (["--model", "shoal1abc"], "shoal serve"),
        (["--endpoint", "http://127.0.0.1:9/v1"], "--model"),
        (["--model", "x", "--endpoint", "http://127.0.0.1:9/v1", "--api-key-env", "NOT_SET"], "NOT_SET is not set"),
        (["--resume", "nowhere"], "no evaluation in nowhere"),
        (["--concurrency", "0"], "--concurrency 0"),
        (["--limit", "0"], "--limit 0"),
        (["--rounds=-1"], "--rounds -1"),
        (["--file", "missing.toml"], "missing.toml"),
    ],
)
def test_mistakes_are_explained(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    error = evaluate(capsys, *arguments, *(["--actions", "typed"] if "NOT_SET" in arguments else []), code=2)["error"]
    assert words in f"{error['problem']} {error['remedy']}"
    assert not list(tmp_path.glob("runs/*")), "nothing is left behind"


def test_where_scripts_cannot_run_typed_actions_are_named(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    arguments = ("--model", model, "--limit", "1", "--context-tokens", "2048", "--out", tmp_path / "out")
    error = evaluate(capsys, *arguments, code=2)["error"]
    assert "typescript scripts cannot be run here" in error["problem"] and "--actions typed" in error["remedy"]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(runs: Runs, model: Path) -> None:
    out = runs.path / "evaluation"
    arguments = ("eval", "evm", "--model", model, *TYPED, "--context-tokens", "2048", "--concurrency", "2")
    process = runs.shoal(*arguments, "--limit", "40", "--out", out, "--json")
    until(lambda: (out / EPISODES).exists() and (out / EPISODES).read_bytes().count(b"\n") >= 3, process)
    process.send(signal.SIGINT)
    assert process.wait() == 130
    assert f"shoal eval evm --resume {out}" in process.said and "Traceback" not in process.said
    kept = episodes(out)
    assert 3 <= len(kept) < 40 and (out / SETTINGS).exists()
    process = runs.shoal("eval", "evm", "--resume", out, "--json")
    assert process.wait() == 0, process.said
    assert process.result["episodes"] == 40 and episodes(out)[: len(kept)] == kept


@pytest.mark.slow
def test_two_do_not_fill_one_folder(runs: Runs, model: Path) -> None:
    out = runs.path / "evaluation"
    arguments = ("eval", "evm", "--model", model, *TYPED, "--context-tokens", "2048", "--limit", "40", "--out", out)
    first = runs.shoal(*arguments, "--concurrency", "1", "--json")
    until(lambda: (out / EPISODES).exists(), first)
    second = runs.shoal(*arguments, "--json")
    assert second.wait() == 2 and "another process" in second.result["error"]["problem"]


def test_a_fork_needs_its_block(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "evm", "--model", str(model), *TYPED, "--fork-url", "http://127.0.0.1:1"]) == 2
    assert "--fork-url and --fork-block go together" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(find_anvil() is None, reason="Anvil is not installed (SHOAL_ANVIL, PATH or node_modules)")
def test_a_model_acts_on_a_fork(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(AnvilChain()) as live:
        where = ("--fork-url", live.url, "--fork-block", str(live.block_number()))
        chosen = ("--model", str(model), *TYPED, "--context-tokens", "2048", "--tasks", "bnb_transfer_basic")
        done = evaluate(capsys, *chosen, *where, "--out", tmp_path / "fork")
    assert done["episodes"] == 1
    assert json.loads((tmp_path / "fork" / SETTINGS).read_text())["fork_url"] == live.url


@pytest.mark.slow
def test_the_embedded_model_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--actions", "typed", "--groups", "native", "--limit", "3", "--max-tokens", "96", "--brief")
    free = evaluate(capsys, *arguments, "--out", tmp_path / "free")
    bound = evaluate(capsys, *arguments, "--constrain", "form", "--out", tmp_path / "bound")
    assert free["episodes"] == bound["episodes"] == 3
    assert bound["understood"] == 1.0, "every reply of the embedded model ends within this, and parses"
    assert bound["total_strict"] >= free["total_strict"]
