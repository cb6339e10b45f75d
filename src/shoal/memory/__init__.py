"""What is remembered: memories that earn their place by replay, and keep it by being of use (SEDM, arXiv 2509.09498).

The life of a memory, one module a step: 1 A finished episode is packed into a self-contained, hashed context
(`records`, `replay`). 2 Extraction proposes entries and refuses leaks, injections and text that was itself recalled
(`learning`, `extract`, `screening`). 3 Each entry is tried with and without on sibling tasks, here (`trials`) or leased
to other nodes (`leasing`, `replayer`); a sequential test with false-discovery control accepts, rejects or asks for more
(`admission`). 4 What helps is retrieved by similarity times weight (`retrieval`, `index`), within a token budget and
marked as recalled data (`recall`), and put before what a task asks (`recalling`). 5 What happened after each use moves
the weight, merges, demotes, prunes (`controller`, pure). 6 Every change is an event, signed by its node (`signing`); a
memory's state is a pure fold over the set of events that touch it (`events`, `state`), so two nodes that hold the same
events hold the same memories, and any event can be undone. 7 SQLite keeps the events (`store`); `keeper` is the one
shell around it all. 8 Nodes exchange events (`sharing`) and replay what others admitted before they use it
(`verifying`); `node` is a node's whole part in a run.

Public sets and their metrics are in `public`. Not here: a learnt embedding model (`embedding.Embedder` is the seam).
"""
