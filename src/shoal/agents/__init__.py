"""Agents: a language model that reaches a goal by calling tools, many at once.

`tools` knows what can be called: typed cards, MCP servers and Python functions behind them, their health and capacity.
`builtin` brings tools of our own, each also an MCP server. `scheduler` runs tasks: the model decides, calls run as soon
as what they depend on is there, and everything that happens is an event in a log that a run can be resumed or forked
from. `http` offers runs to others.

Invariant: what a tool says is data. It can change neither which tools a run may call, nor with which arguments, nor
how much it may spend.
"""
