"""Talk to models: any version of a run or model of a server, two side by side, with and without drafts."""

from __future__ import annotations

from collections.abc import Mapping

from shoal.serving.console.answers import MAX_TOKENS
from shoal.serving.console.house import House
from shoal.serving.console.html import Markup, empty, join, tag, void

SIDES = ("left", "right")
NO_DRAFT = "no drafts"


def render(house: House, query: Mapping[str, str]) -> Markup:
    """The page's parts; the script fills them in."""
    choices = house.voices.choices()
    if not choices:
        return empty(
            "There is nobody to talk to here.", "Name a run that has published a version, or a server's address."
        )
    asked = [query.get(side, "") for side in SIDES]
    last = choices[min(1, len(choices) - 1)]
    chosen = [asked[0] if asked[0] in choices else choices[0], asked[1] if asked[1] in choices else last]
    sides = [_side(side, choices, voice, house.voices.drafters) for side, voice in zip(SIDES, chosen, strict=True)]
    settings = tag(
        "div",
        _number("temperature", "temperature", value="0.7", min="0", max="2", step="0.1"),
        _number("tokens at most", "max_tokens", value="128", min="1", max=str(MAX_TOKENS)),
        _number("seed", "seed", min="0", placeholder="any"),
        class_="settings",
    )
    words = tag("textarea", name="words", rows="3", placeholder="Say something …", aria_label="Message", required="")
    send = tag("button", "Ask both", type="submit")
    hint = tag("p", "Ctrl+Enter asks. A version of a run is put together and served the first time, which takes some"
               " seconds.", class_="soft")  # fmt: skip
    form = tag("form", words, settings, tag("p", send, hint, class_="send"), data_say="")
    # Its parts are never replaced while somebody writes: nothing here changes by itself.
    return tag("section", form, tag("div", *sides, class_="sides"), class_="part", data_part="playground", data_keep="")


def _side(side: str, choices: list[str], chosen: str, drafters: tuple[str, ...]) -> Markup:
    options = [_option(choice, choice == chosen) for choice in choices]
    drafts = [tag("option", NO_DRAFT, value=""), *(tag("option", f"drafts: {one}", value=one) for one in drafters)]
    return tag(
        "div",
        tag("select", *options, name="voice", aria_label=f"Model, {side}"),
        tag("select", *drafts, name="draft", aria_label=f"Speculative decoding, {side}") if drafters else join([]),
        tag("pre", "", class_="said answer", aria_live="polite"),
        tag("p", "", class_="soft took"),
        class_="side",
        data_side=side,
    )


def _option(choice: str, is_chosen: bool) -> Markup:
    return tag("option", choice, value=choice, **({"selected": ""} if is_chosen else {}))


def _number(label: str, name: str, **limits: str) -> Markup:
    return tag("label", tag("span", label), void("input", type="number", name=name, **limits))
