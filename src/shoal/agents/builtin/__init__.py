"""Tools of our own: each a set of functions, and an MCP server by `shoal tools serve NAME`.

`catalogue` finds them by name. None of them reads or runs anything but what it was given: a folder, a sandbox, text.
"""
