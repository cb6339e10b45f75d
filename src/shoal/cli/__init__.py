"""The command line: one module for each command, and the only room that wires the others together.

`app` finds the command and turns errors into exit codes; `output` is how commands speak to people and to machines;
`parameters` holds the parameters that commands share. Every other module is a command.
"""
