"""Small sites of our own: several pages each, state on the server, seeded, and judged by that state.

`site` is what they share (pages in, pages out), `words` their people and things; each site is a module with its pages
and the acts behind them (`shop`), and one with its tasks (`shop_tasks`). `templates` knows them all.
"""
