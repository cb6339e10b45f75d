"""Signed envelopes: who says what, on which key, to whom, when; and whether to believe it.

    attachment = MessagePack(header) + signature (64 bytes)
    signature  = Ed25519 over  "shoal envelope 1" + header bytes + BLAKE3(body)

The body travels beside the attachment, uncopied; where the header names sealing keys it is sealed (`fabric.sealing`),
and sealed first, then signed. Pure: time is an argument and nothing here does I/O.

Invariants: an envelope is believed only if its signature is its sender's, its key is the one it arrived on, its kind
is the one expected, it is addressed to the reader or to nobody in particular, a request or publication was sent
within `CLOCK_WINDOW_S` of now and was not seen before, and a reply answers the very request it came back on. What is
addressed to one node is sealed to it, but for the hello that tells the key (`fabric.hello`).

Not covered: a reader that restarts forgets the nonces it saw, so for `CLOCK_WINDOW_S` after a restart old envelopes
could be played to it again; whoever acts on requests makes that harmless (submissions are idempotent, leases named).
"""

from __future__ import annotations

import math
import secrets
from typing import ClassVar, Literal, NamedTuple

import msgspec
from blake3 import blake3

from shoal.fabric.errors import REFUSAL_KINDS, EnvelopeError, RefusalKind, RemoteError
from shoal.fabric.identity import PUBLIC_KEY_BYTES, Identity, node_id_of, verify
from shoal.fabric.sealing import PRINT_BYTES, PUBLIC_BYTES, SealError, SealingKey, key_print
from shoal.protocol.roster import SIGNATURE_BYTES

ENVELOPE_VERSION = 1
DOMAIN = b"shoal envelope 1"
NONCE_BYTES = 16
MAX_ATTACHMENT_BYTES = 2048
MAX_KEY_CHARS = 512

CLOCK_WINDOW_S = 300.0
"""How far the sender's clock plus the time of transfer may be from ours; wide, because volunteers' clocks drift."""

MAX_NONCES = 1 << 18
"""Nonces remembered at once (about 40 MB). Beyond it the oldest is forgotten; only admitted senders fill it."""

Kind = Literal["request", "reply", "refusal", "publication"]


class Header(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What is signed besides the body. `version` comes first, so that any version can be read and named."""

    version: int
    kind: Kind
    key: str
    sender: bytes
    """Raw public key."""
    nonce: bytes
    sent_at: float
    """Unix seconds on the sender's clock."""
    to: bytes = b""
    """Public key of the only node that may act on a request; empty: whoever serves the key."""
    answers: bytes = b""
    """In a reply or refusal, the nonce of the request."""
    deadline_s: float = 0.0
    """In a request, how long the sender waits for the answer."""
    sealed_by: bytes = b""
    """Where the body is sealed: the sender's public sealing key, with which the answer is to be sealed as well."""
    sealed_to: bytes = b""
    """Where the body is sealed: the print of the sealing key that opens it."""

    @property
    def node_id(self) -> str:
        return node_id_of(self.sender)


class Seal(NamedTuple):
    """With which key to seal, and for which."""

    own: SealingKey
    other: bytes
    """The reader's public sealing key."""


class Envelope(NamedTuple):
    """What travels."""

    header: Header
    attachment: bytes
    body: bytes
    """Sealed, where the header says so."""


def write_envelope(
    identity: Identity,
    kind: Kind,
    key: str,
    body: bytes,
    *,
    now: float,
    to: bytes = b"",
    answers: bytes = b"",
    deadline_s: float = 0.0,
    seal: Seal | None = None,
) -> Envelope:
    """Sign `body`, and seal it where `seal` says for whom.

    Raises:
        SealError: the reader's sealing key cannot be used.
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    sealed_by, sealed_to = (seal.own.public_key, key_print(seal.other)) if seal else (b"", b"")
    header = Header(
        ENVELOPE_VERSION, kind, key, identity.public_key, nonce, now, to, answers, deadline_s, sealed_by, sealed_to
    )
    encoded = msgspec.msgpack.encode(header)
    if seal is not None:
        body = seal.own.pair(seal.other).seal(body, nonce, encoded)
    return Envelope(header, encoded + identity.sign(DOMAIN + encoded + blake3(body).digest()), body)


def open_body(header: Header, attachment: bytes, body: bytes, own: SealingKey) -> bytes:
    """The plaintext of a checked envelope's body.

    Raises:
        EnvelopeError: it is sealed to another key (an earlier life's of this node), or does not open.
    """
    if not header.sealed_by:
        return body
    if header.sealed_to != own.print:
        raise EnvelopeError("seal", "a message is sealed to another key than this node's present one.")
    try:
        return own.pair(header.sealed_by).open(body, header.nonce, attachment[:-SIGNATURE_BYTES])
    except SealError as error:
        raise EnvelopeError("seal", error.problem) from None


def read_header(attachment: bytes) -> Header:
    """The header in an attachment, its signature not yet checked.

    Raises:
        EnvelopeError: malformed, or of another version.
    """
    if not SIGNATURE_BYTES < len(attachment) <= MAX_ATTACHMENT_BYTES:
        raise EnvelopeError("malformed", "a message carries no envelope.")
    encoded = attachment[:-SIGNATURE_BYTES]
    try:
        fields = msgspec.msgpack.decode(encoded, type=list[msgspec.Raw])
        version = msgspec.msgpack.decode(fields[0], type=int) if fields else 0
        if version != ENVELOPE_VERSION:
            raise EnvelopeError(
                "version",
                f"a message has envelope version {version}; this node reads version {ENVELOPE_VERSION}.",
                "Run the same version of Shoal on every node.",
            )
        header = msgspec.msgpack.decode(encoded, type=Header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError):
        raise EnvelopeError("malformed", "a message's envelope cannot be read.") from None
    if (
        len(header.sender) != PUBLIC_KEY_BYTES
        or len(header.nonce) != NONCE_BYTES
        or len(header.to) not in (0, PUBLIC_KEY_BYTES)
        or len(header.answers) not in (0, NONCE_BYTES)
        or (len(header.sealed_by), len(header.sealed_to)) not in ((0, 0), (PUBLIC_BYTES, PRINT_BYTES))
        or len(header.key) > MAX_KEY_CHARS
        or not math.isfinite(header.sent_at)
        or not (math.isfinite(header.deadline_s) and header.deadline_s >= 0)
    ):
        raise EnvelopeError("malformed", "a message's envelope has a field of the wrong length or range.")
    return header


def check_envelope(header: Header, attachment: bytes, body: bytes, *, kinds: tuple[Kind, ...], key: str) -> None:
    """Check kind, key and signature of an envelope; its age is `ReplayGuard`'s, its audience the reader's.

    Raises:
        EnvelopeError: it must not be believed.
    """
    if header.kind not in kinds or header.key != key:
        raise EnvelopeError("key", f"a {header.kind} signed for {header.key!r} arrived on {key!r}.")
    signed = DOMAIN + attachment[:-SIGNATURE_BYTES] + blake3(body).digest()
    if not verify(header.sender, signed, attachment[-SIGNATURE_BYTES:]):
        raise EnvelopeError("signature", "a message's signature is not its sender's.")


class ReplayGuard:
    """Remembers nonces while their envelopes are still young enough to be believed."""

    def __init__(self, window_s: float = CLOCK_WINDOW_S, capacity: int = MAX_NONCES) -> None:
        self.window_s = window_s
        self.capacity = capacity
        self.num_forgotten = 0
        """Nonces dropped before their time because there were too many."""
        self._until: dict[bytes, float] = {}

    def admit(self, header: Header, now: float) -> None:
        """Let a checked envelope pass once.

        Raises:
            EnvelopeError: it is too old, too far in the future, or was seen before.
        """
        skew_s = header.sent_at - now
        if abs(skew_s) > self.window_s:
            raise EnvelopeError(
                "clock",
                f"a message's time is {abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} this node's clock; "
                f"{self.window_s:.0f} s are allowed.",
                "Set the clocks of both machines (for instance with NTP).",
            )
        # Equal lifetimes keep the dict in order of expiry, so that only its front is ever looked at.
        while self._until and next(iter(self._until.values())) <= now:
            del self._until[next(iter(self._until))]
        mark = header.sender[:16] + header.nonce
        if mark in self._until:
            raise EnvelopeError("replay", "a message arrived a second time.")
        if len(self._until) >= self.capacity:
            del self._until[next(iter(self._until))]
            self.num_forgotten += 1
        self._until[mark] = now + 2 * self.window_s


class Refusal(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Body of a refusal: why, in a word and in words."""

    kind: str
    problem: str
    remedy: str = ""
    error_type: str = ""

    MAX_CHARS: ClassVar[int] = 4096

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def of(cls, kind: RefusalKind, problem: str, remedy: str = "", error_type: str = "") -> Refusal:
        return cls(kind, problem[: cls.MAX_CHARS], remedy[: cls.MAX_CHARS], error_type[:64])

    @classmethod
    def to_error(cls, body: bytes) -> RemoteError:
        """The error that the asker raises for a refusal with this body."""
        try:
            refusal = msgspec.msgpack.decode(body[: 16 * cls.MAX_CHARS], type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return RemoteError("malformed", "the other node refused a request without a readable reason.")
        kind: RefusalKind = refusal.kind if refusal.kind in REFUSAL_KINDS else "refused"  # type: ignore[assignment]
        return RemoteError(kind, refusal.problem, refusal.remedy, refusal.error_type)
