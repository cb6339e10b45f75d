"""A choice's text while it streams: reasoning and content apart, and nothing shown that may become a tool call.

Invariant: what was shown as content, then `rest`, is the content that `Dialect.read` finds in the whole text, but for
white space around calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from shoal.serving.dialect import THINK, THOUGHT, Call, Dialect
from shoal.serving.schema import Tool


class Reader:
    """Takes one choice's pieces.

    Args:
        thinking: the prompt ended inside of a thought already.
    """

    def __init__(self, dialect: Dialect, tools: Sequence[Tool], *, thinking: bool) -> None:
        self._dialect, self._tools = dialect, tools
        self._state: Literal["start", "thought", "content"] = "start" if dialect.thinks else "content"
        self._text = THINK if thinking else ""
        self._buffer = self._text
        self._shown = ""
        self._after_thought = False

    def push(self, text: str) -> tuple[str, str]:
        """Reasoning and content that are certain now."""
        self._text += text
        self._buffer += text
        reasoning = content = ""
        if self._state == "start":
            begun = self._buffer.lstrip()
            if begun.startswith(THINK):
                self._state, self._buffer = "thought", begun.removeprefix(THINK).lstrip()
            elif not THINK.startswith(begun):
                self._state = "content"
        if self._state == "thought":
            thought, found, after = self._buffer.partition(THOUGHT)
            if found:
                reasoning, self._buffer, self._state = thought.rstrip(), after, "content"
                self._after_thought = True
            else:
                certain = len(thought) - max(_begun(thought, THOUGHT), len(thought) - len(thought.rstrip()))
                reasoning, self._buffer = thought[:certain], thought[certain:]
        if self._state == "content":
            content = self._content()
        return reasoning, content

    def rest(self) -> tuple[str, tuple[Call, ...]]:
        """At the end: content not shown yet, and the calls."""
        reply = self._dialect.read(self._text, self._tools)
        if reply.calls:
            return "", reply.calls
        return reply.content[len(self._shown) :] if reply.content.startswith(self._shown) else "", ()

    def _content(self) -> str:
        if self._after_thought and not self._shown:
            self._buffer = self._buffer.lstrip("\n")
        opening = self._dialect.opening
        certain = len(self._buffer)
        if self._tools and self._dialect.family == "hermes":
            at = self._buffer.find(opening)
            certain = at if at >= 0 else certain - _begun(self._buffer, opening)
        elif self._tools and not self._shown and self._buffer.lstrip()[:1] in ("", opening):
            certain = 0
        shown, self._buffer = self._buffer[:certain], self._buffer[certain:]
        self._shown += shown
        return shown


def _begun(text: str, end: str) -> int:
    """How many characters at the end of `text` may be the beginning of `end`."""
    return max((n for n in range(1, min(len(end), len(text) + 1)) if text.endswith(end[:n])), default=0)
