"""What people see while a run goes on: a live panel on a terminal, one line a step elsewhere, nothing with `--json`.

Everything goes to standard error, so results on standard output stay clean.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from shoal.cli.output import error_console, note
from shoal.cli.training import Session
from shoal.coordinator.nodes import Node
from shoal.coordinator.silence import Notice

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

SPARKS = "▁▂▃▄▅▆▇█"
MAX_NOTICES = 8
"""Lines on what keeps others waiting that a terminal shows; `shoal status` shows all."""

MAX_FEEDERS = 3
"""Nodes named that a worker's newest version came from."""

WAITING_HINT_S = 20.0
"""Without any worker for this long, the view says how to start one."""


class LiveView:
    """Shows a session; hand `ready` and `update` to `train`."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = error_console()
        self._live: Live | None = None
        self._as_panel = self._console.is_terminal and not quiet
        self._quiet = quiet
        self._last_step = 0
        self._told_evals: set[int] = set()
        self._told_waiting = False
        self._last_worker = time.monotonic()
        self._rewards: list[float] = []
        self._told: set[str] = set()
        """Subjects of what is told to keep others waiting."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def ready(self, session: Session) -> None:
        """The run has begun: say where it is and how to join it."""
        self._last_worker = time.monotonic()
        note(f"run {session.run.path}")
        if _waits_for_workers(session):
            note("No worker starts with this run; it waits until one joins, from this machine or another, with:")
        elif not self._quiet:
            note("To add a worker, on this machine or another:")
        if not self._quiet or _waits_for_workers(session):
            self._console.print(f"shoal worker {session.ticket}", soft_wrap=True, highlight=False, markup=False)
        if self._as_panel:
            from rich.live import Live

            self._live = Live(console=self._console, refresh_per_second=2, transient=False)
            self._live.start()

    def update(self, session: Session) -> None:
        """Show how things stand."""
        coordinator = session.coordinator
        metrics, version = coordinator.last_metrics, coordinator.control.version
        if metrics and version > self._last_step:
            self._rewards.append(metrics.get("reward", 0.0))
            if not self._as_panel and not self._quiet:
                note(
                    f"step {version}/{session.config.run.steps}  reward {metrics.get('reward', 0):.3f}  "
                    f"staleness {metrics.get('staleness_max', 0):.0f}  train {metrics.get('train_s', 0):.1f} s  "
                    f"wait {metrics.get('wait_s', 0):.1f} s  workers {len(coordinator.workers())}{self._eta(session)}"
                )
            self._last_step = version
        for evaluated, result in coordinator.control.evals.results.items():
            if evaluated not in self._told_evals and not self._quiet:
                self._told_evals.add(evaluated)
                note(
                    f"version {evaluated}: {result['strict']:.1%} of {result['questions']} held-out questions right "
                    f"({result['lenient']:.1%} counting any last number)"
                )
        self._hint(session)
        notices = coordinator.watch.notices()
        if not self._as_panel and not self._quiet:
            self._tell(notices)
        if self._live is not None:
            self._live.update(self._panel(session, notices))

    def _tell(self, notices: Sequence[Notice]) -> None:
        """One line when something begins to keep others waiting, and one when it is over."""
        now = {notice.subject: notice.text for notice in notices}
        for subject, text in now.items():
            if subject not in self._told:
                note(f"Waiting: {text}")
        for subject in self._told - set(now):
            note(f"No longer: {subject}")
        self._told = set(now)

    def _hint(self, session: Session) -> None:
        """Once for each time that the run is without workers for long."""
        now, coordinator = time.monotonic(), session.coordinator
        if coordinator.workers() or coordinator.control.ended or session.config.learner.mode == "colocated":
            self._last_worker, self._told_waiting = now, False
        elif now - self._last_worker > WAITING_HINT_S and not self._told_waiting:
            note(f"No worker is here; the run waits. Start one: shoal worker {session.ticket}")
            self._told_waiting = True

    def _eta(self, session: Session) -> str:
        coordinator = session.coordinator
        done = coordinator.control.version - coordinator.steps_at_start
        if coordinator.first_step_at is None or done < 1:
            return ""
        per_step = (time.monotonic() - coordinator.first_step_at) / done
        left = (session.config.run.steps - coordinator.control.version) * per_step
        return f"  about {left / 60:.0f} min left" if left > 90 else f"  about {left:.0f} s left"

    def _panel(self, session: Session, notices: Sequence[Notice] = ()) -> RenderableType:
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        coordinator, control = session.coordinator, session.coordinator.control
        steps = session.config.run.steps
        bar = Table.grid()
        bar.add_row(ProgressBar(total=steps, completed=control.version, width=60))
        facts = Table.grid(padding=(0, 2))
        for _ in range(4):
            facts.add_column()
        m = coordinator.last_metrics
        workers = coordinator.workers()
        facts.add_row(
            f"step {control.version}/{steps}",
            f"reward {m.get('reward', 0):.3f}",
            f"staleness {m.get('staleness_mean', 0):.1f}, most {control.consumption.max_staleness} "
            f"of {session.config.learner.max_staleness}",
            f"{sum(n.tokens_per_s for n in workers):.0f} tokens/s",
        )
        facts.add_row(
            f"train {m.get('train_s', 0):.1f} s",
            f"wait {m.get('wait_s', 0):.1f} s",
            f"publish {m.get('publish_s', 0):.1f} s",
            f"swept {control.queue.counts['swept']}, void {control.book.counts['void']}",
        )
        plan = control.provisioning.facts(time.monotonic())
        if "capacity/needed_rate" in plan:
            facts.add_row(*_plan_cells(plan))
        table = Table(box=None, padding=(0, 2), header_style="dim")
        for column in ("worker", "policy", "came from", "tokens/s", "rollouts/s", "rollouts used"):
            table.add_column(column)
        used_by, rates = control.consumption.by_name, control.provisioning.rates()
        for node in workers:
            rate = "parked" if node.node_id in control.provisioning.parked else f"{rates.get(node.node_id, 0.0):.2f}"
            used = used_by.get(node.name, 0)
            held, origin = _policy_cells(node, coordinator.name_of)
            table.add_row(node.name, held, origin, f"{node.tokens_per_s:.0f}", rate, str(used))
        if not workers:
            table.add_row("none yet", "", "", "", "", "")
        evals = "   ".join(f"v{v}: {r['strict']:.1%}" for v, r in sorted(control.evals.results.items()))
        for round_ in control.evals.rounds.values():
            evals += f"   v{round_.version}: {len(round_.answers)}/{len(round_.tasks)} answered"
        body = Group(
            bar,
            facts,
            Text(f"reward {_spark(self._rewards)}"),
            Text(f"held-out accuracy {evals or 'not measured yet'}"),
            table,
            *(Text(notice.text, style="bold red") for notice in notices[:MAX_NOTICES]),
        )
        return Panel(body, title=f"shoal: {session.run.name}{self._eta(session)}", title_align="left")


def _waits_for_workers(session: Session) -> bool:
    return session.config.workers.count == 0 and session.config.learner.mode != "colocated"


def _policy_cells(node: Node, name_of: Callable[[str], str]) -> tuple[str, str]:
    """The version that a worker has and what is on its way to it; who fed it the last one that came."""
    held = str(node.version)
    if (now := node.fetching) is not None:
        held += f" → {now.version} {now.bytes_done / max(1, now.bytes_total):.0%}"
    if node.arrived is None:
        return held, ""
    total = max(1, sum(node.arrived.by_source.values()))
    largest = sorted(node.arrived.by_source.items(), key=lambda item: -item[1])[:MAX_FEEDERS]
    fed = ", ".join(f"{name_of(source)} {num_bytes / total:.0%}" for source, num_bytes in largest)
    return held, f"{fed}, {node.arrived.seconds:.1f} s"


def _plan_cells(plan: Mapping[str, float]) -> tuple[str, str, str, str]:
    """What the planner measured and spends."""
    usd = f"{plan['usd']:.2f} $, {plan['usd_per_hour']:.2f} $/h" if "usd" in plan else ""
    return (
        f"{plan['capacity/rate']:.2f} of {plan['capacity/needed_rate']:.2f} rollouts/s needed",
        f"learner busy {plan['capacity/predicted_utilisation']:.0%} (predicted)",
        f"snapshot {plan['capacity/bcast_s']:.1f} s, every {plan['capacity/interval']:.0f} steps",
        usd,
    )


def _spark(values: list[float], width: int = 60) -> str:
    shown = values[-width:]
    top = max(shown, default=0.0) or 1.0
    return "".join(SPARKS[min(len(SPARKS) - 1, int(max(0.0, v) / top * (len(SPARKS) - 1)))] for v in shown)
