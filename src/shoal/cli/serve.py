"""`shoal serve`: a model over HTTP, as OpenAI's API does it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from shoal.cli.output import console, note, print_json
from shoal.cli.parameters import Flag, Json

if TYPE_CHECKING:
    from shoal.config import Serving
    from shoal.serving.keys import Keys

KEYS_VARIABLE = "SHOAL_API_KEYS"


def run(
    model: str = "embedded",
    /,
    *,
    host: str | None = None,
    port: int | None = None,
    threads: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    weights: str | None = None,
    adapter: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    embedding_model: str | None = None,
    memory: str | None = None,
    context_tokens: int | None = None,
    max_sequences: int | None = None,
    stages: int | None = None,
    local_stages: int | None = None,
    in_flight: int | None = None,
    stage_host: str | None = None,
    draft: str | None = None,
    rule: str | None = None,
    theta: float | None = None,
    tau: float | None = None,
    name: str | None = None,
    capture: str | None = None,
    follow: Flag = False,
    api_key: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    keys: Path | None = None,
    new_key: str | None = None,
    verify_receipt: Path | None = None,
    json: Json = False,
) -> None:
    """Serve a model over HTTP until Ctrl-C or SIGTERM, as OpenAI's API does.

    Other settings are those of the [serving] table of a run's configuration.

    For example:

        shoal serve
        shoal serve runs/NAME --port 8080
        shoal serve runs/NAME --follow
        shoal serve --new-key alice
        shoal serve --host 0.0.0.0
        shoal serve --stages 3 --local-stages 1 --stage-host 0.0.0.0
        shoal serve --draft ngram

    Args:
        model: A run's folder, embedded, a directory, a .gguf file or a hub name; with --follow also a ticket.
        host: Address to listen on; beyond loopback keys are needed.
        port: Port to listen on; 0 takes a free one.
        threads: CPU threads.
        device: auto, cpu, cuda or cuda:N.
        dtype: bf16 or fp32.
        weights: full, or int8: in 8 bits, on a CPU.
        adapter: A LoRA adapter as NAME=FOLDER, which clients ask for as MODEL:NAME. May be given several times.
        embedding_model: A second model, which answers /v1/embeddings under this name.
        memory: A folder of memories: what fits a conversation is put before its last message, as notes.
        context_tokens: Longest sequence, prompt and completion together.
        max_sequences: Completions drawn at once.
        stages: Share the layers among so many processes; 0: this one has them all.
        local_stages: How many of them to start here; the others join with `shoal worker TICKET --stage`.
        in_flight: Batches under way at once over the stages; 0: as many as there are stages.
        stage_host: Address on which stages join.
        draft: Speculate: ngram, a head's folder (shoal draft train), or a smaller model with the same tokenizer.
        rule: Which drafts stay: strict (the answers are the model's own), margin, semantic, typical or fly (they are
            marked in the answers' system_fingerprint).
        theta: Threshold of the rule margin; by default what shoal bench calibrate found, else 0.9.
        tau: The same of the rule semantic; else 0.3.
        name: What clients call the model; by default as it was given here.
        capture: Folder for episodes: clients may open sessions at /sessions, which record what an agent asks.
        follow: Serve a run that is under way: each version that it publishes is swapped in between two tokens.
        api_key: A key that is let in, for trying things out: others on this machine can read it in the list of
            processes. May be given several times; SHOAL_API_KEYS takes some too, separated by commas.
        keys: File of keys' hashes; by default one under the user's data directory.
        new_key: Make a key of this name, print it once, keep its hash in the file, and leave.
        verify_receipt: Check the signed receipt of a serving benchmark, print what it says, and leave.
    """
    from shoal.coordinator.processes import die_with_parent
    from shoal.fabric.identity import data_dir
    from shoal.serving import keys as keys_module

    die_with_parent()

    if verify_receipt is not None:
        print_json(_verified(verify_receipt))
        return
    path = keys or data_dir() / "serving" / "keys"
    if new_key is not None:
        made = keys_module.add(path, new_key)
        if json:
            print_json({"name": new_key, "key": made, "file": str(path)})
        else:
            note(f"kept as a hash in {path}; this is the only time that the key itself is shown:")
            console().print(made, soft_wrap=True, markup=False)
        return
    asked: dict[str, Any] = {"host": host, "port": port, "threads": threads, "device": device, "dtype": dtype}
    asked |= {"context_tokens": context_tokens, "max_sequences": max_sequences, "capture": capture}
    asked |= {"weights": weights, "adapters": adapter or None, "embedding_model": embedding_model, "memory": memory}
    asked |= {"stages": stages, "local_stages": local_stages, "in_flight": in_flight, "stage_host": stage_host}
    chosen = {"type": rule, "theta": theta, "tau": tau}
    speculation = {"draft": draft, "rule": {key: value for key, value in chosen.items() if value is not None} or None}
    asked["speculation"] = {key: value for key, value in speculation.items() if value is not None} or None
    changes = {key: value for key, value in asked.items() if value is not None}
    found, settings = _settings("" if follow else model, changes)
    admitted = _keys(path, api_key, settings)
    if follow:
        found, name = model, name or "policy"
    asyncio.run(_serve(found, name or model, settings, admitted, json, follow))


def _verified(path: Path) -> dict[str, Any]:
    """What a receipt says, and who signed it; raises `RecordError` where nobody did."""
    import json

    from shoal.errors import StorageError
    from shoal.serving.receipt import MAX_RECEIPT_BYTES, verified

    try:
        with path.open("rb") as file:
            text = file.read(MAX_RECEIPT_BYTES + 1)
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror}.") from None
    facts = verified(text)
    return {"node": json.loads(text)["node"], "facts": facts}


def _settings(model: str, changes: dict[str, Any]) -> tuple[str, Serving]:
    """What is to be loaded, and how it is to be served: a run says both."""
    from pydantic import ValidationError

    from shoal.config import Serving, load_config
    from shoal.errors import ConfigError

    base: dict[str, Any] = {}
    folder = Path(model).expanduser()
    if (folder / "config.toml").is_file() and (folder / "model").is_dir():
        base = load_config(str(folder / "config.toml"), []).serving.model_dump()
        model = str(folder / "model")
    if "speculation" in changes:
        before, now = base.get("speculation", {}), changes["speculation"]
        rule = now.get("rule", {})
        rule = rule if "type" in rule else {**before.get("rule", {}), **rule}
        changes["speculation"] = {**before, **now, "rule": rule}
    try:
        return model, Serving(**{**base, **changes})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{where}: {first['msg']}.", "See shoal serve --help.") from None


def _keys(path: Path, given: tuple[str, ...], settings: Serving) -> Keys:
    """Who is let in; raises `ConfigError` where everybody on the network would be."""
    import os

    from shoal.config import is_loopback
    from shoal.errors import ConfigError
    from shoal.serving.keys import MAX_KEY_CHARS, Keys, digest, load

    given += tuple(key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip())
    if any(len(key) > MAX_KEY_CHARS for key in given):
        raise ConfigError(f"an API key is longer than {MAX_KEY_CHARS} characters.")
    names = load(path).names | {digest(key): f"given {number}" for number, key in enumerate(given, start=1)}
    if not names and not is_loopback(settings.host):
        raise ConfigError(
            f"on {settings.host} everybody who can reach this machine could use the model.",
            "Make a key with shoal serve --new-key NAME, or listen on 127.0.0.1.",
        )
    return Keys(names)


async def _serve(model: str, name: str, settings: Serving, keys: Keys, as_json: bool, follow: bool) -> None:
    from contextlib import AsyncExitStack

    from shoal.cli.console import beside_server
    from shoal.engine.local import LocalEngine
    from shoal.engine.pipeline.lanes import PipelineEngine
    from shoal.engine.source import resolve
    from shoal.rollout.host import model_cache
    from shoal.serving.following import following, ticket_in
    from shoal.serving.opening import opened
    from shoal.serving.server import serve
    from shoal.serving.speculation import NGRAM

    async with AsyncExitStack() as stack:
        run = await stack.enter_async_context(following(ticket_in(model), name, note)) if follow else None
        if run is not None:
            found = run.model
            if "dtype" not in settings.model_fields_set:
                settings = settings.model_copy(update={"dtype": run.spec.dtype})
        else:
            found = await asyncio.to_thread(resolve, model, model_cache(), note)
        embedding = None
        if settings.embedding_model:
            embedding = await asyncio.to_thread(resolve, settings.embedding_model, model_cache(), note)
        draft = None
        if settings.speculation.draft not in ("", NGRAM):
            draft = await asyncio.to_thread(resolve, settings.speculation.draft, model_cache(), note)
        pages, admitted, listens = beside_server(keys, settings.host)
        api, ticket = await stack.enter_async_context(opened(found, name, settings, embedding, draft))
        if run is not None:
            assert isinstance(api.engine, LocalEngine | PipelineEngine)
            await stack.enter_async_context(run.into(api.engine))

        def announce(port: int) -> None:
            listens(port)
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            url = f"http://{host}:{port}/v1"
            if as_json:
                print_json({"url": url, "model": name, "port": port, **({"ticket": ticket} if ticket else {})})
                return
            lock = f"{len(keys.names)} keys are let in" if keys.names else "no key is asked for"
            note(f"serving {name} at {url}; {lock}; the console is at {url.removesuffix('/v1')}/console; Ctrl-C ends")
            if ticket:
                note("stages join with shoal worker TICKET --stage; shoal status TICKET shows them; the ticket:")
                console().print(ticket, soft_wrap=True, markup=False)

        await serve(api, admitted, settings, announce, pages)
