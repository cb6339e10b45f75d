"""Do agents that know nothing of Shoal get better? One of OpenAI's SDK, one of LangGraph, each trained as it is.

    shoal bench capture --json
    shoal bench capture -- --only openai --steps 10
    shoal bench capture -- --model tiny                 two minutes, to see that everything works
    shoal bench capture -- --folder results             goes on where it was stopped: an agent's row is kept there

Each agent is a script (`_agent_openai.py`, one call; `_agent_langgraph.py`, two) run out of process by the Python of an
environment of its own; `env = "external"` is all that binds it to the run. Both learn the demo's sums from the demo's
settings but for shorter steps (`configs/arithmetic.toml`; 8 groups of 8, 20 steps); the model is the embedded one. Held
out are pairs of operands in both orders, asked before and after through the same agent, greedily.

    NAME_before, NAME_after                 held-out success, strict
    NAME_gain, NAME_gain_low, NAME_gain_high   difference, with its 95 % interval (paired, Newcombe)
    NAME_calls                              completions an episode
    NAME_ratio_max                          largest ratio of a trained token on the step that sampled it (version 0)
    orphans                                 processes of a run that are left when it has ended

Some 10 minutes an agent on a quiet two-core machine; a run that is not done after `--limit-s` is ended and fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from _nat import tiny_model
from shoal.config import find_config
from shoal.errors import RunError

from _common import benchmark, emit, peer_env

HERE = Path(__file__).parent
AGENTS: dict[str, tuple[str, Sequence[str], Sequence[str]]] = {
    "openai": ("_agent_openai.py", ("openai==3.54.0",), ("openai",)),
    "langgraph": (
        "_agent_langgraph.py",
        ("langgraph==1.2.22", "langchain-core==1.7.2", "langchain-openai==1.7.3"),
        ("langchain_openai", "langgraph.graph"),
    ),
}
"""Script, what its environment holds, and what is imported once for all its episodes."""

END_S = 30.0


def say(text: str) -> None:
    print(f"capture: {text}", file=sys.stderr, flush=True)


def tables(agent: str, python: Path, model: str, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """The run's configuration: the demo's, its environment acted in by the agent."""
    import tomllib

    script, _, preload = AGENTS[agent]
    found = tomllib.loads(find_config("arithmetic").read_text())
    inner = found["envs"].pop("arithmetic")
    tiny = model != "embedded"
    settings: dict[str, Any] = {
        "command": [str(python), str(HERE / script)],
        "preload": list(preload),
        "tasks": "tiny:FirstDigit" if tiny else "arithmetic",
        "task_settings": {} if tiny else inner["settings"],
        "parallel": 8,
        "deadline_s": 300.0,
    }
    found["envs"]["sums"] = {"type": "external", "settings": settings}
    found["run"] |= {"name": agent, "dir": str(folder / "runs"), "steps": given.steps, "seed": given.seed}
    found["rollout"] |= {"groups_per_step": 8, "lease_timeout_s": 120.0}
    found["learner"] |= {"warmup_steps": 3, "checkpoint_every": 0}
    found["eval"]["questions"] = given.questions
    found["output"] = {"plots": False}
    if tiny:
        found["model"] = {"name": model, "dtype": "fp32", "context_tokens": 64}
        found["rollout"] |= {"groups_per_step": 4, "max_tokens": 2, "temperature": 1.0}
        found["learner"] |= {"lr": 0.03, "device": "cpu"}
        found["learner"]["loss"] = {"type": "grpo"}
        found["workers"] = {"count": 2, "max_sequences": 32, "cache_tokens": 2048, "device": "cpu"}
        found["eval"] |= {"max_tokens": 2, "questions": min(64, given.questions)}
    return found


def trained(agent: str, model: str, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Train one agent; gives its row.

    Raises:
        RunError: the run failed, or was not done in time.
    """
    _, requirements, _ = AGENTS[agent]
    python = peer_env("openai" if agent == "openai" else "langgraph-openai", requirements)
    config = folder / f"{agent}.toml"
    config.write_text(tomli_w.dumps(tables(agent, python, model, folder, given)))
    search = os.pathsep.join(filter(None, [str(HERE.parent / "tests"), os.environ.get("PYTHONPATH", "")]))
    log = folder / f"{agent}.log"
    say(f"{agent}: {given.steps} steps; {log}")
    with log.open("wb") as words:
        process = subprocess.Popen(
            [sys.executable, "-m", "shoal.cli", "train", str(config), "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=words,
            env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    run = folder / "runs" / agent
    try:
        _follow(process, run, time.monotonic() + given.limit_s)
        out, _ = process.communicate(timeout=END_S)
    finally:
        _end(process)
    if process.returncode != 0:
        raise RunError(f"The run of {agent} ended with {process.returncode}.", f"It said: {log.read_text()[-1500:]}")
    row = _row(agent, json.loads(out), run, given)
    if (place := _place(agent, given)) is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(row))
    say(f"{agent}: {row['before']:.3f} to {row['after']:.3f}")
    return row


def _follow(process: subprocess.Popen[bytes], run: Path, until: float) -> None:
    """Tell of each step while the run goes on."""
    told = 0
    while process.poll() is None:
        if time.monotonic() > until:
            raise RunError("The run was not done in time.", "Give it more by --limit-s.")
        steps = _steps(run)
        for line in steps[told:]:
            say(f"step {line['step']}: reward {line['reward']:.3f}, ratio {line['ratio_max']:.2f}")
        told = len(steps)
        time.sleep(1.0)


def _steps(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith(b"\n")]
    return [line for line in found if line["kind"] == "step"]


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _row(agent: str, summary: dict[str, Any], run: Path, given: argparse.Namespace) -> dict[str, Any]:
    episodes = [json.loads(line) for path in (run / "episodes").glob("*.jsonl") for line in path.open()]
    low, high = summary["gain_interval"]
    fresh = [line for line in _steps(run) if line["step"] == 1]
    return {
        "agent": agent,
        "steps": summary["steps"],
        "seconds": summary["seconds"],
        "questions": summary["heldout_questions"],
        "before": summary["accuracy_before"],
        "after": summary["accuracy_after"],
        "gain": summary["accuracy_after"] - summary["accuracy_before"],
        "gain_low": low,
        "gain_high": high,
        "episodes": len(episodes),
        "calls": sum(len(episode["turns"]) for episode in episodes) / len(episodes),
        "void": summary["rollouts"].get("void", 0),
        "ratio_max": fresh[0]["ratio_max"],
        "seed": given.seed,
        "orphans": _left(run.parent.parent),
    }


def _left(folder: Path) -> int:
    """Live processes whose command line or environment names the benchmark's folder."""
    found = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            found += str(folder).encode() in command and state != "Z"
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=list(AGENTS), default=list(AGENTS))
    parser.add_argument("--model", choices=["embedded", "tiny"], default="embedded")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-s", type=float, default=1500.0, help="for each agent")
    parser.add_argument("--folder", type=Path, default=None, help="where rows of finished agents are kept")
    parser.add_argument("--keep", action="store_true", help="keep the runs' folder")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="shoal-capture-"))
    try:
        model = str(tiny_model(folder / "model")) if given.model == "tiny" else "embedded"
        rows = [_kept(agent, given) or trained(agent, model, folder, given) for agent in given.only]
    finally:
        if not given.keep:
            shutil.rmtree(folder, ignore_errors=True)
    headline: dict[str, float] = {"orphans": sum(row["orphans"] for row in rows)}
    for row in rows:
        keys = ("before", "after", "gain", "gain_low", "gain_high", "calls", "ratio_max", "void")
        headline |= {f"{row['agent']}_{key}": row[key] for key in keys}
    emit(rows, headline)


def _place(agent: str, given: argparse.Namespace) -> Path | None:
    name = f"{agent}-{given.model}-{given.steps}-{given.questions}-{given.seed}.json"
    return given.folder / name if given.folder is not None else None


def _kept(agent: str, given: argparse.Namespace) -> dict[str, Any] | None:
    place = _place(agent, given)
    return json.loads(place.read_text()) if place is not None and place.exists() else None


if __name__ == "__main__":
    benchmark(main)
