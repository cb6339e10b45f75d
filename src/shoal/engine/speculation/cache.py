"""A key-value cache that a tree of drafts can be cut out of.

A round's tokens lie in their slot in the order of the tree's nodes. Of those, the accepted path is moved to the
positions that it has in the text; the rest is behind the sequence's end and will be overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence

from shoal.engine.cache import KVCache


class RoundCache(KVCache):
    """A `KVCache` whose slots can be cut to what was accepted."""

    def settle(self, slot: int, start: int, nodes: Sequence[int]) -> None:
        """Keep these of the entries from position `start` on, in this order, and forget the others.

        A beginning of them (an accepted chain) costs nothing.
        """
        if list(nodes) == list(range(len(nodes))):
            return
        source = [start + node for node in nodes]
        for store in (self._keys, self._values):
            for tensor in store:
                tensor[slot, :, start : start + len(source)] = tensor[slot, :, source]
