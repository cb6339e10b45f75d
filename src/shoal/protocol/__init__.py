"""Records that cross a process or reach a disk: what they hold, how they are encoded, how large they may be.

Every record is a frozen `msgspec.Struct`: MessagePack on the wire, JSON Lines on disk (`protocol.codec`).
This room does no I/O and imports no other room; nothing here is ever pickled. Whoever receives a record from
another machine decodes it with a byte limit and calls its `check()` before use where it has one.
"""
