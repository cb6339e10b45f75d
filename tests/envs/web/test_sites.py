"""Our sites without a browser: seeded, judged by state, and careful with what they are sent."""

from __future__ import annotations

from collections import Counter
from urllib.parse import urlencode

import pytest

from shoal.envs.web.gate import Request
from shoal.envs.web.sites.shop import Shop
from shoal.envs.web.sites.site import NUM_VISITORS, Refused
from shoal.envs.web.sites.template import Instance, same
from shoal.envs.web.sites.templates import SITES, TEMPLATES

SEEDS = range(12)


def test_there_are_enough_templates_of_each_level_and_site() -> None:
    assert len(TEMPLATES) >= 40 and len(SITES) == 5
    assert set(Counter(template.level for template in TEMPLATES.values())) == {1, 2, 3}
    assert all(
        len(template.words) > 1 and len(set(template.words)) == len(template.words) for template in TEMPLATES.values()
    )


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_seed_is_one_task_and_doing_nothing_is_not_enough(kind: str) -> None:
    template = TEMPLATES[kind]
    undone = 0
    for seed in SEEDS:
        one, other = Instance(template, seed), Instance(template, seed)
        assert one.instruction == other.instruction and one.site.state() == other.site.state()
        assert "{" not in one.instruction
        wanted = template.answer(template.site(seed), one.params)
        # What is asked for, done behind the pages, is right; with a wrong answer it is not.
        template.do(other.site, other.params)
        assert other.succeeded(wanted or "")
        assert wanted is None or not other.succeeded(f"not {wanted}")
        undone += not one.succeeded("")
    # A task may happen to ask for nothing (an article that was never edited): not often.
    assert undone >= len(SEEDS) - 3


@pytest.mark.parametrize("kind", TEMPLATES)
def test_with_content_of_its_own_a_site_is_the_same_and_its_tasks_differ(kind: str) -> None:
    template = TEMPLATES[kind]
    instances = [Instance(template, seed, 7) for seed in SEEDS]
    for one in instances:
        template.do(one.site, one.params)
        assert one.succeeded(one.wanted or "")
    assert len({one.instruction for one in instances}) > 1
    assert template.site(1, 7).state() == template.site(1, 7).state()
    others = {
        repr(vars(template.site(seed, 7)).get("accounts") or template.site(seed, 7).show([], {})) for seed in SEEDS
    }
    assert len(others) == 1, "the first page says the same whatever the seed"


@pytest.mark.parametrize("kind", ["shop", "booking"])
def test_a_site_with_content_of_its_own_has_few_visitors_and_says_which_one_it_is(kind: str) -> None:
    site = next(template.site for name, template in TEMPLATES.items() if name.startswith(f"{kind}/"))
    states: dict[str, set[str]] = {}
    for seed in range(60):
        one = site(seed, 7)
        page = one(Request("GET", site.host, "/", "", b"")).body.decode()
        assert f'aria-label="{one.visitor}"' in page
        states.setdefault(one.visitor, set()).add(repr(one.state()))
    assert len(states) == NUM_VISITORS and all(len(found) == 1 for found in states.values())
    assert len(set.union(*states.values())) == NUM_VISITORS, "each left something else behind"
    assert len({repr(site(seed).state()) for seed in range(20)}) == 20, "without content every episode is of its own"


@pytest.mark.parametrize("kind", TEMPLATES)
def test_another_instance_done_is_a_mistake(kind: str) -> None:
    template = TEMPLATES[kind]
    mistakes = 0
    for seed in SEEDS:
        instance, other = Instance(template, seed), Instance(template, seed + 100)
        try:
            template.do(instance.site, other.params)
        except (Refused, StopIteration, KeyError, IndexError):
            mistakes += 1  # What the other asks for is not there.
            continue
        answer = template.answer(template.site(seed + 100), other.params) or ""
        mistakes += not instance.succeeded(answer)
    assert mistakes >= len(SEEDS) / 2


@pytest.mark.parametrize(
    "site", dict.fromkeys(template.site for template in TEMPLATES.values()), ids=lambda site: site.host
)
def test_requests_without_sense_change_nothing(site: type[Shop]) -> None:
    one = site(3)
    before = repr(one.state())
    paths = [
        "/",
        "/nowhere",
        "/product/999/add",
        "/thread/0/99/like",
        "/account/0",
        "/book/-1",
        "/article/x/edit",
        "/%00",
    ]
    for path in [*paths, "/checkout", "/contact", "/new", "/settings/x", "/mine/0/cancel", "/orders/77/cancel"]:
        for method, body in (("GET", ""), ("POST", urlencode({"name": "<b>'\"", "count": "-1"})), ("POST", "%ff&&=;=")):
            response = one(Request(method, site.host, path, "q=%3Cb%3E&page=9999&sort=x", body.encode()))
            assert response.status in (200, 303, 400, 404)
            assert b"<b>" not in response.body
    assert repr(one.state()) == before


@pytest.mark.parametrize(
    "site", dict.fromkeys(template.site for template in TEMPLATES.values()), ids=lambda site: site.host
)
def test_a_form_is_answered_by_another_page_so_that_going_back_sends_none_again(site: type[Shop]) -> None:
    one = site(3)
    forms = ("/checkout", "/contact", "/new", "/new/cooking", "/book/0", "/product/0/add", "/settings")
    sent = [one(Request("POST", site.host, path, "", b"count=99")) for path in forms]
    refused = [response for response in sent if response.status == 303 and "/refused?" in response.location]
    assert refused and all(response.status in (303, 404) for response in sent)
    _, _, query = refused[0].location.partition("?")
    shown = one(Request("GET", site.host, "/refused", query, b""))
    assert shown.status == 200 and b"That did not work" in shown.body and b"<p></p>" not in shown.body


def test_answers_are_compared_without_dress() -> None:
    assert same(" £ 15. ", "15") and same("Ada  Cole", "ada cole") and not same("15 or 16", "15")
