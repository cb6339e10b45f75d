"""The command line as users meet it: started as a process, judged by what it prints and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import shoal
from shoal.cli.app import COMMANDS, build_app, main
from shoal.cli.output import print_error, print_json
from shoal.config import config_from, load_config
from shoal.errors import RunError, ShoalError

SHOAL = [sys.executable, "-m", "shoal.cli"]

HEAVY = ("torch", "transformers", "zenoh", "matplotlib", "numpy", "pydantic", "cryptography")
"""What `--help` must not import."""


def call(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
    return subprocess.run([*SHOAL, *arguments], capture_output=True, text=True, timeout=60, cwd=cwd, env=environment)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []])
def test_help_and_version_import_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "shoal.cli", *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "shoal.cli.app" in imported, "the list of imports is really there"
    assert not imported & set(HEAVY)
    assert not {
        name for name in imported if name.startswith("shoal.") and not name.startswith(("shoal.cli", "shoal.errors"))
    }


def test_help_lists_every_command() -> None:
    done = call("--help")
    for name, (_, summary) in COMMANDS.items():
        assert re.search(rf"\b{name} +{re.escape(summary[:20])}", done.stdout), name
    assert "shoal demo" in done.stdout


def test_version_names_the_protocol() -> None:
    assert call("--version").stdout == f"shoal {shoal.__version__} (protocol {shoal.PROTOCOL_VERSION})\n"


@pytest.mark.parametrize("arguments", [["config", "check"], ["config", "list"], ["bench"]])
def test_command_help_has_examples(arguments: list[str]) -> None:
    done = call(*arguments, "--help")
    assert done.returncode == 0
    assert f"\n    shoal {' '.join(arguments)}" in done.stdout
    assert "--json" in done.stdout


def test_commands_that_exist_have_help_with_examples(repository: Path) -> None:
    for name, (attribute, _) in COMMANDS.items():
        if attribute == "run" and (repository / "src" / "shoal" / "cli" / f"{name}.py").exists():
            done = call(name, "--help")
            assert done.returncode == 0, done.stderr
            assert f"\n    shoal {name}" in done.stdout, f"{name} --help shows no example"
            assert "--json" in done.stdout, f"{name} takes no --json"


def test_config_check_prints_what_reads_back_equal(repository: Path) -> None:
    done = call("config", "check", "configs/lora.toml", "--learner.lr", "1e-4", "--run.steps=3", cwd=repository)
    assert done.returncode == 0, done.stderr
    expected = load_config(repository / "configs" / "lora.toml", ["--learner.lr", "1e-4", "--run.steps=3"])
    assert config_from(tomllib.loads(done.stdout)) == expected
    as_json = call(
        "config", "check", "configs/lora.toml", "--learner.lr", "1e-4", "--run.steps=3", "--json", cwd=repository
    )
    assert config_from(json.loads(as_json.stdout)["config"] | {}).run.steps == 3


def test_config_list() -> None:
    assert "arithmetic_pull" in call("config", "list").stdout
    assert "arithmetic" in json.loads(call("config", "list", "--json").stdout)["configs"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["There is no command trian.", "Did you mean train?"]),
        (["xyzzy"], ["There is no command xyzzy.", "The commands are: demo, train"]),
        (["--jsn"], ["--jsn", "shoal --help"]),
        (["config", "chekc", "x"], ["chekc", "check"]),
        (["config", "check"], ["requires an argument", "See shoal config --help."]),
        (["config", "check", "arithmetik"], ["There is no configuration arithmetik.", "Did you mean arithmetic?"]),
        (["config", "check", "arithmetic", "--learner.lr", "[red]x"], ['"[red]x"', "a number"]),
        (["bench", "startpu"], ["There is no benchmark startpu.", "Did you mean startup?"]),
        (["bench", "--timeout-s", "soon"], ["--timeout-s", "soon", "See shoal bench --help."]),
        (["bench", "--folder", "/nowhere"], ["/nowhere", "--folder"]),
    ],
)
def test_mistakes_end_in_one_paragraph_and_code_2(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("Error: ")
    assert said.err.count("\n") == 1, "one paragraph, not wrapped where nobody reads it on a terminal"
    for word in words:
        assert word in said.err
    assert main([*arguments, "--json"]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"kind", "problem", "remedy"}
    assert said.err == f"Error: {answer['error']['problem']} {answer['error']['remedy']}\n"


def test_a_mistake_as_a_process() -> None:
    done = call("config", "check", "arithmetic", "--learner.mode", "sync")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: In --learner.mode (an override of ")
    assert done.stderr.endswith(
        'configs/arithmetic.toml): learner.mode = "sync" is not known. Allowed: "async", "pull", "colocated".\n'
    )


def test_debug_shows_the_traceback() -> None:
    done = call("config", "check", "arithmetik", "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "ConfigError" in done.stderr


def test_a_closed_pipe_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*SHOAL, "config", "check", "lora"], stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert done.stderr == b""


def test_interrupt_ends_with_130_and_stops_the_benchmark(tmp_path: Path) -> None:
    (tmp_path / "sleepy.py").write_text(
        "import os, sys, time\n"
        "try:\n"
        "    print('started', os.getpid(), file=sys.stderr, flush=True)\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    pass\n"
    )
    command = [*SHOAL, "bench", "sleepy", "--folder", str(tmp_path)]
    # A session of its own, so that the interrupt reaches both processes as Ctrl-C on a terminal does.
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Tests that were themselves started in the background of a script inherit an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        child = int(process.stderr.readline().split()[1])
        os.killpg(process.pid, signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(30) == 130
    assert rest == "Interrupted.\n"
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("nan"), "b": [float("inf"), 1.5, {"c": (1, "é\n")}]})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5, {"c": [1, "é\n"]}]}


def test_errors_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(RunError("the run [bold]x[/bold] is gone.", "Look in [/dev/null]."))
    assert capsys.readouterr().err == "Error: the run [bold]x[/bold] is gone. Look in [/dev/null].\n"
    print_error(ShoalError("no remedy."))
    assert capsys.readouterr().err == "Error: no remedy.\n"


def test_main_in_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "list"]) == 0
    assert main(["config", "check", "nothing-like-it"]) == 2
    assert "nothing-like-it" in capsys.readouterr().err
    assert build_app().name == ("shoal",)
