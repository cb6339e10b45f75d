"""A training run in a packet lab whose links are what holds it up: what the learner makes of its time.

Home (coordinator and learner) and each worker have an access link of `UP_MBPS`. Everything is `shoal train` and its
workers, by real tokens, steps and snapshots; rollouts and steps are stretched to a set time (`_paced`), so that the
snapshots' way and not the machine's load decides. With a star the learner's own uplink carries every copy.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import tempfile
from asyncio.subprocess import Process
from pathlib import Path
from typing import Any

import tomli_w

from _nat import START_S, tiny_model
from shoal.errors import RunError
from shoal.lab.network import Network, Node
from shoal.lab.packet import PacketLab, own_environment, packet_lab

NUM_WORKERS, SLOTS, GROUP_SIZE, GROUPS_PER_STEP = 6, 2, 4, 8
MAX_STALENESS = 2
TRAIN_S, ROLLOUT_S = 3.0, 2.0
UP_MBPS, DOWN_MBPS, DELAY_MS = 4.0, 40.0, 20.0
MLP_WIDTH = 512
"""Of a model of 0.9 MB in fp32: six copies take an uplink ten seconds, three steps."""

STEPS, WARM_STEPS, COOL_STEPS = 26, 6, 2
RUN_S = 420.0
"""A run that takes longer has failed."""

HOME = "home"


async def training(*, relays: bool) -> dict[str, Any]:
    """One run to its end: how busy its learner was, how long versions took, and who sent them."""
    names = [f"worker-{n}" for n in range(NUM_WORKERS)]
    nodes = [Node(name=n, up_mbps=UP_MBPS, down_mbps=DOWN_MBPS, delay_ms=DELAY_MS / 2) for n in (HOME, *names)]
    with tempfile.TemporaryDirectory(prefix="shoal-training-") as scratch:
        folder = Path(scratch)
        model = wider(tiny_model(folder / "tiny"), folder / "model")
        async with packet_lab(Network(nodes=tuple(nodes))) as lab:
            run = _Run(folder, lab)
            config = folder / "run.toml"
            config.write_text(tomli_w.dumps(_config(folder, model, lab.address(HOME))))
            train = await run.start(HOME, ["-m", "shoal.cli", "train", config, "--json"])
            ticket = await run.ticket(train)
            for name in names:
                call = f"import _paced; _paced.work({ticket!r}, {name!r}, {str(run.path)!r})"
                await run.start(name, ["-c", call], PACED_RELAY_HOST=lab.address(name) if relays else "")
            try:
                async with asyncio.timeout(RUN_S):
                    code = await train.wait()
            except TimeoutError:
                raise RunError(f"the run was not over after {RUN_S:g} s: {run.tail()}") from None
            if code != 0:
                raise RunError(f"the run failed: {run.tail()}")
            return _measured(run.path)


def wider(tiny: Path, target: Path) -> Path:
    """The tests' model with a wider MLP, and the same tokenizer."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    config = AutoConfig.from_pretrained(tiny)
    config.intermediate_size = MLP_WIDTH
    LlamaForCausalLM(config).save_pretrained(target)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(target)
    return target


class _Run:
    """The run's processes; the lab ends them with itself."""

    def __init__(self, folder: Path, lab: PacketLab) -> None:
        self._folder, self._lab = folder, lab
        self.path = folder / "runs" / "run"

    async def start(self, node: str, arguments: list[str | Path], **more: str) -> Process:
        environment = own_environment()
        environment |= {
            "PYTHONPATH": f"{Path(__file__).parent}:{environment['PYTHONPATH']}",
            "SHOAL_HOME": str(self._folder / "homes" / node),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PACED_ROLLOUT_S": repr(ROLLOUT_S),
            "PACED_TRAIN_S": repr(TRAIN_S),
            "PACED_FORGIVEN_S": "0",
            "PACED_BCAST_S": "0",
            "PACED_STALL": "0",
            "PACED_SLOTS": str(SLOTS),
            "PACED_GROUP_SIZE": str(GROUP_SIZE),
            **more,
        }
        with (self._folder / f"{node}.log").open("ab") as log:
            return await self._lab.run(
                node, [sys.executable, *arguments], env=environment, stdout=log.fileno(), stderr=log.fileno()
            )

    async def ticket(self, train: Process) -> str:
        for _ in range(int(START_S / 0.1)):
            if (self.path / "ticket.txt").exists():
                return (self.path / "ticket.txt").read_text().strip()
            if train.returncode is not None:
                break
            await asyncio.sleep(0.1)
        raise RunError(f"the run did not begin: {self.tail()}")

    def tail(self) -> str:
        return "\n".join(log.read_text(errors="replace")[-700:] for log in sorted(self._folder.glob("*.log")))


def _config(folder: Path, model: Path, host: str) -> dict[str, Any]:
    return {
        "run": {"name": "run", "dir": str(folder / "runs"), "steps": STEPS},
        "model": {"name": str(model), "dtype": "fp32", "context_tokens": 64},
        "envs": {"digit": {"type": "_paced:FirstDigit"}},
        "rollout": {
            "group_size": GROUP_SIZE,
            "groups_per_step": GROUPS_PER_STEP,
            "max_tokens": 8,
            "lease_timeout_s": 60.0,
            "lookahead_groups": (MAX_STALENESS + 2) * GROUPS_PER_STEP,
        },
        "learner": {
            "mode": "async",
            "max_staleness": MAX_STALENESS,
            "lr": 1e-3,
            "device": "cpu",
            "checkpoint_every": 0,
            "advantage": {"type": "_paced:padded"},
        },
        "workers": {"count": 0, "device": "cpu"},
        "network": {"host": host},
        "eval": {"before": False, "after": False, "max_tokens": 8},
        "trust": {"check": False},
        "output": {"plots": False, "keep_episodes": False},
    }


def _measured(run: Path) -> dict[str, Any]:
    """Beginning and end left out."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    kept = steps[WARM_STEPS : len(steps) - COOL_STEPS]
    first, kept = kept[0], kept[1:]
    elapsed_s = kept[-1]["time"] - first["time"]
    waited_s = math.fsum(line["wait_s"] for line in kept)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    arrivals = [event["data"] for event in events if event["kind"] == "snapshot.arrived"]
    taken = [(source, n) for arrived in arrivals for source, n in arrived["by_source"].items()]
    return {
        "utilisation": 1 - waited_s / elapsed_s,
        "step_s": elapsed_s / len(kept),
        "snapshot_bytes": sum(line.get("snapshot_bytes", 0.0) for line in kept) / len(kept),
        "arrival_s": sum(arrived["seconds"] for arrived in arrivals) / max(1, len(arrivals)),
        "from_learner_share": sum(n for source, n in taken if source == "learner") / max(1, sum(n for _, n in taken)),
        "max_staleness": max(line["staleness_max"] for line in steps),
    }
