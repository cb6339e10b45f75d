"""`shoal agent host`, `shoal agent join` and `shoal solve`, as users call them: processes, tickets, ends."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest
from runs import Process, Runs, processes_of, until

from shoal.cli.agent_join import claims_of
from shoal.cli.app import main
from shoal.errors import ConfigError
from shoal.protocol.codec import read_jsonl
from shoal.protocol.episode import Episode
from tiny import write_config

sys.path.append(str(Path(__file__).parents[1] / "engine"))

from engine_cases import PLAIN, make_checkpoint

pytestmark = pytest.mark.timeout(900)

ANSWER = "[0-9]{1,2}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama over bytes, which can be held to JSON."""
    return make_checkpoint(tmp_path_factory.mktemp("experts") / "model", PLAIN, max_position_embeddings=4096)


def experts(path: Path, model: Path, *names: str, **more: object) -> Path:
    tables = [
        {
            "name": name,
            "model": str(model),
            "dtype": "fp32",
            "answer": ANSWER,
            "skills": {"sums": 0.5},
            "slots": 8,
            "max_tokens": 24,
            **more,
        }
        for name in names
    ]
    return write_config(path, {"expert": tables})


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["solve", "2 + 2", "--planners", "0"], "planners"),
        (["solve", " "], "no problem"),
        (["solve", "2 + 2", "--ticket", "shoal1x", "--episodes", "e.jsonl"], "shoal agent join"),
        (["solve", "2 + 2", "--ticket", "shoal1x"], "ticket"),
        (["solve", "2 + 2", "--experts", "none.toml"], "none.toml"),
        (["agent", "join", "shoal1x"], "ticket"),
        (["agent", "host", "no/name"], "name"),
        (["agent", "host", "--uses", "0"], "uses"),
    ],
)
def test_mistakes_are_said_in_a_sentence(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str], shoal_home: Path
) -> None:
    assert main([*words, "--json"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert complaint in f"{error['problem']} {error['remedy']}"


def test_skills_as_people_write_them() -> None:
    assert claims_of(["sums", "long products=0.8"]) == {"sums": 0.5, "long products": 0.8}
    with pytest.raises(ConfigError):
        claims_of(["sums=good"])


@pytest.mark.slow
def test_a_problem_is_solved_on_this_machine_compared_and_learnt_from(runs: Runs, model: Path) -> None:
    file = experts(runs.path / "experts.toml", model, "ann", "bob")
    kept = runs.path / "episodes.jsonl"
    words = ["solve", "2 + 2", "--planners", "2", "--experts", file, "--episodes", kept, "--answer", "4", "--compare"]
    done = runs.shoal(*words, "--model", model, "--device", "cpu", "--json")
    assert done.wait() == 0, done.said
    found = done.result
    assert found["answer"].isdigit() and len(found["chains"]) == 2 and found["tokens"] > 0
    for chain in found["chains"]:
        assert chain["planner"] in ("ann", "bob") and 0 < chain["weight"] <= 1 and chain["steps"]
        assert all(step["executor"] in ("ann", "bob") and step["result"].isdigit() for step in chain["steps"])
    methods = {row["method"]: row for row in found["compare"]}
    assert set(methods) == {"collective", "direct", "self-consistency", "central"}
    assert all("right" in row for row in methods.values()) and methods["direct"]["tokens"] > 0
    assert "ann's step 1" in done.said or "bob's step 1" in done.said
    episodes = list(read_jsonl(kept, Episode))
    steps = [one for one in episodes if "requirement" in one.task.data and one.outcome == "done"]
    assert len(steps) == sum(len(chain["steps"]) for chain in found["chains"])
    assert {one.reward for one in steps} <= {0.0, 1.0}, "judged by the answer that was given"
    assert processes_of(runs.path) == []


@pytest.mark.slow
def test_experts_join_by_ticket_and_the_collective_outlives_its_issuer(runs: Runs, model: Path) -> None:
    router = runs.shoal("router", "--host", "127.0.0.1", "--port", "0", "--json", "--identity", runs.path / "router")
    line = until(lambda: router.out.read_text().strip(), router) and router.result["line"]
    host = runs.shoal("agent", "host", "pond", "--json", "--routers", line)
    until(lambda: host.out.read_text().strip(), host)
    ticket = runs.path / "ticket.txt"
    ticket.write_text(host.result["ticket"])

    def join(name: str, *more: str | Path) -> Process:
        file = experts(runs.path / f"{name}.toml", model, name)
        made = runs.shoal("agent", "join", ticket, "--experts", file, "--device", "cpu", "--json", *more)
        until(lambda: f"{name} joined pond" in made.said, made)
        return made

    kept = runs.path / "kept.jsonl"
    ann, bob = join("ann", "--episodes", kept), join("bob")
    seen = runs.shoal("status", ticket, "--json")
    assert seen.wait() == 0, seen.said
    assert {node["name"] for node in seen.result["nodes"]} == {"ann", "bob"}

    def solve() -> Process:
        made = runs.shoal("solve", "2 + 2", "--ticket", ticket, "--planners", "2", "--json")
        assert made.wait() == 0, made.said
        return made

    first = solve().result
    assert first["answer"].isdigit() and {chain["planner"] for chain in first["chains"]} == {"ann", "bob"}
    bob.send(signal.SIGKILL)
    bob.wait()
    until(lambda: solve().result["chains"][0]["planner"] == "ann", host)
    host.send(signal.SIGTERM)
    assert host.wait() == 0 and "nobody is let in" in host.said
    late = runs.shoal("agent", "join", ticket, "--name", "late", "--model", model)
    assert late.wait() == 2 and "does not answer" in late.said
    ann.send(signal.SIGTERM)
    assert ann.wait() == 0, ann.said
    (gone,) = ann.result["experts"]
    assert gone["name"] == "ann" and gone["steps"] > 0 and "left pond after" in ann.said
    episodes = list(read_jsonl(kept, Episode))
    assert episodes and {one.reward for one in episodes if one.outcome == "done"} <= {0.0, 1.0}
    assert "Traceback" not in ann.said + host.said + late.said


@pytest.mark.slow
def test_what_a_collective_did_is_trained_on(runs: Runs, model: Path) -> None:
    file = experts(runs.path / "experts.toml", model, "ann")
    kept = runs.path / "episodes.jsonl"
    for number in range(2):
        words = ["solve", f"{number} + {number}", "--planners", "2", "--experts", file, "--episodes", kept]
        done = runs.shoal(*words, "--device", "cpu", "--json")
        assert done.wait() == 0, done.said
    tuned = runs.shoal(
        "sft", model, kept, "--out", runs.path / "tuned", "--dtype", "fp32", "--device", "cpu",
        "--lora-rank", "4", "--max-tokens", "4096", "--heldout", "0", "--json",
    )  # fmt: skip
    assert tuned.wait() == 0, tuned.said
    assert tuned.result["steps"] > 0
    learnt = experts(runs.path / "learnt.toml", model, "ann", lora="tuned")
    again = runs.shoal("solve", "2 + 2", "--planners", "1", "--experts", learnt, "--device", "cpu", "--json")
    assert again.wait() == 0 and again.result["answer"].isdigit(), again.said

    environment = {"type": "shoal.agents.collective.environment:Steps", "settings": {"path": str(kept)}}
    changes = {
        "envs": {"steps": {**environment, "settings": {"path": str(kept), "heldout_fraction": 0.0}}},
        "model__name": str(model),
        "model__context_tokens": 1024,
        "learner__mode": "colocated",
        "eval": {"before": False, "after": False},
        "run__steps": 2,
    }
    train = runs.train(**changes)
    assert train.wait() == 0, train.said
    assert len(runs.run.steps) == 2
    trained = [one for batch in runs.run.episodes().values() for one in batch]
    assert trained and all(one.task.env == "steps" and one.turns[0].grammar is not None for one in trained)
