"""A task as data: the TOML that says what is asked, how it can be done, and how to tell whether it was.

Responsibilities: the models of that file, checked when it is loaded, and the shipped tasks. A new task is a TOML table
and no Python.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import resources
from pathlib import Path
from string import Formatter
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shoal.config.toml import NoToml, tables_of
from shoal.envs.evm.genesis import load_genesis
from shoal.envs.evm.language import parse
from shoal.errors import TaskError

GROUPS = ("native", "erc20", "nft", "contract", "swap", "liquidity", "staking", "defi_query", "query", "advanced")
COMPOSITE_GROUPS = ("approve", "batch", "verify", "defi", "stake", "nft_bundle", "optimised")
FULL_POINTS = 100


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AddressParameter(_Model):
    """An account that nobody has used."""

    kind: Literal["address"]


class AmountParameter(_Model):
    """An amount of a coin or token with 18 decimals, drawn evenly from an interval and rounded half up."""

    kind: Literal["amount"]
    low: str
    high: str
    decimals: int = Field(ge=0, le=18)


class NumberParameter(_Model):
    """An integer from `low` to `high` in steps."""

    kind: Literal["number"]
    low: int
    high: int
    step: int = Field(default=1, ge=1)


class ContractParameter(_Model):
    """One of some named contracts."""

    kind: Literal["contract"]
    values: tuple[str, ...] = Field(min_length=1)


class TextParameter(_Model):
    """One of some texts, or `length` random letters, digits and spaces."""

    kind: Literal["text"]
    values: tuple[str, ...] = ()
    length: int = Field(default=0, ge=0, le=200)


class GivenParameter(_Model):
    """One of some addresses."""

    kind: Literal["given"]
    values: tuple[str, ...] = Field(min_length=1)


Parameter = Annotated[
    AddressParameter | AmountParameter | NumberParameter | ContractParameter | TextParameter | GivenParameter,
    Field(discriminator="kind"),
]


class Definition(_Model):
    """One task."""

    id: str = Field(pattern=r"^[a-z0-9_]+$")
    group: str
    templates: tuple[str, ...] = Field(min_length=4)
    parameters: dict[str, Parameter] = {}
    setup: tuple[str, ...] = ()
    """Forms sent before the task is asked; `by=` says by whom, `wait(n)` lets n blocks pass."""
    let: dict[str, str] = {}
    """Names for values of the state before the first act; `start` is its time."""
    solution: tuple[str, ...] = Field(min_length=1)
    """What solves it, one act a line: forms to send, `ask(name=...)` to query, `permit(...)` to sign."""
    checks: dict[str, tuple[int, str]] = Field(min_length=1)
    """Name -> points and what must hold."""
    paper_steps: int = Field(default=3, ge=1)
    """The optimum that the released runner counts with, for the paper's score of a composite task."""

    @property
    def composite(self) -> bool:
        return self.group in COMPOSITE_GROUPS

    @property
    def is_query(self) -> bool:
        """Whether nothing needs to be sent."""
        return all(step.startswith("ask(") for step in self.solution)

    @property
    def optimal_steps(self) -> int:
        """As many as the reference solution takes."""
        return len(self.solution)

    @model_validator(mode="after")
    def _fits(self) -> Definition:
        if self.group not in GROUPS + COMPOSITE_GROUPS:
            raise ValueError(f"there is no group {self.group!r}")
        total = sum(points for points, _ in self.checks.values())
        if total != FULL_POINTS or any(points <= 0 for points, _ in self.checks.values()):
            raise ValueError(f"the points of its checks must be positive and sum to {FULL_POINTS}, not {total}")
        if not self.composite and len(self.solution) != 1:
            raise ValueError("an atomic task is one act")
        for text in (*self.setup, *self.let.values(), *self.solution, *(that for _, that in self.checks.values())):
            parse(text)
        known = {*self.parameters, *load_genesis().names, *(f"{name}_address" for name in self.parameters)}
        for template in self.templates:
            for _, name, _, _ in Formatter().parse(template):
                if name is not None and name not in known:
                    raise ValueError(f"its template names {name!r}, which is no parameter and no contract")
        return self


def read_tasks(text: str, where: str) -> list[Definition]:
    """The tasks of a TOML file's text.

    Raises:
        TaskError: says which task, and what is wrong with it.
    """
    try:
        tables = tables_of(text).get("task", [])
    except NoToml as error:
        raise TaskError(f"{where} is not TOML: {error}.") from None
    found = []
    for table in tables:
        try:
            found.append(Definition.model_validate(table))
        except ValidationError as error:
            # A misspelt key is also a missing one; what was written says more.
            first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
            key = ".".join(str(part) for part in first["loc"])
            name = table.get("id", "?") if isinstance(table, dict) else "?"
            raise TaskError(f"task {name!r} in {where}: {key} {first['msg']}.", "See docs/evm.md.") from None
    return found


def load_tasks(path: Path) -> dict[str, Definition]:
    """The tasks of one file, by id."""
    return {task.id: task for task in read_tasks(path.read_text(encoding="utf-8"), str(path))}


@lru_cache(maxsize=1)
def shipped_tasks() -> dict[str, Definition]:
    """All tasks that come with Shoal, by id, in the order of groups and files."""
    found: dict[str, Definition] = {}
    folder = resources.files("shoal.envs.evm.tasks")
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".toml"):
            for task in read_tasks(entry.read_text(encoding="utf-8"), entry.name):
                if task.id in found:
                    raise TaskError(f"task {task.id!r} is defined twice.")
                found[task.id] = task
    order = {group: number for number, group in enumerate(GROUPS + COMPOSITE_GROUPS)}
    return dict(sorted(found.items(), key=lambda item: order[item[1].group]))
