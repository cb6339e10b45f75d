"""Which sealing key a node has at present: asked once, signed by the node, kept until it turns out to be an old one.

    asker ── request on node/<id>/hello ──▶ node          the one request to a single node that is not sealed
    asker ◀── its public sealing key, signed ── node      (`fabric.envelope`: bound to this request's nonce)

Whoever receives a sealed request learns the asker's key from it and need not ask. A node that was started again has
another key: it refuses what is sealed to the old one, the asker forgets that and asks anew (`fabric.call`).

Invariant: a key is kept for a node only if the node signed it.
"""

from __future__ import annotations

from collections import OrderedDict

from shoal.fabric.identity import node_id_of

MAX_KNOWN = 4096
"""Nodes whose sealing keys are kept; one that is forgotten is asked again."""


def hello_key(public_key: bytes) -> str:
    """Where the node with this identity tells its sealing key."""
    return f"node/{node_id_of(public_key)}/hello"


class KnownKeys:
    """Sealing keys by their nodes' public keys, the latest used kept longest."""

    def __init__(self, capacity: int = MAX_KNOWN) -> None:
        self._capacity = capacity
        self._keys: OrderedDict[bytes, bytes] = OrderedDict()

    def get(self, node: bytes) -> bytes | None:
        """The node's sealing key as far as it is known."""
        if node in self._keys:
            self._keys.move_to_end(node)
        return self._keys.get(node)

    def learn(self, node: bytes, sealing_key: bytes) -> None:
        """Keep what the node signed."""
        self._keys[node] = sealing_key
        self._keys.move_to_end(node)
        if len(self._keys) > self._capacity:
            self._keys.popitem(last=False)

    def forget(self, node: bytes, sealing_key: bytes) -> None:
        """The node does not have this key any more."""
        if self._keys.get(node) == sealing_key:
            del self._keys[node]
