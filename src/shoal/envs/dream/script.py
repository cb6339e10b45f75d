"""A script of edits as text, and the grammar that lets nothing else be written.

    navigate 'http://shop.test/basket'
    remove [14]
    remove [12.0]
    set [root] name 'Basket'
    set [21] states 'checked focused'
    insert [root] 1
        [30] link 'Check out'
                StaticText 'now'

    load 'http://shop.test/product/3' 'Green Bowl'
        [5] keep ''
        [10] heading 'Green Bowl'

Nothing changed is `same`. Invariants: `read_script(write_script(s)) == s`; whatever the grammar lets through is a
script, names no old element but those it was made for, gives new ones none but known roles and states, and stays on
the page's site. That it fits the page as well is `apply`'s to say, or to mend (`strict=False`): an edit can make a
later one pointless.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from shoal.envs.dream.edit import (
    FIELDS,
    KEEP,
    MAX_EDITS,
    ROOT,
    Edit,
    EditError,
    Field,
    Insert,
    Load,
    Navigate,
    Remove,
    Script,
    Set,
    diff,
    load,
)
from shoal.envs.web.listed import listed
from shoal.envs.web.tree import QUOTED, Page, estimate_tokens, quote, read_nodes, unquote
from shoal.protocol.sampling import Grammar

SAME = "same"
MAX_SCRIPT_CHARS = 1 << 20
MAX_INSERT_DEPTH = 8
MUCH_LONGER = 2
"""Times as long as its edits: then another document is said by edits all the same."""
"""How deep the grammar lets an inserted tree be."""
MAX_WORDS_CHARS = 160
"""The grammar lets no longer text be written."""
ROLES = frozenset(
    listed(
        """link button heading textbox searchbox spinbutton combobox listbox option checkbox radio switch slider form
    navigation table row cell gridcell columnheader rowheader image list listitem generic group radiogroup tab tablist
    tabpanel menu menubar menuitem dialog alert status log article banner main region search figure separator
    progressbar tree treeitem Date DateTime InputTime paragraph StaticText"""
    )
)
"""Roles that the grammar lets a new element have, beside those of the page."""
STATES = listed(
    """checked collapsed disabled expanded focused invalid mixed modal multiline multiselectable pressed readonly
    required selected clickable"""
)

_TARGET = r"\[((?:root|[A-Za-z0-9]{1,16})(?:\.[0-9]{1,5})?)\]"
_NAVIGATE = re.compile(rf"navigate ({QUOTED})")
_REMOVE = re.compile(rf"remove {_TARGET}")
_SET = re.compile(rf"set {_TARGET} ({'|'.join(FIELDS)}) ({QUOTED})")
_LOAD = re.compile(rf"load ({QUOTED}) ({QUOTED})")
_INSERT = re.compile(r"insert \[(root|[A-Za-z0-9]{1,16})\] ([0-9]{1,5})")


def brief(before: Page, after: Page) -> Script:
    """The change from one page to the other as it is said best: edits one by one, or another document.

    What has another address or title is another document unless that takes far more words; else fewer words decide.
    """
    edits, whole = diff(before, after), load(before, after)
    if whole is None:
        return edits
    another = (after.url.partition("#")[0], after.title) != (before.url.partition("#")[0], before.title)
    words = estimate_tokens(write_script(edits)) * (MUCH_LONGER if another else 1)
    return edits if words <= estimate_tokens(write_script((whole,))) else (whole,)


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
            case Load(url, title, nodes):
                lines.append(f"load {quote(url)} {quote(title)}")
                lines += [line for node in nodes for line in node.lines(1)]
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
        end = at
        while end < len(lines) and lines[end].startswith("\t"):
            end += 1
        if found := _INSERT.fullmatch(line):
            nodes = read_nodes([one[1:] for one in lines[at:end]])
            if len(nodes) != 1:
                raise EditError("an insertion has exactly one node.")
            edits.append(Insert(found[1], int(found[2]), nodes[0]))
            at = end
        elif found := _LOAD.fullmatch(line):
            nodes = read_nodes([one[1:] for one in lines[at:end]])
            edits.append(Load(unquote(found[1]), unquote(found[2]), tuple(nodes)))
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


def script_grammar(page: Page, ids: Sequence[str] | None = None, *, reason_chars: int = 0) -> Grammar:
    """What the script of a change of this page must be.

    Args:
        ids: the elements that may be named; by default all of the page.
        reason_chars: the script comes after one line of at most so many characters; 0: there is no such line.
    """
    known = [node.id for node in page.root.walk() if node.id]
    old = "|".join(known if ids is None else ids)
    named = f"{ROOT}|{old}" if old else ROOT
    letters = rf"([^'\\\x00-\x1f]|\\[\\'nrt]){{0,{MAX_WORDS_CHARS}}}"
    origin = re.match(r"[a-z]+://[^/]*", page.url)
    site = re.escape(quote(origin[0])[1:-1]).replace("/", "\\/") if origin else ""
    roles = "|".join(sorted((ROLES | {node.role for node in page.root.walk()}) - {KEEP}))
    states = "|".join(STATES)
    node = rf"(\[[0-9]{{1,5}}\] )?({roles}) '{letters}'(, value='{letters}')?(, ({states})){{0,4}}"
    if old:
        node += rf"|\[({old})\] {KEEP} ''"
    reason = rf"REASON: /[^\x00-\x1f]{{1,{reason_chars}}}/"
    start = f'"{SAME}" | LOAD n1* | edit ("\\n" edit)*'
    lines = [
        *([f'start: REASON "\\n" ({start})', reason] if reason_chars else [f"start: {start}"]),
        "edit: NAVIGATE | REMOVE | SET | INSERT n1",
        rf"LOAD: /load '{site}{letters}' '{letters}'/",
        rf"NAVIGATE: /navigate '{site}{letters}'/",
        rf"REMOVE: /remove \[({named})(\.[0-9]{{1,4}})?\]/",
        rf"SET: /set \[({named})(\.[0-9]{{1,4}})?\] ((name|value) '{letters}'|role '({roles})'"
        rf"|states '(({states})( ({states})){{0,3}})?')/",
        rf"INSERT: /insert \[({named})\] [0-9]{{1,4}}/",
        f"NODE: /{node}/",
    ]
    for depth in range(1, MAX_INSERT_DEPTH + 1):
        tabs = r"\t" * depth
        below = f" n{depth + 1}*" if depth < MAX_INSERT_DEPTH else ""
        lines.append(f'n{depth}: "\\n{tabs}" NODE{below}')
    return Grammar(kind="lark", text="\n".join(lines))
