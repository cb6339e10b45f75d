"""Worlds to act in: a text goes out, a text comes back, and a reward says what it was worth.

`base` holds the contract (`Environment`, `Observation`, `Step`), `question` its single-turn case, `registry` finds an
environment by name or import path, `extract` reads answers out of replies; every other module is one world. The room
knows nothing of models, tokens or networks: whoever acts hands it text. Importing it loads no world (`registry` does,
on demand). docs/environments.md shows how to write one.
"""
