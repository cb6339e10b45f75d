"""The README and the how-tos as a newcomer follows them: each page's files are written and its commands run, in order.

They are real processes in a folder of the page's own. A random model of a few thousand weights lies where the embedded
one would be fetched to, and sizes are cut down (`SMALLER`); otherwise the words are the page's. `ONLY_READ` names the
commands that are not run here but only taken (`test_documented_commands`), each with the reason.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from documented import REPOSITORY, commands

sys.path.append(str(REPOSITORY / "tests" / "engine"))

from engine_cases import PLAIN, make_checkpoint

from shoal.engine.conversion import HASHES, file_hash
from shoal.engine.source import EMBEDDED_DIRECTORY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

PATIENCE_S = 240.0
"""The longest that one command may take on a busy machine; nothing is judged by how long it took."""

PAGES = (
    "README.md",
    "docs/first_hour.md",
    "docs/howto/python.md",
    "docs/howto/tracking.md",
    "docs/capture.md",
    "docs/environments.md",
    "docs/finetuning.md",
    "docs/serving.md",
)

ONLY_READ = {
    "make demo": "ten minutes; run by hand on each release",
    "make test": "it is what runs this",
    "shoal demo": "ten minutes; run by hand on each release",
    "shoal worker shoal1lQG6Y2...": "the ticket is cut off; the first hour joins a worker",
    "shoal train configs/arithmetic.toml --workers 0 --network.routers shoalr1...": "cut off; see tests/cli",
    "shoal worker shoal1AbC... --stage --stage-host 0.0.0.0": "the ticket is cut off; tests/serving has stages",
    "shoal status shoal1AbC...": "the ticket is cut off; the first hour asks for a status",
    "shoal serve runs/NAME --follow": "follows a run that goes on; tests/serving has it",
    "shoal serve --adapter pirate=adapters/pirate": "there is no such adapter; tests/serving has some",
    "shoal serve MODEL --stages 3 --local-stages 1 --stage-host 0.0.0.0": "waits for others; see tests/serving",
}

SMALLER = {
    "--questions 40": "--questions 4",
    "--port 8000": "--port {port}",
    "--port 8080": "--port 0",
    "DIRECTORY": "runs/NAME/model",
    "MODEL": "runs/NAME/model",
    "--steps 4": "--steps 2",
}
"""What a page says -> what is run; `{port}` is a free one."""

TRAINING = (
    *("--model.context_tokens=512", "--rollout.group_size=4", "--rollout.groups_per_step=2", "--rollout.max_tokens=8"),
    *("--eval.questions=4", "--eval.max_tokens=8", "--output.plots=false", "--model.dtype=fp32"),
)
"""Added to every `shoal train`."""

STAYS = re.compile(r"shoal (serve(?!.*--new-key)|router|worker|train .*(--workers 0|together))")
"""Commands that go on beside the page's next ones."""

END_BY_THEMSELVES = re.compile(r"shoal (train .*together|worker)")
"""Of those, the ones that are not told to."""

MAY_FAIL = re.compile(r"shoal agent ")
"""A random model finds no answer, which is exit code 1."""


class World:
    """A folder in which a page is followed."""

    def __init__(self, path: Path, home: Path) -> None:
        self.path, self.home, self.port = path, home, free_port()
        self.staying: list[tuple[str, subprocess.Popen[bytes], Path]] = []
        (path / "configs").symlink_to(REPOSITORY / "configs")

    @property
    def environment(self) -> dict[str, str]:
        paths = [str(self.path), str(REPOSITORY / "src")]
        own = Path(sys.executable).parent
        return os.environ | {
            "SHOAL_HOME": str(self.home),
            "PYTHONPATH": os.pathsep.join(paths),
            "PATH": f"{own}{os.pathsep}{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
            "NO_COLOR": "1",
        }

    def start(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as out:
            return subprocess.Popen(
                command,
                cwd=self.path,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def do(self, words: list[str]) -> None:
        """Run one of the page's commands, or start it if it stays."""
        shown = " ".join(words)
        smaller = shlex.join(words)
        for said, meant in SMALLER.items():
            smaller = re.sub(rf"(?<![\w/]){re.escape(said)}(?!\w)", meant.format(port=self.port), smaller)
        arguments = shlex.split(smaller)[1:]
        if arguments[0] == "train":
            arguments += TRAINING
        if arguments[0] in ("serve", "router") and "--port" not in arguments:
            arguments += ["--port", "0"]
        log = self.path / f"{len(list(self.path.glob('*.log'))):03}.log"
        if STAYS.match(shown) and not shown.startswith("shoal worker"):
            self.settle()  # What stayed so far was there for the commands before this one.
        process = self.start([sys.executable, "-m", "shoal.cli", *arguments], log)
        if STAYS.match(shown):
            self.staying.append((shown, process, log))
            self.until_up(shown, process, log)
            return
        try:
            code = process.wait(PATIENCE_S)
        finally:
            end(process)
        allowed = (0, 1) if MAY_FAIL.match(shown) else (0,)
        assert code in allowed, f"{shown}: exit code {code}\n{log.read_text()}"

    def until_up(self, shown: str, process: subprocess.Popen[bytes], log: Path) -> None:
        """Wait until what stays is there for others."""

        def up() -> bool:
            said = log.read_text()
            if shown.startswith("shoal train"):
                return any(self.path.glob("runs/*/ticket.txt")) and "shoal1" in said
            if shown.startswith("shoal worker"):
                return "joined" in said
            return "http://" in said or "shoalr1" in said

        wait_for(up, process, shown, log)

    def python(self, block: str) -> None:
        """Run a block of Python."""
        log = self.path / "python.log"
        process = self.start([sys.executable, "-c", block], log)
        try:
            assert process.wait(PATIENCE_S) == 0, f"{block}\n{log.read_text()}"
        finally:
            end(process)

    def settle(self) -> None:
        """What stayed ends in order: by itself, or when it is told to."""
        staying, self.staying = self.staying, []
        try:
            for shown, process, _ in staying:
                if process.poll() is None and not END_BY_THEMSELVES.match(shown):
                    process.send_signal(signal.SIGINT)
            for shown, process, log in staying:
                code = process.wait(PATIENCE_S)
                assert code in (0, 130), f"{shown}: exit code {code}\n{log.read_text()}"
        finally:
            for _, process, _ in staying:
                end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a command, with whatever it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], what: str, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, f"{what} ended early:\n{log.read_text()}"
        assert time.monotonic() < deadline, f"{what}: it is not up\n{log.read_text()}"
        time.sleep(0.1)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory in whose cache a random model is the embedded one."""
    made = tmp_path_factory.mktemp("home") / "home"
    folder = make_checkpoint(made / "models" / EMBEDDED_DIRECTORY, PLAIN, max_position_embeddings=4096)
    hashes = {path.name: file_hash(path) for path in folder.iterdir()}
    (folder / HASHES).write_text(json.dumps(hashes))
    return made


@pytest.fixture
def world(tmp_path: Path, home: Path) -> Iterator[World]:
    made = World(tmp_path, home)
    yield made
    for _, process, _ in made.staying:
        end(process)


def finished_run(world: World) -> None:
    """A run that the pages call `runs/NAME`, with what they name of it."""
    world.do(["shoal", "train", "arithmetic", "--run.name", "NAME", "--run.steps", "2", "--workers", "1"])
    folder = world.path / "runs" / "NAME" / "episodes"
    lines = [json.loads(line) | {"reward": 1.0} for line in (folder / "000001.jsonl").read_text().splitlines()]
    (folder / "000039.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


BLOCK = re.compile(r"(?:`([\w.]+)`:\n\n)?^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
"""A block, and the file that it is where the line before says so."""


def test_what_is_only_read_is_still_there() -> None:
    """The list of exceptions holds nothing that no page shows any more."""
    shown = set()
    for name in PAGES:
        for _, language, content in BLOCK.findall((REPOSITORY / name).read_text()):
            if language in ("", "sh", "console"):
                shown |= {" ".join(words) for words in commands(content.replace("[...]", "x"))}
    expected = {line.replace("[...]", "x") for line in ONLY_READ}
    assert expected <= shown, expected - shown


ONE_EPISODE = """
import asyncio
from shoal.envs.registry import make

env = make("backwards:Backwards", {"letters": 5, "instruction": "Answer with one word."})
task = env.task("train", 0, 0)

async def act():
    opening = await env.reset(task)
    assert task.id in opening.messages[-1].content
    return await env.step(task.id[::-1])

assert asyncio.run(act()).reward == 1
"""


@pytest.mark.parametrize("name", PAGES)
def test_a_page_can_be_followed(world: World, name: str) -> None:
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    if "runs/NAME" in text or name == "docs/serving.md":
        finished_run(world)
    if name == "docs/finetuning.md":
        lines = [{"prompt": f"What is {n} + 1?", "completion": f"{n + 1}"} for n in range(40)]
        (world.path / "conversations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for file, language, content in BLOCK.findall(text):
        if file:
            (world.path / file).write_text(content)
        elif language == "python" and name == "docs/howto/python.md":
            world.python(content)
        elif language == "python" and name == "docs/environments.md":
            (world.path / "backwards.py").write_text(content)
            world.python(ONE_EPISODE)
        elif language in ("", "sh", "console") and "─" not in content:
            for words in commands(content):
                if " ".join(words) not in ONLY_READ:
                    world.do(words)
    world.settle()
