"""How nodes talk: identity, tickets, and one connection object that carries requests, publications and streams.

The only room that knows Zenoh. It moves bytes and says who signed them; what the bytes mean is decided above.
`Fabric` (in `fabric.fabric`) is the way in; `Identity`, `Ticket` and `fabric.join` are what is needed beside it.

Invariants: plain TCP is used on loopback only; every request, reply and publication is an envelope signed by its
sender (`fabric.envelope`), and what is addressed to one node is sealed to it (`fabric.sealing`); every wait has a
deadline and every queue a bound; Zenoh's threads never touch asyncio objects except through `call_soon_threadsafe`,
and calls into Zenoh that may block run off the loop.

What is trusted: listeners and routers relay between the nodes that connect to them, and could drop or delay what they
relay (TLS is hop by hop); they cannot forge it, because envelopes are signed end to end, and of what is said to one
node they read only who, when and how much (docs/security.md). Liveliness is a hint and is not signed.
"""
