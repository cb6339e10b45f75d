"""Environments behind an OpenEnv server, in a process, a container or a machine of their own.

`session` speaks OpenEnv's protocol, `acting` turns replies into actions and observations into text, `environment` makes
an `Environment` of it. docs/howto/openenv.md shows how to use one.
"""
