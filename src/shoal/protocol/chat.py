"""What is said in a conversation: messages, before any tokenizer sees them."""

from __future__ import annotations

from typing import Literal

from shoal.protocol.codec import Record

Role = Literal["system", "user", "assistant", "tool"]


class Message(Record, frozen=True):
    """One message of a conversation; `content` is plain text."""

    role: Role
    content: str
