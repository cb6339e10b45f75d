"""Pages that are imagined: what an act changes on a page, as a typed script of edits.

`edit` computes such a script from two pages and applies it; `script` writes and reads it, and makes the grammar that a
world model writes it by. `collect` plays real tasks and keeps every transition.
"""
