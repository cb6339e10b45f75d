"""Quests on an EVM chain: instructions in words, transactions as acts, checks on the state they leave.

The life of a quest: `definition` (data) and `sampling` (a seed's parameters) give an instance; `stage` sets the chain
as it should be and notes what the checks need of it; `actions` reads what the agent wrote and does it; `judging`
checks what came of it; the chain is reverted. `environment` is that life as an environment like any other.
"""
