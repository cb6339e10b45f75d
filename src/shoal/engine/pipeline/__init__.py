"""A model whose layers are on several machines: the same engine, whose forward pass goes around a ring.

    requester                                         stages
    lane 0: batcher ─┐                    ┌──▶ stage 0 ── hidden ──▶ stage 1 ── … ──▶ stage k-1 ─┐
    lane 1: batcher ─┼─ ids, cache ops ───┘    layers [0,a) + embedding           last + norm    │
    lane M: batcher ─┘◀─────────────── hidden states of the tokens asked about ──────────────────┘
             └─ head, shaping, sampling

A lane is a whole local engine (`lanes`): batcher, thread, sequences. Only its decoder and its cache are stand-ins
(`remote`): a forward pass becomes one step around the ring (`ring`), which carries what the lane's cache did since the
last one, so that every stage's cache (`stage`) does the same to its own layers. M lanes keep M batches under way, each
in another stage. The tail answers straight to the requester, which has the head and draws: a hidden state is 30 to 150
times smaller than its logits, and grammars, penalties and seeds are then the local engine's own.

When a stage is lost the layers are assigned anew (`serving.pipeline`); caches begin empty, each lane computes its rows
again from the token ids that its stand-in cache remembers, and repeats the step. A batcher does not notice.

With speculation a step carries several tokens a row, and a lane may have several steps under way, each drafted on the
guess that the one before it comes out as drafted (`speculation.speculating`): stages compute a lane's steps in their
order, so what a refuted one wrote is overwritten by the next.
"""
