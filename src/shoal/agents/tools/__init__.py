"""What can be called: cards, connections to MCP servers, Python functions; their health, capacity and statistics.

A call's life here: `Toolbox.tool` finds the card, `schema` checks the arguments, `capacity` gives a slot, the tool's
backend (`function`, `mcp_client`) runs it within its deadline, `schema` checks and `outcome` bounds what came back,
`health` notes how it went.
"""
