"""What a server's settings say about speculation, opened: the drafter's weights, and a drafter with its rule a batch.

Invariant: a lossy rule is never used where answers are recorded to be trained on.
"""

from __future__ import annotations

from collections.abc import Callable

from shoal.config import Serving
from shoal.config.speculation import AcceptanceRule, FlyRule, MarginRule, SemanticRule, TypicalRule
from shoal.engine.local import pick_device
from shoal.engine.pipeline.wire import TYPES
from shoal.engine.source import LocalModel
from shoal.engine.speculation.drafters import Drafters
from shoal.engine.speculation.drafting import Drafting
from shoal.engine.speculation.fly import Fly
from shoal.engine.speculation.margin import Margin
from shoal.engine.speculation.profile import Profile, load
from shoal.engine.speculation.rules import Rule
from shoal.engine.speculation.semantic import Semantic
from shoal.engine.speculation.speculating import Speculation
from shoal.engine.speculation.strict import Strict
from shoal.engine.speculation.typical import Typical
from shoal.errors import ConfigError
from shoal.planning.speculation import Pacer, Settings

NGRAM = "ngram"


def speculations(
    model: LocalModel, settings: Serving, draft: LocalModel | None
) -> Callable[[int, int], Speculation] | None:
    """Makes what drafts for a batch of so many sequences and tokens together; none where nothing shall.

    Args:
        draft: the head or the smaller model that the settings name; none for look-up.

    Raises:
        ConfigError: the rule is lossy and answers are recorded, or can't judge trees.
        ModelError: the drafter is damaged, or of another model.
        RecordError: the model's calibrated profile is damaged.
    """
    asked = settings.speculation
    if not asked.draft:
        return None
    rule = rule_of(asked.rule, load(model.directory))
    if rule.lossy and settings.capture:
        raise ConfigError(
            f"sessions are recorded to be trained on, and the rule {rule.name} changes what the model says.",
            "Use the rule strict, or leave out the capture.",
        )
    device = pick_device(settings.device)
    drafters = Drafters(draft, model, TYPES[settings.dtype], device, tree_width=asked.tree_width)

    def make(max_slots: int, max_tokens: int) -> Speculation:
        pacer = Pacer(Settings(most=asked.most))
        return Speculation(Drafting(drafters.make(max_slots, max_tokens), pacer, tree_width=asked.tree_width), rule)

    return make


def rule_of(asked: AcceptanceRule, profile: Profile) -> Rule:
    """The rule, with the model's calibrated threshold where none is given."""
    if isinstance(asked, MarginRule):
        own = profile.margin
        if asked.theta is None and own is not None and asked.form in (None, own.form):
            return Margin(own.value, own.form or "logits")
        return Margin(Margin.theta if asked.theta is None else asked.theta, asked.form or "logits")
    if isinstance(asked, SemanticRule):
        tau = asked.tau
        if tau is None:
            tau = Semantic.tau if profile.semantic is None else profile.semantic.value
        return Semantic(tau, asked.entropy_nats, asked.top1, asked.distance)
    if isinstance(asked, TypicalRule):
        return Typical(asked.epsilon, asked.delta)
    if isinstance(asked, FlyRule):
        return Fly(asked.window, asked.entropy_nats, asked.top_k)
    return Strict()
