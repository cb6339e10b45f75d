"""One module a view: `render(house, query)` writes what is known as HTML. Called on the reader's thread; no waits.

A part with a `data-part` keeps its place when the page is brought up to date: only parts whose HTML has changed are
replaced, and an open fold stays open.
"""
