"""Which experts this machine brings to a collective, as settings, and opened: each model is loaded once.

    [[expert]]
    name = "sums"
    lora = "loras/sums"                    # beside the model that other experts share
    prompt = "Add the numbers. Reply with the sum alone."
    skills = { "sums of numbers" = 0.8 }

    file or options ──▶ ExpertSettings ──▶ opened: engines by model, adapters by request ──▶ Opened: expert and writer

Invariants: experts of one model share its weights, whatever their adapters and prompts; all that was opened ends with
the context.
"""

from __future__ import annotations

import asyncio
import tomllib
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shoal.agents.builtin.memories import notes_from
from shoal.agents.collective.model import PLANNING, SamplerExpert, SamplerWriter
from shoal.agents.collective.policies import PolicyExpert, PolicyWriter, RunsExpert
from shoal.agents.collective.work import Expert, Writer
from shoal.agents.scheduler.endpoint import Endpoint, EndpointPolicy
from shoal.agents.scheduler.local import SamplerPolicy
from shoal.agents.scheduler.log import EventLog
from shoal.agents.scheduler.policy import Policy
from shoal.agents.scheduler.service import Runs
from shoal.agents.tools.toolbox import Callee, Toolbox
from shoal.engine.local import LocalEngine
from shoal.engine.shaping import Shaping
from shoal.engine.source import Progress, resolve
from shoal.errors import ConfigError, ModelError, StorageError
from shoal.fabric.identity import data_dir
from shoal.memory.embedding import HashedEmbedder
from shoal.protocol.collective import MAX_CLAIMS
from shoal.protocol.ledger import MAX_SKILL_CHARS
from shoal.protocol.sampling import Completion, Grammar, Sampler, SampleRequest, SamplingParams
from shoal.rollout.host import model_cache

MAX_EXPERTS = 64
MAX_FILE_BYTES = 2**20
APPROVAL_TIMEOUT_S = 0.1
"""Nobody sits beside an expert: a dangerous call is not allowed."""


class ExpertSettings(BaseModel):
    """One expert."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=64, pattern=r"^\w[\w.-]*$")
    """For people; others in the collective see it."""
    model: str = "embedded"
    """embedded, a directory, a .gguf file or a hub name; with `endpoint` the name that it knows."""
    endpoint: str = ""
    """An OpenAI-compatible endpoint up to /v1, in place of a model in this process."""
    lora: str = ""
    """Folder of a LoRA adapter of the model."""
    prompt: str = ""
    """What the expert is, and how it replies: its system message."""
    answer: str = ""
    """A regular expression that its replies match; for a model in this process."""
    tools: tuple[str, ...] = ()
    """Built-in tools (see shoal tools list)."""
    memory: str = ""
    """A folder of memories: what fits a step's task is put before it, as notes (shoal memory)."""
    skills: dict[str, float] = Field(default_factory=dict, max_length=MAX_CLAIMS)
    """Skill -> how good it says it is, 0 to 1. Others believe what they see."""
    plans: bool = True
    """Whether it writes chains as well."""
    planner_lora: str = ""
    """Folder of the adapter with which it writes chains."""
    slots: int = Field(default=1, ge=1, le=1024)
    """Steps at once."""
    price_usd: float = Field(default=0.0, ge=0, lt=1e6)
    """Asked for a step."""
    temperature: float = Field(default=0.7, ge=0, le=10)
    max_tokens: int = Field(default=256, ge=1, le=65536)
    dtype: Literal["bf16", "fp32"] = "bf16"

    def check(self) -> None:
        """Raise `ConfigError` where settings do not go together."""
        where = f"expert {self.name}"
        if any(not 0 <= claim <= 1 for claim in self.skills.values()):
            raise ConfigError(f"{where} claims a skill that is not between 0 and 1.", "Write SKILL=0.8.")
        if any(not skill.strip() or len(skill) > MAX_SKILL_CHARS or ";" in skill for skill in self.skills):
            raise ConfigError(f"{where} has a skill that is empty, too long or contains ';'.", "Use a few words.")
        if self.endpoint and (self.lora or self.planner_lora or self.answer):
            raise ConfigError(f"{where} has an endpoint: adapters and answer belong to a model in this process.")
        if self.tools and self.answer:
            raise ConfigError(f"{where} has tools: its replies are decisions, and match no expression of yours.")


def read_experts(path: Path) -> list[ExpertSettings]:
    """The experts in a TOML file.

    Raises:
        StorageError: it cannot be read.
        ConfigError: it is not as above.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES)
        tables = tomllib.loads(data.decode())
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}.", "Name a file of experts.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML: {error}.") from None
    found = tables.get("expert")
    if not isinstance(found, list) or not found or set(tables) != {"expert"} or len(found) > MAX_EXPERTS:
        raise ConfigError(f"{path} holds no experts.", f"Write 1 to {MAX_EXPERTS} tables [[expert]].")
    experts = [expert_of(table, str(path)) for table in found]
    if len({one.name for one in experts}) != len(experts):
        raise ConfigError(f"{path} names two experts alike.", "Give each a name of its own.")
    return [_beside(one, path.parent) for one in experts]


def _beside(one: ExpertSettings, folder: Path) -> ExpertSettings:
    """With its adapters' folders as seen from the file that names them."""
    adapters = {"lora": one.lora, "planner_lora": one.planner_lora}
    return one.model_copy(update={key: str(folder / value) for key, value in adapters.items() if value})


def expert_of(table: Any, where: str) -> ExpertSettings:
    """One expert's settings; raises `ConfigError` that names the first key that is wrong."""
    try:
        made = ExpertSettings.model_validate(table)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "the expert"
        raise ConfigError(f"{where}: {key}: {first['msg']}.") from None
    made.check()
    return made


@dataclass(frozen=True)
class Adapted:
    """An engine with one of its adapters, as a sampler of its own."""

    engine: LocalEngine
    adapter: str

    async def sample(self, request: SampleRequest) -> Completion:
        """Complete one request with the adapter."""
        return await self.engine.sample(request, Shaping(adapter=self.adapter))


@dataclass(frozen=True)
class Opened:
    """An expert that is ready."""

    settings: ExpertSettings
    expert: Expert
    writer: Writer | None


Connect = Callable[[ExpertSettings], AbstractAsyncContextManager[Sequence[Callee]]]
"""Connects an expert's tools."""


@asynccontextmanager
async def opened(
    experts: Sequence[ExpertSettings],
    connect: Connect,
    *,
    key: str = "",
    threads: int = 1,
    device: str = "auto",
    say: Progress = lambda _: None,
) -> AsyncIterator[list[Opened]]:
    """All experts, ready to work.

    Args:
        key: for endpoints.

    Raises:
        ModelError: a model or adapter cannot be used.
    """
    async with AsyncExitStack() as stack:
        engines = {
            model: await _engine(stack, model, users, threads, device, say)
            for model, users in _by_model(experts).items()
        }
        yield [
            await _open(stack, one, None if one.endpoint else engines[one.model, one.dtype], connect, key)
            for one in experts
        ]


def _by_model(experts: Sequence[ExpertSettings]) -> dict[tuple[str, Literal["bf16", "fp32"]], list[ExpertSettings]]:
    found = defaultdict(list)
    for one in experts:
        if not one.endpoint:
            found[one.model, one.dtype].append(one)
    return found


async def _engine(
    stack: AsyncExitStack,
    key: tuple[str, Literal["bf16", "fp32"]],
    users: Sequence[ExpertSettings],
    threads: int,
    device: str,
    say: Progress,
) -> LocalEngine:
    """The engine of one model, with the adapters of all that use it."""
    model, dtype = key
    found = await asyncio.to_thread(resolve, model, model_cache(), say)
    adapters = {folder: Path(folder) for one in users for folder in (one.lora, one.planner_lora) if folder}
    for folder in adapters.values():
        if not folder.is_dir():
            raise ModelError(f"there is no adapter {folder}.", "Give a folder that peft has saved.")
    engine = await asyncio.to_thread(
        LocalEngine,
        found,
        dtype=dtype,
        threads=threads,
        device=device,
        max_sequences=max(16, sum(one.slots for one in users)),
        context_tokens=found.config().max_position_embeddings,
        cache_tokens=32 * 1024,
        prefix_tokens=8 * 1024,
        adapters=adapters,
    )
    return await stack.enter_async_context(engine)


async def _open(
    stack: AsyncExitStack, one: ExpertSettings, engine: LocalEngine | None, connect: Connect, key: str
) -> Opened:
    expert: Expert
    writer: Writer | None
    fallback = next(iter(one.skills), "anything")
    recall = notes_from(Path(one.memory)) if one.memory else None
    if engine is None:
        endpoint = Endpoint(url=one.endpoint, model=one.model, key=key, temperature=one.temperature)
        policy: Policy = await stack.enter_async_context(EndpointPolicy(endpoint))
        expert, writer = PolicyExpert(policy, one.skills, one.prompt), PolicyWriter(policy, fallback)
    else:
        sampler: Sampler = Adapted(engine, one.lora)
        params = SamplingParams(max_tokens=one.max_tokens, temperature=one.temperature)
        grammar = Grammar(kind="regex", text=one.answer) if one.answer else None
        policy = SamplerPolicy(sampler, engine.tokenizer)
        expert = SamplerExpert(sampler, engine.tokenizer, one.skills, one.prompt, params, grammar, recall)
        writer = SamplerWriter(Adapted(engine, one.planner_lora), engine.tokenizer, PLANNING, fallback)
    if one.tools:
        callees = await stack.enter_async_context(connect(one))
        log = EventLog(data_dir() / "agents" / "steps.db")
        stack.callback(log.close)
        runs = Runs(
            log, Toolbox(callees), policy, recall=recall, max_runs=one.slots, approval_timeout_s=APPROVAL_TIMEOUT_S
        )
        stack.push_async_callback(runs.close)
        expert = RunsExpert(runs, one.skills, one.prompt, records=engine is not None)
    return Opened(one, expert, writer if one.plans else None)


def word_similarity() -> Callable[[str, str], float]:
    """How alike a requirement and a skill are, 0 to 1: the cosine of their words and letter trigrams."""
    embedder = HashedEmbedder()
    known: dict[str, Any] = {}

    def vector(text: str) -> Any:
        if text not in known:
            if len(known) >= 4096:
                known.clear()
            known[text] = embedder.embed([text])[0]
        return known[text]

    return lambda a, b: 1.0 if a == b else max(0.0, float(vector(a) @ vector(b)))
