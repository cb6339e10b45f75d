"""Several tokens for one pass of the target: a drafter guesses, the target checks all guesses at once, a rule accepts.

A round's life, inside the batcher's decode step (`speculating`): the drafter proposes a chain or a small tree of
tokens for each row (`ngram`, `student`, `eagle`, all behind `drafter.Drafter`; `drafting` knows who drafts and what
the drafter has been told); the target computes them in one pass; `verify` walks each row's tree and asks a rule
(`strict`, `margin`, `semantic`, `typical`, `fly`) which tokens stay; the cache is cut to what stayed. How many tokens
to draft, whether to draft at all and how many rounds to have in flight is decided by `planning.speculation`.

Drafters are made by `eagle_training` and `student_training` on texts that `writing` has the target write, and opened
by `drafters`; `profile` keeps the thresholds that were calibrated for a model.
"""
