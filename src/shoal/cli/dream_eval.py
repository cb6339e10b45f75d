"""`shoal dream eval` and `shoal dream bound`: how well a world model foresees real pages, and how well one could."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.cli.output import console, note, print_json
from shoal.cli.parameters import Json
from shoal.errors import ConfigError

if TYPE_CHECKING:
    from shoal.envs.dream.dataset import Bound, Move

NOTE_EVERY_S = 15.0


def bound(*train: Path, heldout: Path, heldout_site: str = "wiki", json: Json = False) -> None:
    """How much of held-out transitions can be known at all, by a page and by all that was collected for training.

    For example:

        shoal dream bound dreams/experts dreams/wandering --heldout dreams/heldout

    Args:
        train: Folders of episodes to learn from.
        heldout: Folder of episodes to be foreseen.
        heldout_site: The site that no training episode is on.
    """
    found = _bounds(list(train), [heldout], heldout_site)
    if json:
        print_json(found)
        return
    for name, row in found.items():
        console().print(
            f"held-out {name}: {row['transitions']} transitions that change the page; "
            f"determined {row['determined']:.1%}, best edit F1 {row['edit_f1']:.3f}; "
            f"{row['change_rate']:.1%} of all acts change it",
            markup=False,
            soft_wrap=True,
        )
        for one in row["unknown"]:
            console().print(
                f"  {one['unknown']} of {one['transitions']}: {one['kind']}, {one['act']} on '{one['title']}', such as"
                f" {' '.join(one['atom'])}",
                markup=False,
                soft_wrap=True,
            )


def evaluate(
    world: str,
    /,
    *data: Path,
    limit: int = 200,
    depth: int = 8,
    dreams: int = 40,
    judged: int = 100,
    untuned: bool = True,
    heldout_site: str = "wiki",
    max_tokens: int = 512,
    seed: int = 0,
    threads: int = 1,
    device: str = "auto",
    json: Json = False,
) -> None:
    """Measure a world model on real episodes: next pages after one act, and deeper and deeper in a dream.

    Counted are transitions that change the page, so a copy of the page is never exact. Beside the model: that copy, the
    same model before it was fitted, and what can be known at all.

    For example:

        shoal dream eval world dreams/heldout
        shoal dream eval http://127.0.0.1:8000/v1 dreams/heldout --json

    Args:
        world: A folder of shoal dream fit, an endpoint of shoal serve, any model's name, or copy.
        data: Folders of held-out episodes.
        limit: Transitions of held-out templates, and of the held-out site, each.
        depth: Deepest step of a dream that is compared.
        dreams: Episodes that are dreamt that deep.
        judged: Episodes of which the model says whether their task is done.
        untuned: Ask the model that it was fitted from as well.
        heldout_site: The site that no training episode is on.
        max_tokens: Longest answer.
        seed: Of what is drawn.
        threads: CPU threads.
        device: auto, cpu, cuda or cuda:N.
    """
    if not data or limit < 1 or depth < 1:
        raise ConfigError(
            "there is nothing to foresee.", "Name folders of held-out episodes; --limit and --depth from 1."
        )
    found = asyncio.run(
        _evaluate(
            world, list(data), limit, depth, dreams, judged, untuned, heldout_site, max_tokens, seed, threads, device
        )
    )
    if json:
        print_json(found)
        return
    _print(found)


def _print(found: dict[str, Any]) -> None:
    out = console()
    for place, row in found["held_out"].items():
        for name in ("world", "untuned", "copy"):
            if name in row and row[name]["transitions"]:
                one = row[name]
                scores = f"exact {one['exact']:.3f}   edit F1 {one['edit_f1']:.3f}   ({one['transitions']})"
                out.print(f"{place:9} {name:8} {scores}", markup=False)
    for row in found["depth"]:
        out.print(
            f"depth {row['depth']:.0f}: exact {row['exact']:.3f}, edit F1 {row['edit_f1']:.3f} "
            f"({row['dreams']:.0f} dreams; the first page left as it is: exact {row['copy_exact']:.3f})",
            markup=False,
        )
    out.print(f"judgement: {found['judging']}", markup=False)


async def _evaluate(
    where: str,
    data: list[Path],
    limit: int,
    depth: int,
    dreams: int,
    judged: int,
    untuned: bool,
    heldout_site: str,
    max_tokens: int,
    seed: int,
    threads: int,
    device: str,
) -> dict[str, Any]:
    from random import Random

    from shoal.envs.dream.dataset import by_place, read_episodes
    from shoal.envs.dream.evaluation import by_action, depth_curve, judging, one_act, sample, summary
    from shoal.envs.dream.world import World, close_worlds, open_world, read_card

    episodes = read_episodes(data)
    card = read_card(Path(where))
    world = open_world(where, max_tokens=max_tokens, threads=threads, device=device)
    worlds = {"world": world, "copy": World(None, world.sight)}
    if untuned and card:
        before = open_world(card["model"], max_tokens=max_tokens, threads=threads, device=device)
        worlds["untuned"] = World(before.speaker, world.sight, max_tokens)
    sites = by_place(sample(episodes, len(episodes) * 1000, seed), heldout_site)
    held_out: dict[str, Any] = {}
    started = time.monotonic()
    try:
        for place, every in sites.items():
            asked = every if len(every) <= limit else Random(seed).sample(every, limit)
            held_out[place] = {"available": len(every)}
            for name, one in worlds.items():
                made = await one_act(one, asked, _progress(f"{place}, {name}"))
                matches = [match for _, match in made]
                held_out[place][name] = {
                    **summary(matches),
                    "by_action": by_action(asked, matches),
                    "cut": sum(prediction.cut for prediction, _ in made),
                }
        known = [one for one in episodes if not one.task.id.startswith(f"{heldout_site}/")]
        deep = sorted(known, key=lambda one: (-min(depth + 1, len(one.moments)), one.id))[:dreams]
        dreaming = time.monotonic()
        curve = await depth_curve(world, deep, depth, _progress("dreams"))
        dreaming = time.monotonic() - dreaming
        told = Random(seed).sample(known, min(judged, len(known)))
        verdicts = await judging(world, told, _progress("judgements"))
    finally:
        await close_worlds()
    found = {
        "world": where,
        "held_out": held_out,
        "depth": curve,
        "dreams_per_s": len(deep) / max(dreaming, 1e-9),
        "judging": dict(verdicts),
        "seconds": time.monotonic() - started,
    }
    if card.get("episodes"):
        found["bound"] = _bounds([Path(one) for one in card["episodes"]], data, heldout_site)
    return found


def _bounds(train: list[Path], heldout: list[Path], heldout_site: str) -> dict[str, Any]:
    from shoal.envs.dream.dataset import bound, by_place, moves, read_episodes

    known = [move for episode in read_episodes(train) for move in moves(episode)]
    asked = by_place([move for episode in read_episodes(heldout) for move in moves(episode)], heldout_site)
    return {place: _bound_row(known, every, bound) for place, every in asked.items()}


def _bound_row(known: list[Move], every: list[Move], bound: Callable[..., Bound]) -> dict[str, Any]:
    changed = [move for move in every if move.changed]
    best = bound(known, changed)
    return {
        "transitions": best.transitions,
        "change_rate": len(changed) / max(1, len(every)),
        "determined": best.determined,
        "edit_f1": best.edit_f1,
        "unknown": [asdict(one) for one in best.unknown],
    }


def _progress(what: str) -> Callable[[int, int], None]:
    """Notes, not too often, how far it is."""
    last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= NOTE_EVERY_S or done == total:
            last = now
            note(f"{what}: {done} of {total}")

    return progress
