"""How quickly the command line answers, beside the smallest programs that other libraries make possible.

Each command is started `REPEATS` times in turn with the others, so that a busy moment hits all alike; the median
counts. The peers define two commands with typed parameters, nothing else, and live in an environment of their own.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from _common import benchmark, emit, peer_env

REPEATS = 15

PEERS = {
    "cyclopts": """
import cyclopts
app = cyclopts.App(name="peer")
@app.command
def train(config: str, *overrides: str, workers: int | None = None, dry_run: bool = False): "Train."
@app.command
def evaluate(config: str): "Evaluate."
app()
""",
    "typer": """
import typer
app = typer.Typer()
@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(context: typer.Context, config: str, workers: int | None = None, dry_run: bool = False): "Train."
@app.command()
def evaluate(config: str): "Evaluate."
app()
""",
    "click": """
import click
@click.group()
def app(): pass
@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@click.argument("config")
@click.option("--workers", type=int)
@click.option("--dry-run", is_flag=True)
@click.pass_context
def train(context, config, workers, dry_run): "Train."
@app.command()
@click.argument("config")
def evaluate(config): "Evaluate."
app()
""",
}


def main() -> None:
    peers = peer_env("cli-libraries", ["cyclopts==5.4.0", "typer==0.29.2", "click==8.5.1"])
    with TemporaryDirectory() as scratch:
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "shoal --version": [sys.executable, "-m", "shoal.cli", "--version"],
            "shoal --help": [sys.executable, "-m", "shoal.cli", "--help"],
            "shoal config check arithmetic": [sys.executable, "-m", "shoal.cli", "config", "check", "arithmetic"],
        }
        for name, source in PEERS.items():
            script = Path(scratch) / f"{name}_peer.py"
            script.write_text(source)
            commands[f"{name}: --help"] = [str(peers), str(script), "--help"]
            commands[f"{name}: train x"] = [str(peers), str(script), "train", "x"]
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for repeat in range(REPEATS + 1):
            for name, command in commands.items():
                started = time.perf_counter()
                # Captured, because waiting for a process without pipes polls every 50 ms.
                subprocess.run(command, check=True, capture_output=True, timeout=60)
                if repeat > 0:  # the first round fills caches of bytecode
                    seconds[name].append(time.perf_counter() - started)
    rows = [
        {"command": name, "median_s": statistics.median(taken), "min_s": min(taken), "max_s": max(taken)}
        for name, taken in seconds.items()
    ]
    emit(
        rows,
        {
            "help_s": statistics.median(seconds["shoal --help"]),
            "python_s": statistics.median(seconds["python -c pass"]),
        },
    )


if __name__ == "__main__":
    benchmark(main)
