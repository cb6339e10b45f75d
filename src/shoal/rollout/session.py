"""One capture session: what an agent may ask for while it is open, and what became of it.

Responsibilities: the rules under which every call of the session samples, its bounds, its recording (`calltree`), its
reward.

Invariants: every completion of a session is drawn at the session's temperature from the whole distribution (nucleus,
penalties and biases of the agent's are not applied), so that its log-probabilities can be trained on; nothing is
recorded after the end; a session has at most one reward, and then it is closed. A pure state machine: time is the
caller's.
"""

from __future__ import annotations

import hmac
import math
import secrets
from dataclasses import dataclass, field

from shoal.errors import RecordError
from shoal.protocol.episode import MAX_TURNS
from shoal.protocol.sampling import SamplingParams
from shoal.rollout.calltree import Call, CallTree

KEY_PREFIX = "sk-session-"

MAX_PARTS = 64
"""Named parts of a reward."""

SEED_STRIDE = 0x9E3779B97F4A7C15
"""Spreads the sampling seeds of an episode's turns (the golden ratio in 64 bits)."""


class SessionOver(Exception):
    """The session is closed."""


class SessionFull(Exception):
    """The session has as many calls or tokens as it may have."""


@dataclass(frozen=True)
class Rules:
    """How a session samples, and how much."""

    params: SamplingParams
    """`max_tokens` bounds what a call may ask for; its temperature and seed are those of every call."""
    min_version: int = 0
    max_calls: int = 256
    max_tokens: int = 2**20
    """Recorded in all, prompts that are continued counted once."""
    agent_rewards: bool = False
    """The agent may give the reward itself, with the key that it calls with."""


@dataclass(frozen=True)
class Reward:
    """What an episode earned."""

    value: float
    parts: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not math.isfinite(self.value) or any(not math.isfinite(part) for part in self.parts.values()):
            raise RecordError("a reward or one of its parts is not finite.")
        if len(self.parts) > MAX_PARTS or any(len(name) > 64 for name in self.parts):
            raise RecordError(f"a reward has more than {MAX_PARTS} parts, or a part's name more than 64 characters.")


@dataclass
class Session:
    """The state of one session."""

    rules: Rules
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    key: str = field(default_factory=lambda: KEY_PREFIX + secrets.token_urlsafe(32))
    tree: CallTree = field(default_factory=CallTree)
    reward: Reward | None = None
    is_open: bool = True
    num_begun: int = 0
    """Completions asked for."""
    num_ended: int = 0
    """Completions recorded; the difference was given up by the agent, failed, or is under way."""
    tokens_begun: int = 0
    """The most tokens that what was begun can record."""

    def knows(self, key: str) -> bool:
        """Whether this is the session's key; takes as long whatever is wrong with it."""
        return hmac.compare_digest(self.key.encode(), key.encode())

    def begin(self, count: int, tokens: int) -> SamplingParams:
        """Begin a call of `count` completions that records at most `tokens`; gives what it samples with.

        Raises:
            SessionOver, SessionFull: it may not.
        """
        if not self.is_open:
            raise SessionOver
        if self.num_begun + count > min(self.rules.max_calls, MAX_TURNS):
            raise SessionFull(f"this session has its {self.rules.max_calls} calls.")
        if self.tokens_begun + tokens > self.rules.max_tokens:
            raise SessionFull(f"this session records at most {self.rules.max_tokens} tokens.")
        self.tokens_begun += tokens
        seed = self.rules.params.seed
        if seed is not None:
            seed = (seed + SEED_STRIDE * self.num_begun) % 2**63
        self.num_begun += count
        params = self.rules.params
        return SamplingParams(max_tokens=params.max_tokens, temperature=params.temperature, stop=params.stop, seed=seed)

    def record(self, call: Call) -> None:
        """A completion has ended; one that ends after the session is not kept."""
        if self.is_open and call.completion.finish in ("stop", "length"):
            self.tree.add(call)
            self.num_ended += 1

    def close(self, reward: Reward | None = None) -> None:
        """End it; a second end changes nothing.

        Raises:
            SessionOver: it is closed, and would be given another reward.
        """
        if not self.is_open and reward is not None:
            raise SessionOver
        self.is_open = False
        self.reward = self.reward or reward
