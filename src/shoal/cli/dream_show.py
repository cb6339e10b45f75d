"""`shoal dream show`: dreams along real episodes as a page to read, with tables of what was measured."""

from __future__ import annotations

import asyncio
import json as json_codec
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.cli.output import console, note, print_json
from shoal.cli.parameters import Flag, Json
from shoal.errors import ConfigError, ShoalError, StorageError

if TYPE_CHECKING:
    from shoal.envs.dream.collect import Collected
    from shoal.envs.dream.report import Story
    from shoal.envs.dream.world import World

Tables = dict[str, list[dict[str, Any]]]


def show(
    world: str,
    /,
    *data: Path,
    out: Path = Path("dreams.html"),
    dreams: int = 12,
    depth: int = 8,
    measured: Sequence[Path] = (),
    screenshots: Flag = False,
    content: int = 0,
    max_tokens: int = 512,
    threads: int = 1,
    device: str = "auto",
    json: Json = False,
) -> None:
    """Write dreams along real episodes as one HTML file: each page as it was expected, and as it really came.

    For example:

        shoal dream eval world dreams/heldout --json > eval.json
        shoal bench dreams --json -- --only report > rows.json
        shoal dream show world dreams/heldout --out dreams.html --measured eval.json --measured rows.json --screenshots

    Args:
        world: A folder of shoal dream fit, an endpoint, any model's name, or copy.
        data: Folders of episodes.
        out: The file.
        dreams: Episodes that are dreamt.
        depth: Acts of each.
        measured: Results of shoal dream eval and of shoal bench dreams, as JSON, shown as tables.
        screenshots: Play the episodes again in the browser, for pictures of the real pages.
        content: With screenshots: the seed of what the sites were about when the episodes were collected.
        max_tokens: Longest answer of the world model.
        threads: CPU threads.
        device: auto, cpu, cuda or cuda:N.
    """
    if not data:
        raise ConfigError("there is nothing to dream along.", "Name folders that shoal dream collect wrote.")
    tables = _tables(measured)
    html, count = asyncio.run(
        _show(world, list(data), dreams, depth, tables, content if screenshots else None, max_tokens, threads, device)
    )
    try:
        out.write_bytes(html.encode("utf-8", "replace"))
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error.strerror}.", "Name another file by --out.") from None
    if json:
        print_json({"report": str(out), "dreams": count})
        return
    console().print(f"{count} dreams: {out}", markup=False)


async def _show(
    where: str,
    data: list[Path],
    dreams: int,
    depth: int,
    tables: Tables,
    content: int | None,
    max_tokens: int,
    threads: int,
    device: str,
) -> tuple[str, int]:
    from shoal.envs.base import stable_int
    from shoal.envs.dream.dataset import read_episodes
    from shoal.envs.dream.report import page
    from shoal.envs.dream.world import close_worlds, open_world
    from shoal.envs.web.browser import close_browser

    episodes = sorted(read_episodes(data), key=lambda one: stable_int("shown", one.id))[:dreams]
    world = open_world(where, max_tokens=max_tokens, threads=threads, device=device)
    try:
        stories = [await _dreamt(world, episode, depth, content) for episode in episodes]
    finally:
        await close_worlds()
        if content is not None:
            await close_browser()
    facts = {"world": where, "episodes": ", ".join(map(str, data))}
    return page("Dreams of the web", facts, tables, stories), len(stories)


async def _dreamt(world: World, episode: Collected, depth: int, content: int | None) -> Story:
    """A dream along an episode, act by act."""
    from shoal.envs.dream.dataset import read_or_none
    from shoal.envs.dream.dreaming import Dream
    from shoal.envs.dream.report import Scene, Story
    from shoal.envs.dream.score import compare
    from shoal.envs.web.actions import ActionError, Stop

    first = episode.moments[0].page
    dream, scenes = Dream(world, episode.instruction, first), []
    pictures = await _pictures(episode, depth, content) if content is not None else {}
    for number, (moment, then) in enumerate(zip(episode.moments[:depth], episode.moments[1:], strict=False)):
        action, before, reason = read_or_none(moment.action), dream.page, ""
        if isinstance(action, Stop):
            break
        if action is not None:
            try:
                reason = (await dream.act(action)).reason
            except ActionError as error:
                reason = f"In the dream this cannot be done: {error}"
        match = compare(first, then.page, dream.page)
        scenes.append(Scene(moment.action, reason, before, dream.page, then.page, match, pictures.get(number, b"")))
    note(f"{episode.id}: {len(scenes)} acts")
    return Story(episode.id, episode.instruction, tuple(scenes))


async def _pictures(episode: Collected, depth: int, content: int) -> dict[int, bytes]:
    """The real page after each act; those that can be had."""
    from shoal.envs.dream.dataset import read_or_none, task_kind
    from shoal.envs.web.actions import ActionError
    from shoal.envs.web.play import Play

    found: dict[int, bytes] = {}
    play = await Play.begin(task_kind(episode), episode.task.seed, content)
    try:
        for number, moment in enumerate(episode.moments[:depth]):
            action = read_or_none(moment.action)
            if action is not None:
                with suppress(ActionError):  # It could not be done then, either.
                    await play.act(action)
            if play.done:
                break
            found[number] = await play.screenshot()
    except ShoalError as error:
        note(f"{episode.id}: no more pictures: {error}")
    finally:
        await play.close()
    return found


def _tables(measured: Sequence[Path]) -> Tables:
    """What was measured, as tables.

    Raises:
        StorageError: a file cannot be read, or is not what was named.
    """
    tables: Tables = {}
    for path in measured:
        try:
            found = json_codec.loads(path.read_bytes())
            tables |= _evaluated(found) if "held_out" in found else _trained(found)
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error.strerror}.") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise StorageError(f"{path} is no result of shoal dream eval or shoal bench dreams.") from None
    return tables


def _evaluated(found: Mapping[str, Any]) -> Tables:
    rows = [
        {"held out": place, "world": who, **{key: row[who].get(key) for key in ("transitions", "exact", "edit_f1")}}
        for place, row in found["held_out"].items()
        for who in ("world", "untuned", "copy")
        if who in row
    ]
    bound = [{"held out": place, **row} for place, row in found.get("bound", {}).items()]
    return {
        "The next page": rows,
        "What can be known": bound,
        "Deeper in a dream": list(found["depth"]),
        "Whether a task is done": [dict(found["judging"])],
    }


def _trained(found: Mapping[str, Any]) -> Tables:
    rows = next(row for row in found["rows"] if row["part"] == "report")
    named = {name: row for name, row in rows.items() if name != "part"}

    def part(kind: str, column: str) -> list[dict[str, Any]]:
        chosen = [(int(name.partition("-")[2]), row) for name, row in named.items() if name.startswith(f"{kind}-")]
        return [{column: number, **_row(row)} for number, row in sorted(chosen, key=lambda pair: pair[0])]

    return {
        "Trained": [{"row": name, **_row(row)} for name, row in named.items() if "-" not in name],
        "Length of dreams": part("length", "acts"),
        "Share of experts": part("share", "per cent"),
    }


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    low, high = row["interval_points"]
    return {
        "before": row["before"],
        "after": row["after"],
        "gain, points": row["gain_points"],
        "interval": f"{low:+.1f} to {high:+.1f}",
        "episodes": row["episodes"],
        "runs": row["runs"],
    }
