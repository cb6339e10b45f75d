"""The loop's stages, one after the other: measure, train with everything beside, measure again.

    before   ┌ held-out questions of every environment      one process
             └ exercises, held-out problems                 the experts' process: the base model
    train    coordinator (here), learner, workers           `cli.training.train`
             ├ server      follows the versions, answers a client all the time
             ├ agents      the same, practise; what they do comes back as an environment (`Steps`)
             └ memory      candidates of what was trained on, tried over the run's swarm, recalled for new tasks
    after    as before, with the trained model and with what is remembered

Training ends with its last step, or when its time is up: then the run drains as it does when its money is up, and is
continued with as many steps as there were, which writes the model. Invariants: no process outlives the stage that it
was started for; Ctrl-C and SIGTERM end a stage in order, and `go` begins again with the stage that was interrupted.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from msgspec.structs import replace

from shoal.cli.loop_client import ask_for_ever, free_port
from shoal.cli.loop_collective import STEPS, STEPS_TYPE, Gathered, gathering, has_steps, steps_settings
from shoal.cli.loop_services import Services, num_processes
from shoal.cli.loop_state import LoopFolder, When
from shoal.cli.training import Session, View, prepare_model, signals, train
from shoal.config import Config, Environment, is_loopback, to_toml
from shoal.coordinator.draining import Drain
from shoal.coordinator.rundir import RunDir
from shoal.errors import NetworkError, RunError
from shoal.fabric.ticket import Ticket

AFTER_OVER_BEFORE = 1.4
"""The second measurement also asks with notes."""

ENDING_S = 75.0
"""A drain, the model's writing, the report."""

MIN_TRAIN_S = 60.0
"""Training gets this much, however little the measurements leave."""

LOOK_S = 5.0
TOLD_S = 30.0
"""How often it is said how far a measurement is."""

MEMORY_TICKET = "memory-ticket.txt"
MEMORY_USES = 64
NICE_MEMORY, NICE_AGENTS = 5, 5
"""Trials may wait for rollouts, and practice as well."""

TIME_IS_UP = "the loop's time for training is up"

T = TypeVar("T")


class LoopRun:
    """One loop in the run's folder `run`.

    Args:
        config: the run's, as it is in its folder.
        folder: the loop's, open.
    """

    def __init__(
        self,
        config: Config,
        folder: LoopFolder,
        *,
        say: Callable[[str], None],
        view: View,
        on_ready: Callable[[Session], None],
    ) -> None:
        self.config, self.folder = config, folder
        self.run = folder.run
        self._say, self._view, self._on_ready = say, view, on_ready
        self._collective: Gathered | None = None
        self._train_until = 0.0
        self._session: Session | None = None

    async def go(self) -> None:
        """Do what is left to do.

        Raises:
            ShoalError: the loop cannot go on; it can be resumed.
            KeyboardInterrupt: Ctrl-C or SIGTERM; likewise.
        """
        await _interruptible(prepare_model(self.config.model.name, self._say))
        async with AsyncExitStack() as stack:
            if self.folder.state.collective and self.folder.state.stage != "done":
                self._collective = await stack.enter_async_context(gathering(self.config, self.folder))
                self._say(f"agents of other machines join with: shoal agent join {self._collective.ticket_file}")
            if self.folder.state.stage == "before":
                await self._timed("before", _interruptible(self._measure("before", self.config.model.name)))
                self._note("before", 0)
                self._take_in_steps()
                self.folder.set(stage="train")
            if self.folder.state.stage == "train":
                await self._timed("train", self._train())
                self.folder.set(stage="after")
            if self.folder.state.stage == "after":
                await self._timed("after", _interruptible(self._measure("after", str(self.run / "model"))))
                self._note("after", self.config.run.steps)
                self.folder.set(stage="done")

    async def _timed(self, stage: str, work: Coroutine[Any, Any, None]) -> None:
        began = time.monotonic()
        try:
            await work
        finally:
            self.folder.spent(stage, time.monotonic() - began)

    def _services(self) -> Services:
        return Services(self.run / "logs", self._say, self.folder.restarted)

    # Measuring

    async def _measure(self, when: When, model: str) -> None:
        self._say(f"{when}: held-out questions and problems")
        asked = asyncio.create_task(self._told(when))
        try:
            async with self._services() as services, asyncio.TaskGroup() as tasks:
                tasks.create_task(services.finish(f"measure-{when}", ["_loop_measure", str(self.run), when, model]))
                if self._collective is not None:
                    tasks.create_task(self._examine(self._collective, services, when, model))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
        if self._collective is not None:
            await self._collective.absent()

    async def _examine(self, collective: Gathered, services: Services, when: When, model: str) -> None:
        # What is kept before training begins ends where the held-out problems begin (`Gathered.begin`).
        episodes = self.folder.path / "begun.jsonl" if when == "before" else None
        services.keep("agents", collective.arguments(model, episodes=episodes))
        await collective.present()
        if episodes is not None:
            await collective.begin(episodes)
        await collective.examine(when)

    async def _told(self, when: When) -> None:
        while True:
            await asyncio.sleep(TOLD_S)
            questions, problems = (len(self.folder.lines(f"{part}{when}.jsonl")) for part in ("", "problems-"))
            self._say(f"{when}: {questions} questions answered, {problems} problems done")

    def _note(self, when: When, version: int) -> None:
        """Held-out accuracy over all families as the run's own figure, which pages and plots show."""
        lines = [line for line in self.folder.lines(f"{when}.jsonl") if not (line["void"] or line["notes"])]
        if not lines:
            return
        means = {part: fmean(line[part] for line in lines) for part in ("strict", "lenient")}
        tokens = fmean(line["tokens"] for line in lines)
        files = RunDir(self.run)
        files.metric(kind="eval", version=version, questions=len(lines), **means, response_tokens_mean=tokens)
        files.close()

    # Training

    def _take_in_steps(self) -> None:
        """The collective's own steps are an environment of the run, where there is anything to be learnt from them."""
        kept = self.folder.path / STEPS
        if self._collective is None or not self.config.loop.steps_weight or not has_steps(kept):
            return
        steps = Environment(
            type=STEPS_TYPE, weight=self.config.loop.steps_weight, settings=dict(steps_settings(kept)), recall=False
        )
        self._rewrite(self.config.model_copy(update={"envs": {**self.config.envs, "steps": steps}}))

    def _rewrite(self, config: Config) -> None:
        self.config = config
        RunDir(self.run).write_atomic("config.toml", to_toml(config).encode())

    def _left_for_training(self) -> float:
        """Seconds, from what the loop may take in all and what the first measurement took."""
        seconds = self.folder.state.seconds
        before = seconds.get("before", 0.0)
        whole = 60.0 * self.folder.state.minutes
        return max(MIN_TRAIN_S, whole - ENDING_S - before * (1 + AFTER_OVER_BEFORE) - seconds.get("train", 0.0))

    async def _train(self) -> None:
        self._train_until = time.monotonic() + self._left_for_training()
        self._say(f"train: for {self._left_for_training() / 60:.1f} minutes, or {self.config.run.steps} steps")
        try:
            await self._run(beside=True)
            return
        except RunError:
            drain = self._session.coordinator.control.drain if self._session is not None else None
            if drain is None or drain.reason != TIME_IS_UP or drain.saved_at is None:
                raise
        assert self._session is not None
        done = self._session.coordinator.control.version
        if done < 1:
            raise RunError("not one step was done in the loop's time.", "Give it more by --minutes.")
        self._say(f"train: the time is up after {done} steps; the model is written")
        self._rewrite(self.config.model_copy(update={"run": self.config.run.model_copy(update={"steps": done})}))
        await self._run(beside=False)

    async def _run(self, *, beside: bool) -> None:
        more: dict[str, Any] = {}
        if beside:
            more = {"view": self._view, "on_ready": self._begun, "beside": self._beside}
        await train(self.config, RunDir.open(self.run), say=self._say, **more)

    def _begun(self, session: Session) -> None:
        self._session = session
        self._on_ready(session)

    @asynccontextmanager
    async def _beside(self, session: Session) -> AsyncIterator[None]:
        """What goes on while the run trains."""
        state, config, loop = self.folder.state, self.config, self.config.loop
        port = config.serving.port or free_port()
        common = ["--threads", str(config.workers.threads), "--device", config.workers.device]
        async with self._services() as services:
            server = ["serve", str(self.run), "--follow", "--host", config.serving.host, "--port", str(port)]
            if is_loopback(config.serving.host):  # Whoever is on this machine is let in, whatever keys there are.
                server += ["--keys", str(self.folder.path / "server-keys")]
            services.keep("server", [*server, *common])
            self._say(f"the policy is served at http://{config.serving.host}:{port}/v1, version by version")
            work = [
                self._watch(session),
                ask_for_ever(self.folder, port, config.run.seed, loop.request_every_s),
            ]
            if self._collective is not None:
                kept = self.folder.path / STEPS
                arguments = self._collective.arguments(config.model.name, follow=self.run, episodes=kept)
                services.keep("agents", arguments, nice=NICE_AGENTS)
                work.append(self._practise(self._collective))
            if state.memory:
                ticket = self._memory_ticket(session)
                self._say(f"memories of other machines join with: shoal memory join {ticket}")
                join = ["memory", "join", str(ticket), "--config", str(self.run / "config.toml")]
                services.keep("memory", [*join, "--folder", config.memory.folder, *common], nice=NICE_MEMORY)
                work.append(self._learn(services))
            tasks = [asyncio.create_task(one) for one in work]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                ended = await asyncio.gather(*tasks, return_exceptions=True)
            for found in ended:
                if isinstance(found, Exception):
                    raise found

    async def _watch(self, session: Session) -> None:
        """Count processes, and end training in order when its time is up."""
        while True:
            await asyncio.sleep(min(LOOK_S, max(0.0, self._train_until - time.monotonic())))
            if (count := num_processes()) > self.folder.state.most_processes:
                self.folder.set(most_processes=count)
            control = session.coordinator.control
            if time.monotonic() >= self._train_until:
                if not control.steps_done and control.drain is None:
                    control.drain = Drain(TIME_IS_UP, time.monotonic())
                    session.run.event("loop.drain", step=control.version)
                return

    async def _practise(self, collective: Gathered) -> None:
        try:
            await collective.present()
        except NetworkError as error:
            self._say(f"nobody practises: {error}")
            return
        await collective.practise()

    async def _learn(self, services: Services) -> None:
        """Now and then propose candidates from what was trained on since the last time."""
        while True:
            await asyncio.sleep(self.config.loop.learn_every_s)
            since = self.folder.state.learnt
            until = 1 + max((int(file.stem) for file in (self.run / "episodes").glob("*.jsonl")), default=-1)
            if until <= since:
                continue
            words = ["memory", "learn", str(self.run), "--folder", self.config.memory.folder]
            words += ["--most", str(self.config.loop.candidates), "--since", str(since), "--until", str(until)]
            with contextlib.suppress(RunError):  # Its log says why; the next time it is tried again.
                await services.finish("learn", words, nice=NICE_MEMORY)
                self.folder.set(learnt=until)

    def _memory_ticket(self, session: Session) -> Path:
        """A ticket for nodes that share memories, which the standing one does not admit."""
        life_s = self.config.network.ticket_hours * 3600
        invite = session.coordinator.admission.invite(("agent",), time.time(), life_s=life_s, uses=MEMORY_USES)
        line = replace(Ticket.decode(session.ticket), secret=invite.secret).encode()
        self.folder.files.write_atomic(MEMORY_TICKET, f"{line}\n".encode(), mode=0o600)
        return self.folder.path / MEMORY_TICKET


async def _interruptible(work: Coroutine[Any, Any, T]) -> T:
    """Work that Ctrl-C and SIGTERM end in order; raises `KeyboardInterrupt` then."""
    async with signals() as interrupted:
        task, stop = asyncio.create_task(work), asyncio.create_task(interrupted.wait())
        try:
            await asyncio.wait([task, stop], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise KeyboardInterrupt
            return task.result()
        finally:
            for one in (task, stop):
                one.cancel()
            await asyncio.gather(task, stop, return_exceptions=True)
