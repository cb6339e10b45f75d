"""What a world model is asked, and what it learns to answer."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from test_edit import PRINTED, pages

from dream_cases import category, episode, home, node
from shoal.envs.dream.dataset import (
    MAX_COPIES,
    MAX_SAME,
    MIN_SAME,
    Move,
    balanced,
    bound,
    done_examples,
    moves,
    next_examples,
    read_or_none,
    thinned,
    told_acts,
)
from shoal.envs.dream.edit import apply
from shoal.envs.dream.prompt import Sight, act_words, next_answer, next_question, reason, view
from shoal.envs.dream.world import predicted
from shoal.envs.web.actions import Click, GoBack, Select, Type
from shoal.envs.web.sites.shop import Shop
from shoal.envs.web.tree import Node, Page, estimate_tokens

SHOP = Shop(1, 3)


@given(pages(PRINTED), pages(PRINTED))
@settings(max_examples=40)
def test_the_answer_that_is_learnt_gives_the_page_that_came(before: Page, after: Page) -> None:
    for action in (Click("1"), Type("2", "x", True)):
        assert predicted(before, next_answer(before, action, after)).page == after


def test_a_long_page_is_shown_around_what_is_acted_on() -> None:
    rows = [node("link", f"row number {place}", str(10 + place)) for place in range(200)]
    menu = node("navigation", "", "5", [node("link", "Home", "6"), node("link", "Basket", "7")])
    page = Page(url="http://a.test/", root=node("RootWebArea", "Long", children=[menu, *rows]))
    shown, ids = view(page, "110", 200)
    assert estimate_tokens(shown) <= 230
    assert "[110] link 'row number 100'" in shown and "row number 5'" not in shown
    assert "[5] navigation" in shown and "Home" not in shown and "110" in ids
    opened, _ = view(page, "6", 200)
    assert "Home" in opened and "Basket" not in opened, "of a menu, what is meant is shown"


def test_of_a_link_less_is_shown_than_of_a_button() -> None:
    rows = [node("StaticText", f"line {place}") for place in range(60)]
    page = Page(
        url="u", root=node("RootWebArea", "x", children=[node("link", "On", "1"), *rows, node("button", "Go", "2")])
    )
    sight = Sight(page_tokens=300, link_tokens=60)
    (onward, _), (sent, _) = (next_question("Do it.", page, Click(id_), sight) for id_ in "12")
    assert 0 < onward.count("line ") < sent.count("line ") < 60


def test_a_field_needs_less_of_the_page() -> None:
    page = category(SHOP, "Kitchen")
    extra = node("textbox", "Search", "40")
    page = Page(url=page.url, root=Node(role="RootWebArea", name="Kitchen", children=(*page.root.children, extra)))
    sight = Sight(page_tokens=400, field_tokens=40)
    filled, _ = next_question("Find it.", page, Type("40", "mug", False), sight)
    sent, ids = next_question("Find it.", page, Type("40", "mug", True), sight)
    assert len(filled) < len(sent)
    assert "type [40] textbox 'Search' [mug] [1]" in sent
    assert set(ids) >= {"5", "6", "40"}


def test_reasons_say_what_is_acted_on_and_what_it_leads_to() -> None:
    first, second = home(), category(SHOP, "Kitchen")
    assert reason(first, Click("12"), second) == "The link 'Kitchen' leads to 'Kitchen'."
    assert reason(first, Click("12"), first) == "Nothing changes."
    box = node("checkbox", "Active", "8")
    before = Page(url="u", root=node("RootWebArea", "x", children=[box]))
    after = Page(
        url="u", root=node("RootWebArea", "x", children=[node("checkbox", "Active", "8", states=("checked",))])
    )
    assert reason(before, Click("8"), after) == "The checkbox 'Active' is checked now."
    listed = node("combobox", "Role", "3", [node("option", "Editor", "4")], value="Editor")
    held = Page(url="u", root=node("RootWebArea", "x", children=[box, listed]))
    assert reason(before, Select("3", "Editor"), held) == "The page changes."
    assert act_words(Click("99"), before) == "click [99]"


def test_examples_of_an_episode() -> None:
    one = episode(5)
    examples = list(next_examples([one], Sight()))
    assert [example.ask for example in examples] == ["next", "next"]
    assert examples[0].prompt.endswith("What does the act change on the page?")
    for move, example in zip(moves(one), examples, strict=True):
        assert move.changed
        assert predicted(move.before, example.completion).page == move.after
        assert apply(predicted(move.before, example.completion).script, move.before) == move.after
    assert balanced(examples) == examples, "what was seen once may be no part of the site"
    assert Counter(one.completion for one in balanced(examples * 2)) == {one.completion: MIN_SAME for one in examples}
    done = [(example.completion, "stop [" in example.prompt) for example in done_examples([one], Sight())]
    assert done == [("yes", True), ("no", True)]
    assert told_acts(one, 1)[0].startswith("click [") and "link '" in told_acts(one, 1)[0]
    assert len(thinned(examples * 5)) == 2 * MAX_COPIES
    for_other_tasks = [replace(one, prompt=one.prompt.replace("\nTask: ", "\nTask: Please. ")) for one in examples]
    assert len(thinned([*examples * MAX_COPIES, *for_other_tasks])) == 2 * MAX_COPIES
    elsewhere = [replace(examples[0], prompt=f"{place}{examples[0].prompt}") for place in range(2 * MAX_SAME)]
    assert len(thinned(elsewhere)) == MAX_SAME
    failed = [example.completion for example in done_examples([episode(5, reward=0.0)], Sight())]
    assert failed == ["no"]


def test_another_task_of_the_same_kind_is_not_done() -> None:
    answers = [example.completion for example in done_examples([episode(n) for n in range(12)], Sight())]
    assert answers.count("yes") == 12 and answers.count("no") > 12


def test_what_was_seen_can_be_known_and_what_was_not_cannot() -> None:
    known = [move for n in range(40) for move in moves(episode(n))]
    asked = list(moves(episode(100)))
    full = bound(known, asked)
    assert full.transitions == 2 and full.determined == 1.0 and full.edit_f1 == 1.0
    assert full.unknown == ()
    nothing = bound([], asked)
    assert nothing.determined == 0.0 and 0 < nothing.edit_f1 < 1
    assert {(one.kind, one.unknown, one.transitions) for one in nothing.unknown} == {("shop/price_of", 1, 1)}
    assert all(one.act.startswith("click link '") and one.atom for one in nothing.unknown)


def test_going_back_is_known_where_the_page_is_as_it_was_left() -> None:
    first, second = home(), category(SHOP, "Kitchen")
    move = Move("e", 1, "shop/x", "Look.", second, GoBack(), first, first)
    assert bound([], [move]).determined == 1.0
    assert bound([], [replace(move, back=second)]).determined == 0.0


@pytest.mark.parametrize("text", ["", "what is this", "click"])
def test_a_reply_may_be_no_act(text: str) -> None:
    assert read_or_none(text) is None
