"""Decisions without I/O: what may start, who holds which lease, what is fresh enough to train on.

Pure functions and state machines; they own no socket, no task and no clock (time is an argument), import no other
room but `protocol` and `config`, and are what property tests run. The shells around them live in `coordinator`.
"""
