"""Tools of our own: each a set of functions, and an MCP server by `shoal tools serve NAME`.

`catalogue` finds them by name. None of them reads, runs or reaches anything but what it was given: a folder, a sandbox,
hosts that its user allowed; `fetch` keeps the web ones out of private networks.
"""
