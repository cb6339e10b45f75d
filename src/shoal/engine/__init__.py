"""Tokens from weights, on this machine.

The life of a request: `LocalEngine.sample` (a `Sampler`) queues it; the engine's own thread admits it when a cache
slot and memory are free (`batching`), prefills its prompt once for the whole group that shares it (`model`, `cache`),
decodes all live sequences together, one token a step (or several, with `speculation`), drawing each with the
log-probability that is reported (`sampling`), watches for end tokens and stop strings (`tokenizer`), and completes it.
Between two steps the weights may be swapped (`LocalEngine.load_weights`); every token carries the version it was drawn
under. `source` finds a model by name and brings it into one local form. Torch is imported here and in `learner` only.
"""

import os

# Large tensors in pages of 2 MiB, where Linux gives them when asked: a decode step reads all weights, and looking up
# small pages takes a tenth of that. Torch asks for it once, at its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
