"""A script of edits as text, and the grammar that lets nothing else be written.

    navigate 'http://shop.test/basket'
    remove [14]
    remove [12.0]
    set [root] name 'Basket'
    set [21] states 'checked focused'
    insert [root] 1
        [30] link 'Check out'
                StaticText 'now'

Nothing changed is `same`. Invariants: `read_script(write_script(s)) == s`; whatever the grammar lets through is a
script, and names no element but those of the page it was made for. That it fits the page as well is `apply`'s to say,
or to mend (`strict=False`): an edit can make a later one pointless.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from shoal.envs.dream.edit import FIELDS, MAX_EDITS, ROOT, Edit, EditError, Field, Insert, Navigate, Remove, Script, Set
from shoal.envs.web.tree import QUOTED, Page, quote, read_nodes, unquote
from shoal.protocol.sampling import Grammar

SAME = "same"
MAX_SCRIPT_CHARS = 1 << 20
MAX_INSERT_DEPTH = 8
"""How deep the grammar lets an inserted tree be."""
MAX_WORDS_CHARS = 120
"""The grammar lets no longer text be written."""

_TARGET = r"\[((?:root|[A-Za-z0-9]{1,16})(?:\.[0-9]{1,5})?)\]"
_NAVIGATE = re.compile(rf"navigate ({QUOTED})")
_REMOVE = re.compile(rf"remove {_TARGET}")
_SET = re.compile(rf"set {_TARGET} ({'|'.join(FIELDS)}) ({QUOTED})")
_INSERT = re.compile(r"insert \[(root|[A-Za-z0-9]{1,16})\] ([0-9]{1,5})")


def write_script(script: Sequence[Edit]) -> str:
    """The script, one edit after another."""
    lines: list[str] = []
    for edit in script:
        match edit:
            case Navigate(url):
                lines.append(f"navigate {quote(url)}")
            case Remove(target):
                lines.append(f"remove [{target}]")
            case Set(target, which, value):
                lines.append(f"set [{target}] {which} {quote(value)}")
            case Insert(parent, index, node):
                lines.append(f"insert [{parent}] {index}")
                lines += node.lines(1)
    return "\n".join(lines) or SAME


def read_script(text: str) -> Script:
    """The script that `write_script` wrote.

    Raises:
        EditError: it is none.
    """
    if len(text) > MAX_SCRIPT_CHARS:
        raise EditError(f"a script has more than {MAX_SCRIPT_CHARS} characters.")
    if text == SAME:
        return ()
    edits: list[Edit] = []
    lines = text.split("\n")
    at = 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if found := _INSERT.fullmatch(line):
            end = at
            while end < len(lines) and lines[end].startswith("\t"):
                end += 1
            nodes = read_nodes([one[1:] for one in lines[at:end]])
            if len(nodes) != 1:
                raise EditError("an insertion has exactly one node.")
            edits.append(Insert(found[1], int(found[2]), nodes[0]))
            at = end
        else:
            edits.append(_read_line(line))
        if len(edits) > MAX_EDITS:
            raise EditError(f"a script has more than {MAX_EDITS} edits.")
    return tuple(edits)


def _read_line(line: str) -> Edit:
    if found := _NAVIGATE.fullmatch(line):
        return Navigate(unquote(found[1]))
    if found := _REMOVE.fullmatch(line):
        return Remove(found[1])
    if found := _SET.fullmatch(line):
        which: Field = next(one for one in FIELDS if one == found[2])
        return Set(found[1], which, unquote(found[3]))
    raise EditError(f"{line[:80]!r} is no edit.")


def script_grammar(page: Page) -> Grammar:
    """What the script of a change of this page must be."""
    ids = "|".join([ROOT, *(node.id for node in page.root.walk() if node.id)])
    quoted = rf"'([^'\\\x00-\x1f]|\\[\\'nrt]){{0,{MAX_WORDS_CHARS}}}'"
    node = rf"(\[[0-9]{{1,5}}\] )?[A-Za-z]{{1,24}} {quoted}(, value={quoted})?(, [a-z]{{2,20}}){{0,4}}"
    lines = [
        f'start: "{SAME}" | edit ("\\n" edit)*',
        "edit: NAVIGATE | REMOVE | SET | INSERT n1",
        f"NAVIGATE: /navigate {quoted}/",
        rf"REMOVE: /remove \[({ids})(\.[0-9]{{1,4}})?\]/",
        rf"SET: /set \[({ids})(\.[0-9]{{1,4}})?\] (role|name|value|states) {quoted}/",
        rf"INSERT: /insert \[({ids})\] [0-9]{{1,4}}/",
        f"NODE: /{node}/",
    ]
    for depth in range(1, MAX_INSERT_DEPTH + 1):
        tabs = r"\t" * depth
        below = f" n{depth + 1}*" if depth < MAX_INSERT_DEPTH else ""
        lines.append(f'n{depth}: "\\n{tabs}" NODE{below}')
    return Grammar(kind="lark", text="\n".join(lines))
