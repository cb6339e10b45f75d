"""The call tree: what continues what, and that no token is lost, made twice, or tokenised again."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.codec import decode, encode
from shoal.protocol.episode import Episode, Task
from shoal.protocol.sampling import Completion
from shoal.rollout.calltree import ROOT, Call, CallTree

CONVERSATIONS = st.lists(st.lists(st.sampled_from("ab"), min_size=1, max_size=4), min_size=1, max_size=12)


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


def answer(text: str) -> Completion:
    return Completion(
        token_ids=ids_of(text), logprobs=(-0.5,) * len(text), versions=(3,) * len(text), finish="stop", text=text
    )


def ask(tree: CallTree, conversation: list[str], reply: str, setting: str = "") -> Call:
    """Render a conversation as the concatenation of its texts, and record the answer."""
    place = tree.place(conversation, setting)
    context = ids_of("".join(conversation[place.known :]))
    call = Call(place.parent, context, answer(reply), None, conversation[-1], (*conversation, reply), setting)
    tree.add(call)
    return call


def episode(tree: CallTree) -> Episode:
    return Episode(id="e", group="g", index=0, task=Task(env="t", id="t", seed=0), turns=tree.turns(), outcome="done")


@given(CONVERSATIONS)
def test_every_prompt_is_what_was_said_whatever_it_continues(conversations: list[list[str]]) -> None:
    tree = CallTree()
    for number, conversation in enumerate(conversations):
        ask(tree, conversation, "xy"[number % 2])
        assert tree.sequence(number) == ids_of("".join(conversation) + "xy"[number % 2])
    made = decode(encode(episode(tree)), Episode)
    assert sorted({turn for branch in made.branches for turn in branch}) == list(range(len(conversations)))
    assert made.longest == max(len(tree.sequence(number)) for number in range(len(conversations)))
    for branch in made.branches:
        ids = [i for n in branch for i in (*made.turns[n].context_ids, *made.turns[n].completion.token_ids)]
        assert tuple(ids) == tree.sequence(branch[-1])
    assert tree.num_tokens == sum(len(t.context_ids) + len(t.completion.token_ids) for t in made.turns)


def test_the_longest_known_beginning_is_continued() -> None:
    tree = CallTree()
    ask(tree, ["q"], "1")
    ask(tree, ["q", "1", "more"], "2")
    third = ask(tree, ["q", "1", "more", "2", "and"], "3")
    assert [call.parent for call in tree.calls] == [ROOT, 0, 1] and third.context_ids == ids_of("and")
    assert all(turn.after is None for turn in tree.turns()), "one conversation reads as one list"
    fork = ask(tree, ["q", "1", "other"], "4")
    edited = ask(tree, ["q", "7", "more"], "5")
    assert (fork.parent, edited.parent) == (0, ROOT)
    assert [turn.after for turn in tree.turns()] == [None, None, None, 0, -1]
    assert episode(tree).branches == ((0, 1, 2), (0, 3), (4,))


def test_another_setting_is_another_tree() -> None:
    tree = CallTree()
    ask(tree, ["q"], "1", "no tools")
    assert ask(tree, ["q", "1", "more"], "2", "tools").parent == ROOT


def test_texts_and_ids_continue_what_they_begin_with() -> None:
    tree = CallTree()
    tree.add(Call(ROOT, ids_of("one "), answer("two"), None, "one ", ("one ", "two"), "text"))
    place = tree.place_text("one two three", "text")
    assert (place.parent, place.known, place.ids) == (0, 7, ids_of("one two"))
    assert tree.place_text("one tw", "text").parent == ROOT
    assert tree.place_ids(ids_of("one two!"), "text").known == 7
    assert tree.place_ids(ids_of("one to"), "text").parent == ROOT


def test_what_is_redacted_is_gone_with_all_that_follows_it() -> None:
    tree = CallTree()
    ask(tree, ["open"], "1")
    ask(tree, ["open", "1", "my secret is 42"], "ok")
    ask(tree, ["open", "1", "my secret is 42", "ok", "go on"], "2")
    ask(tree, ["open", "1", "weather"], "3")
    ask(tree, ["another"], "the secret")
    kept = tree.without([re.compile("secret")])
    assert [call.shown for call in kept.calls] == ["open", "weather"]
    assert kept.sequence(1) == ids_of("open1weather3")
    assert b"secret" not in encode(episode(kept))
