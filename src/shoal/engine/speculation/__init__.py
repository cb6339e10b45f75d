"""Several tokens for one pass of the target: a drafter guesses, the target checks all guesses at once, a rule accepts.

A round's life: the drafter proposes a chain or a small tree of tokens for each row (`ngram`, `student`, `eagle`, all
behind `drafter.Drafter`); the target computes them in one pass (`loop`); `verify` walks each row's tree and asks a
rule (`strict`, `margin`, `semantic`, `typical`, `fly`) which tokens stay; caches are cut to what stayed; the drafter
is told. How many tokens to draft, and whether to draft at all, is decided by `planning.speculation`.
"""
