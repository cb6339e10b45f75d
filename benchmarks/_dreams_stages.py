"""The long stages of `shoal bench dreams`: each is one `shoal` command, in one folder, that is not done twice.

    collect ─▶ fit ─▶ eval                                     one world model for all
    sft, again, again ─▶ the best by validation ─▶ train in dreams, by seed ─▶ real held-out episodes before and after

Invariants: a stage whose result is there is not run again; one that was ended goes on where its command can; a command
that outlasts its deadline is told to end, then ended, with all that it started.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.coordinator.reporting.paired import paired_interval
from shoal.envs.dream.dataset import EPISODES, read_episodes
from shoal.envs.web.environment import WebSettings
from shoal.errors import RunError

GRACE_S = 90.0
"""What a command that was told to end may still take."""
WEB = "dynaweb_web"
DREAM = "dynaweb"
ROW = re.compile(r"dreams|dreams_only|experts_only|real|untuned|copy|length-[1-8]|share-(?:100|[0-9]{1,2})")
"""What is trained: in dreams with experts, in dreams alone, by experts alone, on real pages; in dreams of the model
before it was fitted, or of pages that never change; in dreams of so many acts; with so many per cent experts."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    experts: int = 300
    wandering: int = 700
    heldout: int = 180
    examples: int = 3400
    transitions: int = 200
    dreams: int = 40
    sft_stages: int = 3
    validation: int = 60
    steps: int = 20
    questions: int = 200
    max_tokens: int = 32
    """Of an act; another model's tokenizer may make more of an expert's than the embedded one's does (20)."""
    context_tokens: int = 4096
    model: str = "embedded"


QUICK = Sizes(
    experts=12,
    wandering=12,
    heldout=18,
    examples=48,
    transitions=4,
    dreams=2,
    sft_stages=1,
    validation=4,
    steps=1,
    questions=8,
    max_tokens=96,
    context_tokens=8000,
)
"""Shows that all of it runs; measures nothing."""


class Stages:
    """One folder, and a time by which everything in this call has to be over."""

    def __init__(self, folder: Path, sizes: Sizes, minutes: float, threads: int) -> None:
        self.folder = folder
        self.sizes = sizes
        self._threads = str(threads)
        self._end = time.monotonic() + 60 * minutes
        folder.mkdir(parents=True, exist_ok=True)

    def shoal(self, *arguments: str | Path) -> dict[str, Any]:
        """What a command says in JSON.

        Raises:
            RunError: it failed, or the time is over.
        """
        left = self._end - time.monotonic()
        words = [str(one) for one in arguments]
        said = f"shoal {' '.join(words)}"
        if left <= 0:
            raise RunError("the time of this call is over.", "Repeat the command: it goes on where it stopped.")
        print(said, file=sys.stderr, flush=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "shoal.cli", *words, "--json"], stdout=subprocess.PIPE, start_new_session=True
        )
        try:
            output, _ = process.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            self._stop(process)
            raise RunError(
                f"the time of this call was over in: {said}", "Repeat the command: it goes on where it stopped."
            ) from None
        except BaseException:
            self._stop(process)
            raise
        if process.returncode:
            raise RunError(f"{said} ended with code {process.returncode}.", "What it said is above.")
        return dict(json.loads(output))

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def kept(self, name: str, *arguments: str | Path) -> dict[str, Any]:
        """As `shoal`, once: its result is kept under this name."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            found = self.shoal(*arguments)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found))
        return dict(json.loads(path.read_text()))

    def has(self, part: str) -> bool:
        """Whether a part's result is there, so that saying it costs nothing."""
        if part == "report":
            return any((self.folder / "runs").glob("*/summary.json"))
        return (self.folder / f"{part}-eval.json").exists()

    # The world model

    def collect(self, name: str, policy: str, split: str, episodes: int) -> Path:
        """Real episodes, as many as this."""
        out = self.folder / name
        options = ["--policy", policy, "--split", split, "--episodes", str(episodes), "--config", WEB]
        self.kept(f"{name}-{episodes}", "dream", "collect", "--out", out, *options)
        return out

    @property
    def experts(self) -> Path:
        return self.collect("experts", "reference", "train", self.sizes.experts)

    @property
    def wandering(self) -> Path:
        return self.collect("wandering", "random", "train", self.sizes.wandering)

    @property
    def heldout(self) -> tuple[Path, Path]:
        """Held-out templates and the held-out site, by both policies."""
        half = self.sizes.heldout // 2
        return (
            self.collect("heldout_experts", "reference", "heldout", half),
            self.collect("heldout_wandering", "random", "heldout", half),
        )

    def world(self) -> Path:
        """The fitted world model."""
        out, sizes = self.folder / "world", self.sizes
        data = [self.experts, self.wandering]
        resume = ["--resume"] if out.exists() else []
        options = ["--model", sizes.model, "--examples", str(sizes.examples), "--threads", self._threads, *resume]
        self.kept("world-fit", "dream", "fit", *data, "--out", out, *options)
        return out

    def world_eval(self) -> dict[str, Any]:
        """How well it foresees."""
        sizes, world = self.sizes, self.world()
        options = ["--limit", str(sizes.transitions), "--dreams", str(sizes.dreams), "--threads", self._threads]
        return self.kept("world-eval", "dream", "eval", world, *self.heldout, *options)

    def real_steps(self, *folders: Path) -> int:
        """Acts that were done in a real browser to collect these."""
        assert all((folder / EPISODES).exists() for folder in folders)
        return sum(len(episode.moments) for episode in read_episodes(folders))

    # Policies

    def imitated(self) -> tuple[Path, list[float]]:
        """The policy that imitation alone makes, for all seeds: the best stage by validation; and how each did."""
        data = self.experts / "conversations.jsonl"
        before, models, marks = self.sizes.model, [], []
        for stage in range(1, self.sizes.sft_stages + 1):
            before = str(self._stage(stage, before, data))
            models.append(Path(before))
            asked = ["--config", self._validation(), *self._asked(self.sizes.validation)]
            found = self.kept(f"validation-{stage}", "eval", before, *asked)
            marks.append(float(found["accuracy"]))
        return models[marks.index(max(marks))], marks

    def _stage(self, stage: int, model: str, data: Path) -> Path:
        """One more time through the experts' episodes."""
        out = self.folder / f"sft-{stage}"
        resume = ["--resume"] if out.exists() else []
        options = ["--lr", "2e-5", "--batch-size", "8", "--max-tokens", "4096", "--seed", str(stage)]
        options += ["--warmup-steps", "5", "--checkpoint-every", "10", "--threads", self._threads, *resume]
        self.kept(f"sft-{stage}-result", "sft", model, data, "--out", out, *options)
        return out / "model"

    def _asked(self, questions: int) -> list[str]:
        """How much `shoal eval` asks."""
        return ["--questions", str(questions), "--max-tokens", str(self.sizes.max_tokens), "--threads", self._threads]

    def _validation(self) -> Path:
        """A configuration that asks other instances of the templates that are trained on."""
        train, _ = WebSettings(heldout="both").split()
        return self._config("validation", f'heldout = "instance", tasks = {json.dumps(train)}')

    def _config(self, name: str, settings: str) -> Path:
        """Real pages, shown as they are to every policy here."""
        path = self.folder / f"{name}.toml"
        path.write_text(
            f"[model]\ncontext_tokens = {self.sizes.context_tokens}\n[workers]\ncache_tokens = 24576\n[envs.web]\n"
            f'type = "web"\nsettings = {{ content = 0, max_steps = 8, constrain = "seen", {settings} }}\n'
        )
        return path

    def trained(self, seed: int, row: str) -> Path:
        """A run's folder, its evaluations on real held-out pages before and after; the best of imitation before."""
        runs, name = self.folder / "runs", f"{row}-{seed}"
        done = runs / name / "summary.json"
        if done.exists():
            return done.parent
        model, _ = self.imitated()
        sizes = self.sizes
        common = ["--model.name", str(model), "--run.name", name, "--run.dir", str(runs), "--run.seed", str(seed)]
        common += ["--eval.questions", str(sizes.questions), "--output.plots", "false"]
        common += ["--model.context_tokens", str(sizes.context_tokens)]
        common += ["--rollout.max_tokens", str(sizes.max_tokens), "--eval.max_tokens", str(sizes.max_tokens)]
        if (runs / name / "config.toml").exists():
            self.shoal("train", "--resume", runs / name)
            return done.parent
        if row == "real":
            steps = self._equal_steps()
            own = [WEB, "--envs.web.settings.heldout", "template", "--envs.web.settings.max_steps", "8"]
            own += ["--run.steps", str(steps)]
        else:
            data = json.dumps([str(self.experts)])
            changed = {"world": str(self.world()), "data": data, **self._variant(row)}
            own = [DREAM, "--run.steps", str(sizes.steps)]
            own += [word for key, value in changed.items() for word in (f"--envs.dream.settings.{key}", value)]
        self.shoal("train", *own, *common)
        return done.parent

    def _variant(self, row: str) -> dict[str, str]:
        """Settings in which a row differs from `dreams`."""
        kind, _, number = row.partition("-")
        return {
            "dreams_only": {"expert_share": "0.0"},
            "untuned": {"world": self.sizes.model},
            "copy": {"world": "copy"},
            "length": {"max_dream_steps": number},
            "share": {"expert_share": str(int(number or 0) / 100)},
        }.get(kind, {})

    def _equal_steps(self) -> int:
        """Optimizer steps of real reinforcement learning that cost as many real acts as was collected for dreams."""
        acts = self.real_steps(self.experts, self.wandering)
        mean = self.real_steps(self.experts) / max(1, len(read_episodes([self.experts])))
        return max(1, min(self.sizes.steps, round(acts / (3 * 8 * mean))))

    def experts_only(self) -> dict[str, Any]:
        """Imitation gone on with for one stage more than the best, asked the same questions as the others are."""
        best, _ = self.imitated()
        stage = int(best.parent.name.rpartition("-")[2])
        after = self._stage(stage + 1, str(best), self.experts / "conversations.jsonl")
        config = self._config("heldout", 'heldout = "template"')
        return self.kept("experts_only", "eval", after, "--config", config, *self._asked(self.sizes.questions))


def answers(run: Path, step: int) -> list[bool]:
    """Whether each held-out question was answered, in their order."""
    path = run / "evals" / f"{step:06d}.json"
    return [float(one["strict"]) >= 1 for one in json.loads(path.read_text())["answers"]]


def gain(runs: list[Path]) -> dict[str, Any]:
    """Before and after over all runs' held-out episodes, paired."""
    before, after = [], []
    for run in runs:
        steps = int(json.loads((run / "summary.json").read_text())["steps"])
        before += answers(run, 0)
        after += answers(run, steps)
    low, high = paired_interval(before, after)
    return {
        "runs": len(runs),
        "episodes": len(before),
        "before": sum(before) / len(before),
        "after": sum(after) / len(after),
        "gain_points": 100 * (sum(after) - sum(before)) / len(before),
        "interval_points": [100 * low, 100 * high],
    }
