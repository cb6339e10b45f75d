"""The house's order, read from its sources: who may import whom, and what nobody may do.

`findings` is the checker; the first test applies it to the house, the others to small sources that break each rule.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "src" / "shoal"

FLOORS = {
    "protocol": 1,
    "config": 1,
    "planning": 2,
    "fabric": 2,
    "sandbox": 2,
    "lab": 2,
    "swarm": 3,
    "broadcast": 3,
    "engine": 4,
    "envs": 5,
    "rollout": 6,
    "memory": 7,
    "agents": 8,
    "learner": 8,
    "coordinator": 8,
    "serving": 9,
    "cli": 10,
    "api": 11,
    "__init__": 12,
}
KEEPERS = {
    "torch": {"engine", "learner"},
    "transformers": {"engine", "learner"},
    "peft": {"engine", "learner"},
    "zenoh": {"fabric"},
}
"""Packages that only these rooms may import, at any depth."""

UNSAFE = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
"""Packages that turn bytes into code."""

MAX_LINES = 450
MAX_LINES_WITHOUT_DOCSTRING = 15


def imports(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and dotted name of everything imported, inside functions too; relative imports begin with a dot."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return found


def findings(module: str, source: str) -> list[str]:
    """What is wrong with the module `shoal.<module>`, such as `engine.cache`; empty where nothing is."""
    tree = ast.parse(source)
    room = module.split(".")[0]
    wrong: list[str] = []

    def add(line: int, what: str) -> None:
        wrong.append(f"shoal.{module}:{line}: {what}")

    for line, name in imports(tree):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if name.startswith("."):
            add(line, "relative import")
        elif top == "shoal" and target in FLOORS:
            if room not in FLOORS:
                add(line, f"{room} belongs to no floor and may not import the room {target}")
            elif room != target and FLOORS[target] >= FLOORS[room]:
                add(line, f"{room} (floor {FLOORS[room]}) may not import {target} (floor {FLOORS[target]})")
            elif room == "lab" and target != "lab":
                add(line, "lab imports no other room")
        elif top == "shoal" and target and (SOURCES / target / "__init__.py").exists():
            add(line, f"the room {target} has no floor: give it one in ARCHITECTURE and here")
        if room not in KEEPERS.get(top, {room}):
            add(line, f"{top} is imported only in {' and '.join(sorted(KEEPERS[top]))}")
        if name.startswith("safetensors.torch") and room not in KEEPERS["torch"]:
            add(line, "safetensors.torch imports torch, which is imported only in engine and learner")
        if top in UNSAFE:
            add(line, f"{top} turns bytes into code")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            keywords = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            if owner == "torch" and keywords.get("weights_only") is not True:
                add(node.lineno, "torch.load without weights_only=True")
            if owner in ("np", "numpy") and keywords.get("allow_pickle"):
                add(node.lineno, "numpy.load with allow_pickle")
    lines = source.count("\n") + 1
    if lines > MAX_LINES:
        add(lines, f"{lines} lines; {MAX_LINES} are too many for one idea")
    if lines > MAX_LINES_WITHOUT_DOCSTRING and not ast.get_docstring(tree):
        add(1, "no module docstring")
    return wrong


def test_the_house_keeps_its_floors() -> None:
    wrong: list[str] = []
    modules = sorted(SOURCES.rglob("*.py"))
    assert len(modules) > 20
    for path in modules:
        relative = path.relative_to(SOURCES).with_suffix("")
        wrong += findings(".".join(relative.parts), path.read_text(encoding="utf-8"))
    assert not wrong, "\n".join(wrong)


def test_every_imported_package_is_declared() -> None:
    project = tomllib.loads((SOURCES.parents[1] / "pyproject.toml").read_text())["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "dev" for line in lines]
    declared = {re.split(r"[^A-Za-z0-9_.-]", line)[0] for line in [*project["dependencies"], *extras]}
    distributions = importlib.metadata.packages_distributions()
    missing: set[str] = set()
    for path in sorted(SOURCES.rglob("*.py")):
        for line, name in imports(ast.parse(path.read_text(encoding="utf-8"))):
            package = name.partition(".")[0]
            if package and package != "shoal" and package not in sys.stdlib_module_names:
                holders = {holder.replace("_", "-").lower() for holder in distributions.get(package, [package])}
                if not holders & declared:
                    missing.add(f"{path.relative_to(SOURCES)}:{line}: {package} is not declared in pyproject.toml")
    assert not missing, "\n".join(sorted(missing))


def test_each_room_says_what_it_is_for() -> None:
    rooms = [path for path in SOURCES.iterdir() if path.is_dir() and list(path.glob("*.py"))]
    assert rooms
    for room in rooms:
        assert room.name in FLOORS, f"{room.name} has no floor"
        assert ast.get_docstring(ast.parse((room / "__init__.py").read_text())), f"{room.name}/__init__.py is silent"


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        ("engine.cache", "from shoal.envs import base", "may not import envs (floor 5)"),
        ("engine.cache", "def f():\n    import shoal.rollout.worker", "may not import rollout"),
        ("learner.trainer", "from shoal.coordinator import leases", "may not import coordinator (floor 8)"),
        ("fabric.session", "from shoal import lab", "may not import lab"),
        ("lab.namespaces", "from shoal.protocol import codec", "lab imports no other room"),
        ("engine.cache", "from . import model", "relative import"),
        ("engine.cache", "from ..envs import base", "relative import"),
        ("rollout.act", "import torch", "torch is imported only in engine and learner"),
        ("rollout.act", "def f():\n    from torch.nn import functional", "torch is imported only"),
        ("cli.train", "import transformers", "transformers is imported only"),
        ("broadcast.store", "from safetensors.torch import save_file", "safetensors.torch imports torch"),
        ("broadcast.store", "import zenoh", "zenoh is imported only in fabric"),
        ("engine.model", "import pickle", "pickle turns bytes into code"),
        ("engine.model", "from dill import loads", "dill turns bytes into code"),
        ("engine.model", "import torch\ntorch.load('x')", "torch.load without weights_only"),
        ("engine.model", "import torch\ntorch.load('x', weights_only=False)", "torch.load without weights_only"),
        ("engine.model", "import numpy as np\nnp.load('x', allow_pickle=True)", "allow_pickle"),
        ("engine.model", "x = 1\n" * 451, "are too many"),
        ("engine.model", "x = 1\n" * 16, "no module docstring"),
        ("errors", "from shoal.protocol import codec", "belongs to no floor"),
    ],
)
def test_the_checker_finds(module: str, source: str, words: str) -> None:
    assert any(words in finding for finding in findings(module, source)), findings(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("engine.cache", "import torch\nfrom shoal.protocol import codec\nfrom shoal.engine import model"),
        ("engine.cache", "import torch\ntorch.load('x', weights_only=True)"),
        ("protocol.codec", "from shoal.errors import RecordError\nimport shoal"),
        ("cli.app", "from shoal.serving import api\nfrom shoal import __version__"),
        ("coordinator.run", "from shoal.rollout import worker\nimport torchless"),
        ("lab.namespaces", "from shoal.errors import NetworkError"),
    ],
)
def test_the_checker_is_silent_about(module: str, source: str) -> None:
    assert findings(module, source) == []
