"""What is remembered: memories that earn their place by replay, and keep it by being of use (SEDM, arXiv 2509.09498).

The life of a memory, one module a step: 1 A finished episode is packed into a self-contained, hashed context
(`records`, `replay`). 2 Extraction proposes entries and refuses leaks, injections and text that was itself recalled
(`extract`, `screening`). 3 Each entry is tried with and without on sibling tasks; a sequential test with
false-discovery control accepts, rejects or asks for more (`admission`). 4 What helps is retrieved by similarity times
weight (`index`), within a token budget and marked as recalled data (`recall`). 5 What happened after each use moves
the weight, merges, demotes, prunes (`controller`, pure). 6 Every change is an event; a memory's state is a pure fold
over the set of events that touch it (`events`, `state`), so two nodes that hold the same events hold the same
memories, and any event can be undone. 7 SQLite keeps the events (`store`); `keeper` is the one shell around it all.

Not here: running replays (the caller drives the environment with a model and hands trials in), the network (the
caller carries `events_since` and `receive`), and a learnt embedding model (`embedding.Embedder` is the seam).
"""
