"""MiniWoB++: its pages from the wheel `miniwob`, seeded and reset in the page, with their own reward.

1. Time: an episode has no limit, and the reward is the raw one, without the discount by time; animations of jQuery are
   off, so that a page after an act is the same however fast the machine is.
2. The instruction is part of the task's words, not of the tree; a reward is never below 0.

Invariant: a seed gives one problem. Which tasks are left out, and why, is `EXCLUDED`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from shoal.envs.web.files import Files
from shoal.envs.web.listed import listed
from shoal.envs.web.tab import Tab
from shoal.errors import TaskError

HOST = "miniwob.test"
NO_LIMIT_MS = 1_000_000_000
"""Below 2^31: a browser's timers take no more."""
FURNITURE = frozenset({"reward-display", "sync-task-cover", "click-canvas", "query"})
"""Elements of the frame around a task."""

TASKS: tuple[str, ...] = listed(
    """book-flight-nodelay buy-ticket choose-date choose-date-easy choose-date-medium choose-date-nodelay
    choose-list click-button click-button-sequence click-checkboxes click-checkboxes-large
    click-checkboxes-soft click-checkboxes-transfer click-collapsible click-collapsible-2
    click-collapsible-2-nodelay click-collapsible-nodelay click-dialog click-dialog-2 click-link
    click-option click-scroll-list click-tab click-tab-2 click-tab-2-easy click-tab-2-hard
    click-tab-2-medium click-test click-test-2 click-test-transfer click-widget copy-paste copy-paste-2
    enter-date enter-password enter-text enter-text-2 enter-text-dynamic enter-time find-greatest find-word
    focus-text focus-text-2 form-sequence-2 form-sequence-3 generate-number guess-number login-user
    login-user-popup multi-layouts multi-orderings navigate-tree odd-or-even order-food phone-book
    read-table read-table-2 scroll-text search-engine sign-agreement simple-algebra simple-arithmetic
    tic-tac-toe unicode-test use-autocomplete use-autocomplete-nodelay use-spinner"""
)

EXCLUDED: dict[str, str] = {
    "what counts is drawn, coloured or a picture": """ascending-numbers bisect-angle circle-center click-color click-pie
    click-pie-nodelay click-shades click-shape count-shape count-sides find-midpoint grid-coordinate identify-shape
    number-checkboxes right-angle text-transform use-colorwheel use-colorwheel-2 visual-addition""",
    "it is done with a moving pointer": """chase-circle click-menu click-menu-2
    daily-calendar drag-box drag-circle drag-cube drag-items
    drag-items-grid drag-shapes drag-shapes-2 drag-single-shape drag-sort-numbers draw-circle draw-line form-sequence
    highlight-text highlight-text-2 hot-cold hover-shape moving-items resize-textarea scroll-text-2 use-slider
    use-slider-2""",
    "its buttons are icons without a name": """email-inbox email-inbox-delete email-inbox-forward email-inbox-forward-nl
    email-inbox-forward-nl-turk email-inbox-important email-inbox-nl-turk email-inbox-noscroll email-inbox-reply
    email-inbox-star-reply social-media social-media-all social-media-some text-editor""",
    "it depends on the clock": "book-flight button-delay simon-says stock-market terminal",
}
"""Reason -> tasks that a text agent is not given. The pages under `flight/`, recordings of real sites, are not
used either."""

_RESET = """([seed, limit]) => {
  core.EPISODE_MAX_TIME = limit;
  if (window.jQuery) jQuery.fx.off = true;
  core.endEpisode(0);
  Math.seedrandom(seed);
  core.startEpisodeReal();
  const said = core.getUtterance();
  return typeof said === 'string' ? said : said.utterance;
}"""
_OUTCOME = "() => [WOB_DONE_GLOBAL, WOB_RAW_REWARD_GLOBAL]"


@dataclass(frozen=True, slots=True)
class Outcome:
    done: bool
    reward: float
    """From -1 to 1, as the page gives it."""


@lru_cache(maxsize=1)
def pages() -> Files:
    """The wheel's pages as a site.

    Raises:
        TaskError: the wheel is not installed.
    """
    # Found, not imported: the package itself would start drivers of its own.
    spec = importlib.util.find_spec("miniwob")
    if spec is None or spec.origin is None:
        raise TaskError("The pages of MiniWoB++ are not installed.", "Install them with: pip install 'shoal[web]'.")
    return Files(Path(spec.origin).parent / "html")


async def load(tab: Tab, task: str) -> None:
    """Open a task's page, where the tab does not show it already."""
    url = f"http://{HOST}/miniwob/{task}.html"
    if tab.url != url:
        tab.hidden_ids = FURNITURE
        await tab.goto(url)


async def reset(tab: Tab, seed: int) -> str:
    """Begin the loaded task's problem number `seed`; its instruction."""
    instruction = await tab.evaluate(_RESET, [str(seed), NO_LIMIT_MS])
    tab.renumber()
    return " ".join(str(instruction).split())


async def outcome(tab: Tab) -> Outcome:
    """Whether the episode is over, and what it earned."""
    done, reward = await tab.evaluate(_OUTCOME)
    return Outcome(bool(done), float(reward))
