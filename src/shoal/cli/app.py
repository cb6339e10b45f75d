"""`shoal`: finds the command, runs it, and turns errors into one paragraph and an exit code.

How a command is made. Command NAME is the module `shoal.cli.NAME` with one function `run`, and one line in
`COMMANDS`. The module is imported only when its command is called, so that `shoal --help` stays quick; a command
imports rooms that need torch inside `run`. `run`'s typed parameters are the command line (`parameters` holds the
shared ones), its docstring is the command's help: one sentence, `For example:` and an indented block, `Args:`.

    def run(config: str, /, *overrides: Overrides, workers: int | None = None, json: Json = False) -> None:
        \"\"\"Post-train a model as a configuration says.

        For example:

            shoal train configs/arithmetic.toml --learner.lr 2e-6

        Args:
            config: A TOML file, or the name of a shipped configuration.
            workers: Workers to start on this machine.
        \"\"\"

`run` returns nothing, or an exit code, or is a coroutine. A module that has several commands has a cyclopts `app` in
place of `run`. `run` raises `ShoalError` for what the user can mend: exit code 2 and no traceback unless `--debug`
is given. Other exceptions are our defects and keep their traceback. Ctrl-C exits with 130.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError

import shoal
from shoal.cli.output import print_error
from shoal.errors import ConfigError, ShoalError

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("run", "Post-train the embedded model on arithmetic and show what it learnt."),
    "train": ("run", "Post-train a model as a configuration says."),
    "loop": ("run", "Do everything at once here: serve, act, remember, train; measured before and after."),
    "worker": ("run", "Join a run with its ticket and sample rollouts for it."),
    "ticket": ("run", "Make another ticket for a run."),
    "revoke": ("run", "Take back what nodes of a run were granted, or tickets."),
    "router": ("run", "Relay between machines that cannot reach each other."),
    "status": ("run", "Show who takes part in a run, how they are, and who waits for whom."),
    "logs": ("run", "Show what a node of a run logged."),
    "console": ("run", "Show runs, agents, memories or a server in a browser."),
    "doctor": ("run", "Check this machine, and the way to a run."),
    "debug": ("app", "Find out where a run hangs."),
    "sft": ("run", "Fine-tune a model on examples: conversations, or a run's best episodes."),
    "draft": ("app", "Train a drafter, with which a model decodes several tokens at once."),
    "eval": ("app", "Measure a model on held-out questions, or on quests."),
    "serve": ("run", "Serve a model over HTTP, as OpenAI's API does."),
    "chat": ("run", "Talk to a model."),
    "export": ("run", "Write a trained model for llama.cpp, or as a Hugging Face folder."),
    "agent": ("app", "Do a task by calling tools, or serve such runs."),
    "solve": ("run", "Have a problem solved by a collective of agents, with nobody in charge."),
    "tools": ("app", "Serve tools over MCP, and look at those of an mcp.json."),
    "memory": ("app", "See what is remembered, check why, and take it back."),
    "evm": ("app", "Try, test and measure quests on an EVM chain."),
    "dream": ("app", "Collect real episodes on the web for a world model."),
    "config": ("app", "Check a configuration, or list those that come with Shoal."),
    "plan": ("run", "Say how many workers a run needs, for which staleness bound, and what it costs."),
    "lab": ("app", "Build a network to try things on, and measure it."),
    "bench": ("run", "Run a benchmark and print its numbers."),
}
"""Name -> attribute of its module, summary. `shoal --help` lists them in this order."""

INTERNAL = ("_learner", "_loop_measure", "_prepare", "_version")
"""Commands that Shoal's own processes call; `shoal --help` does not show them."""

OWN_OPTIONS = ("--help", "-h", "--version")
"""What `shoal` takes without a command."""

EPILOGUE = """\
Every command takes --help, --json (one JSON object on standard output) and --debug (a traceback with an error).

    shoal demo
    shoal train configs/arithmetic.toml --learner.lr 2e-6 --dry-run
    shoal eval runs/NAME/model"""


def build_app(command: str | None = None) -> App:
    """The application. `command` is the one about to be called: its help is its own, not its summary."""
    app = App(
        name="shoal",
        help="Post-train one open model on many machines, and serve it there.",
        help_format="plaintext",
        help_epilogue=EPILOGUE if command is None else "",
        version=f"shoal {shoal.__version__} (protocol {shoal.PROTOCOL_VERSION})",
        version_flags=OWN_OPTIONS[2:],
        help_flags=OWN_OPTIONS[:2],
        result_action="return_value",
        suppress_keyboard_interrupt=False,
    )
    for order, (name, (attribute, summary)) in enumerate(COMMANDS.items()):
        own_help = name == command
        app.command(f"shoal.cli.{name}:{attribute}", name=name, help=None if own_help else summary, sort_key=order)
    for name in INTERNAL:
        app.command(f"shoal.cli.{name}:run", name=name, show=False)
    return app


def _unknown(command: str) -> ConfigError:
    close = difflib.get_close_matches(command, COMMANDS, n=1)
    hint = f"Did you mean {close[0]}?" if close else f"The commands are: {', '.join(COMMANDS)}."
    return ConfigError(f"There is no command {command}.", hint)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` (default: the process's arguments) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    try:
        if command is not None and command not in (*COMMANDS, *INTERNAL):
            raise _unknown(command)
        if command is None and set(arguments) - set(OWN_OPTIONS):
            raise ConfigError(f"Without a command there is no option {arguments[0]}.", "See shoal --help.")
        result = build_app(command)(arguments, exit_on_error=False, print_error=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except CycloptsError as error:
        page = f"shoal {command}" if command in COMMANDS else "shoal"
        problem = " ".join(str(error).split())
        print_error(ConfigError(problem, f"See {page} --help."), as_json="--json" in arguments)
        return ConfigError.exit_code
    except ShoalError as error:
        if debug:
            raise
        print_error(error, as_json="--json" in arguments)
        return error.exit_code
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output is gone (`shoal … | head`): nothing is left to say, to it least of all.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
