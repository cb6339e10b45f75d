"""What must hold of a run, whatever happened to it. Pure: from what was written down to sentences about what is wrong.

    nothing acknowledged is lost, nothing is trained twice, S holds     `broken_promises`   (the audit of the folder)
    the chain of snapshots is whole, and only what is on it is served   `broken_chain`, `wrong_versions`
    every request is answered or refused, in time                       `bad_requests`
    the run goes on when the faults are over                            `stalled`
    every process ends when it is told to, and none dies of a defect    `endless`, `crashes`
    nothing is left on a disk that only a run needs                     `leftovers`

An empty list is a check that holds. Times are seconds on one monotonic clock of the machine.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise

import msgspec

from shoal.broadcast.chain import Published, follows
from shoal.coordinator.audit import Audit

Span = tuple[float, float]
"""From, to."""

BUSY_STATUSES = (429, 503)
"""Refusals that a client can act on: come again later."""

TRACEBACK = "Traceback (most recent call last)"
CONTEXT_CHARS = 1500
"""Of a traceback that are told."""

HARMLESS = ("socket.accept() out of system resource",)
"""The line before a traceback that Python's event loop logs where it goes on by itself."""

ERROR_LINE = re.compile(r"^(?P<name>[\w.]+(?:Error|Exception|Refused|Gone|Expired|Interrupt)\b.*)$", re.MULTILINE)


class Request(msgspec.Struct, frozen=True):
    """One request of the API, as its client saw it.

    Attributes:
        outcome: `answered`; `refused` (a status that says no); `unreachable` (no connection); `broken` (the connection
            ended before the answer did); `unanswered` (the client gave up at its deadline).
        version: of the policy that answered, where it did.
    """

    begun_s: float
    ended_s: float
    outcome: str
    status: int = 0
    version: int = -1
    detail: str = ""


class Ended(msgspec.Struct, frozen=True):
    """How a process ended that was told to."""

    name: str
    took_s: float
    code: int | None
    """None: it had not ended after the longest time that it may take."""


class Mark(msgspec.Struct, frozen=True):
    """Something that got on."""

    at_s: float
    what: str


def broken_promises(audit: Audit) -> list[str]:
    """Groups and steps that are lost, count twice, or were trained on too late."""
    if audit.good:
        return []
    counts = {name: getattr(audit, name) for name in ("lost", "duplicated", "staleness_violations", "disorder")}
    return [f"the audit counts {counts}", *audit.problems]


def broken_chain(
    chain: Sequence[Published], missing_chunks: Mapping[int, int], published: Collection[int]
) -> list[str]:
    """What is wrong with the snapshots on the coordinator's disk.

    Args:
        chain: the manifests there whose signatures hold, oldest first.
        missing_chunks: by version, chunks that are not there or whose hash differs.
        published: versions that the run told of, which cannot all have vanished.
    """
    problems = [
        f"version {child.manifest.version} does not follow version {parent.manifest.version} on the chain"
        for parent, child in pairwise(chain)
        if not follows(parent, child.manifest)
    ]
    problems += [f"version {version} lacks {count} chunks" for version, count in missing_chunks.items() if count]
    newest = max((one.manifest.version for one in chain), default=-1)
    if published and newest < max(published):
        problems.append(f"version {max(published)} was published, and the newest that verifies is {newest}")
    return problems


def wrong_versions(requests: Iterable[Request], starts_s: Sequence[float], newest: int) -> list[str]:
    """Answers by a version that never was, or by an older one than before in the same life of the server."""
    problems = []
    answered = sorted((r for r in requests if r.outcome == "answered"), key=lambda r: r.begun_s)
    for request in answered:
        if not 0 <= request.version <= newest:
            problems.append(f"an answer names version {request.version}; the newest published is {newest}")
    for before in answered:
        for after in answered:
            same_life = not any(before.begun_s < start <= after.ended_s for start in starts_s)
            if before.ended_s < after.begun_s and after.version < before.version and same_life:
                problems.append(f"version {after.version} answered after version {before.version}")
                break
    return problems


def bad_requests(
    requests: Iterable[Request], *, deadline_s: float, stopped: Iterable[Span], excused: Iterable[Span]
) -> list[str]:
    """Requests that hung, that nobody answered, or that broke while nothing was wrong with the server.

    Args:
        deadline_s: within which a server answers or refuses.
        stopped: when the server's processes were stopped or starved, which counts towards nothing.
        excused: when the server was not there, or could not work: then connections may fail, and 5xx come.
    """
    stopped, excused = list(stopped), list(excused)
    problems = []
    for request in requests:
        span = (request.begun_s, request.ended_s)
        took_s = request.ended_s - request.begun_s - sum(_overlap(span, one) for one in stopped)
        is_excused = any(_touch(span, one) for one in excused)
        if took_s > deadline_s:
            problems.append(f"a request took {took_s:.1f} s of at most {deadline_s:g}: {_tell(request)}")
        elif is_excused:
            continue
        elif request.outcome in ("broken", "unreachable", "unanswered") or (
            request.status >= 500 and request.status not in BUSY_STATUSES
        ):
            problems.append(f"a request failed while nothing was wrong with the server: {_tell(request)}")
    return problems


def stalled(marks: Iterable[Mark], healed_s: float, needed: Mapping[str, int]) -> list[str]:
    """What did not get on after the faults were over: by kind of mark, how many there must be."""
    marks = list(marks)
    counts = {what: sum(mark.what == what and mark.at_s > healed_s for mark in marks) for what in needed}
    return [
        f"after the faults: {counts[what]} of {wanted} times '{what}'"
        for what, wanted in needed.items()
        if counts[what] < wanted
    ]


def endless(ends: Iterable[Ended], left: Mapping[int, str], longest_s: float) -> list[str]:
    """Processes that did not end when told to, and those that are left at the very end."""
    problems = [
        f"{end.name} had not ended after {end.took_s:.0f} s"
        for end in ends
        if end.code is None or end.took_s > longest_s
    ]
    return [*problems, *(f"process {pid} is left: {command}" for pid, command in left.items())]


def crashes(logs: Mapping[str, str]) -> list[str]:
    """Tracebacks: what users can mend has none, so each is a defect, but for those of `HARMLESS`."""
    problems = []
    for name, text in logs.items():
        at = text.find(TRACEBACK)
        while at >= 0:
            following = text[at + len(TRACEBACK) :]
            last = ERROR_LINE.search(following)
            if not text[:at].rstrip("\n").endswith(HARMLESS):
                told = text[at : at + CONTEXT_CHARS]
                problems.append(f"{name} has a traceback ({last['name'][:200] if last else 'cut off'}): {told}")
            at = text.find(TRACEBACK, at + 1)
    return problems


def leftovers(files: Collection[str]) -> list[str]:
    """Scratch folders that are there although everybody has ended in order since."""
    return [f"left on a disk: {name}" for name in sorted(files)]


def recovery_s(marks: Iterable[Mark], what: str, since_s: float) -> float | None:
    """Until something happened again; None: it did not."""
    return next(
        (mark.at_s - since_s for mark in sorted(marks, key=_time) if mark.what == what and mark.at_s > since_s), None
    )


def _time(mark: Mark) -> float:
    return mark.at_s


def _overlap(one: Span, other: Span) -> float:
    return max(0.0, min(one[1], other[1]) - max(one[0], other[0]))


def _touch(one: Span, other: Span) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]


def _tell(request: Request) -> str:
    status = f" {request.status}" if request.status else ""
    return f"{request.outcome}{status} at {request.begun_s:.1f} s {request.detail[:200]}".rstrip()
