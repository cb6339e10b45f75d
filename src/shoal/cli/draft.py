"""`shoal draft`: a drafter for a model, so that it can be decoded speculatively."""

from __future__ import annotations

import asyncio
import json as json_module
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from cyclopts import App

from shoal.cli.claimed import claim
from shoal.cli.output import console, note, print_json
from shoal.cli.parameters import Flag, Json
from shoal.errors import ConfigError, RecordError, RunError, TaskError
from shoal.protocol.chat import Message

if TYPE_CHECKING:
    from shoal.engine.source import LocalModel
    from shoal.engine.speculation.eagle_pupil import Pupil
    from shoal.engine.speculation.student_training import StudentPupil
    from shoal.engine.speculation.writing import TargetText

SETTINGS, TEXTS, METRICS, CHECKPOINTS = "draft.json", "texts.jsonl", "metrics.jsonl", "checkpoints"
HEAD, STUDENT = "head", "student"

IN_FLIGHT = 2
"""Requests asked of the engine at once, for each sequence that it decodes together."""

LONGEST_TEXT = 2048
"""Tokens of a prompt and its answer together, whatever the model's context: what one pass of training holds."""

MAX_LINE_BYTES = 1 << 20
"""A longer line of the prompts' file is refused."""

app = App(name="draft", help="Train a drafter for a model.", help_format="plaintext")


@app.command
def train(
    model: str,
    prompts: Path,
    /,
    *,
    out: Path,
    kind: Literal["eagle", "student"] = "eagle",
    layers: int = 3,
    tokens: int = 500_000,
    max_tokens: int = 256,
    temperature: float = 0.0,
    draft_vocab: int = 4096,
    epochs: int = 3,
    batch_size: int = 8,
    microbatch: int = 4,
    test_steps: int = 5,
    lr: float = 5e-4,
    heldout: float = 0.05,
    eval_every: int = 100,
    checkpoint_every: int = 100,
    max_sequences: int = 32,
    dtype: str = "bf16",
    seed: int = 0,
    threads: int = 1,
    device: str = "auto",
    resume: Flag = False,
    json: Json = False,
) -> None:
    """Train a drafter on text that the model itself writes: an EAGLE-3 head, or a student of a few layers.

    PROMPTS has one JSON object a line: {"prompt": ...} or {"messages": [...]} as in chat APIs, of which the last
    assistant turn is left out. The model answers them until there are enough tokens, then the head learns from that;
    both can be interrupted and go on with --resume.

    For example:

        shoal draft train embedded prompts.jsonl --out head
        shoal draft train embedded prompts.jsonl --out head --resume
        shoal draft train embedded prompts.jsonl --out student --kind student --layers 3

    Args:
        model: embedded, a directory, a .gguf file or a hub name.
        prompts: What the model is asked. Repeated with other seeds where the temperature is above 0.
        out: A new folder for texts, metrics, checkpoints and the drafter.
        kind: eagle, a head that reads the model's hidden states; or student, a model of its own.
        layers: Of a student.
        tokens: Tokens that the model writes at most.
        max_tokens: Longest answer.
        temperature: Of the answers; 0 is greedy.
        draft_vocab: Tokens that a head can propose, the model's most frequent ones.
        epochs: Times that every text is learnt.
        batch_size: Texts of one optimizer step.
        microbatch: Texts of one pass; lower it where memory is short, the result stays the same.
        test_steps: Drafts in a row that training imitates.
        lr: Peak learning rate of AdamW, falling as a cosine.
        heldout: Share of the texts that is only measured.
        eval_every: Steps between measurements; the last step is always measured.
        checkpoint_every: Steps between checkpoints.
        max_sequences: Answers written at the same time.
        dtype: bf16 or fp32, of model and head; the head's optimizer works in fp32.
        seed: Of answers, order, and what is held out.
        threads: CPU threads.
        device: auto, cpu, cuda or cuda:N.
        resume: Go on in the folder.
    """
    counts = (
        layers,
        tokens,
        max_tokens,
        draft_vocab,
        epochs,
        batch_size,
        microbatch,
        test_steps,
        eval_every,
        checkpoint_every,
    )
    if min(*counts, max_sequences) < 1:
        raise ConfigError("all counts must be at least 1.")
    if not 0 < heldout < 1:
        raise ConfigError(f"--heldout {heldout:g} is not a share.", "Give a number above 0 and below 1.")
    if dtype not in ("bf16", "fp32"):
        raise ConfigError(f"--dtype {dtype} is neither bf16 nor fp32.")
    if not 0 <= temperature <= 2:
        raise ConfigError(f"--temperature {temperature:g} is not between 0 and 2.")
    what: dict[str, Any] = {
        "model": model,
        "prompts": str(prompts.resolve()),
        "tokens": tokens,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "draft_vocab": draft_vocab,
        "epochs": epochs,
        "batch_size": batch_size,
        "test_steps": test_steps,
        "lr": lr,
        "heldout": heldout,
        "dtype": dtype,
        "seed": seed,
    }
    if kind == "student":
        what |= {"kind": kind, "layers": layers}
    conversations = _read_prompts(prompts)
    claim(out, SETTINGS, what, resume=resume)
    from shoal.engine.source import resolve
    from shoal.rollout.host import model_cache

    local = resolve(model, model_cache(), note)
    try:
        began = time.monotonic()
        texts = asyncio.run(
            _write_texts(local, conversations, out / TEXTS, what, max_sequences, threads=threads, device=device)
        )
        wrote_s = time.monotonic() - began
        result = _teach(
            local,
            texts,
            out,
            what,
            microbatch=microbatch,
            eval_every=eval_every,
            checkpoint_every=checkpoint_every,
            threads=threads,
            device=device,
        )
    except KeyboardInterrupt:
        note("Interrupted. Repeat the command with --resume to go on.")
        raise
    result["generate_s"] = wrote_s
    if json:
        print_json(result)
        return
    rates = ", ".join(f"{rate:.2f}" for rate in result["heldout_accept"])
    console().print(
        f"{result['texts']} texts, {result['tokens']} tokens, {result['steps']} steps; accepted by depth on held-out "
        f"texts: {rates}; {result['tokens_per_round']:.2f} tokens a round\nThe drafter is in {result['drafter']}",
        markup=False,
        soft_wrap=True,
    )


def _read_prompts(path: Path) -> list[list[Message]]:
    """Conversations that the model is to go on with."""
    if not path.is_file():
        raise TaskError(f"there is no file {path}.", "Give a file with one JSON object a line.")
    found = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError
                entry = json_module.loads(line)
                turns = entry["messages"] if "messages" in entry else [{"role": "user", "content": entry["prompt"]}]
                messages = msgspec.convert(turns[:-1] if turns[-1]["role"] == "assistant" else turns, list[Message])
                if not messages:
                    raise ValueError
            except (msgspec.ValidationError, ValueError, KeyError, TypeError, IndexError):
                raise TaskError(
                    f"{path}, line {number} is no prompt.", 'Write {"prompt": ...} or {"messages": [...]} on each line.'
                ) from None
            found.append(messages)
    if not found:
        raise TaskError(f"{path} is empty.", "Give at least one prompt.")
    return found


async def _write_texts(
    local: LocalModel,
    prompts: Sequence[Sequence[Message]],
    path: Path,
    what: dict[str, Any],
    max_sequences: int,
    *,
    threads: int,
    device: str,
) -> list[TargetText]:
    from shoal.engine.local import LocalEngine
    from shoal.engine.speculation.writing import Writing, missing, write, written

    context = min(local.config().max_position_embeddings, LONGEST_TEXT)
    writing = Writing(
        what["tokens"], what["max_tokens"], context, what["temperature"], what["seed"], IN_FLIGHT * max_sequences
    )
    texts = written(path)
    enough = sum(len(text.token_ids) for text in texts) >= writing.tokens
    if enough or next(missing(texts, len(prompts), writing), None) is None:
        return texts
    async with LocalEngine(
        local,
        dtype=what["dtype"],
        device=device,
        threads=threads,
        max_sequences=max_sequences,
        cache_tokens=max_sequences * context,
        context_tokens=context,
    ) as engine:
        await write(engine, prompts, path, texts, writing, note)
    return texts


def _teach(
    local: LocalModel,
    texts: list[TargetText],
    out: Path,
    what: dict[str, Any],
    *,
    microbatch: int,
    eval_every: int,
    checkpoint_every: int,
    threads: int,
    device: str,
) -> dict[str, Any]:
    from shoal.engine.speculation.eagle_pupil import Pupil
    from shoal.engine.speculation.eagle_training import Plan
    from shoal.learner import checkpoint as checkpoints
    from shoal.learner.optimizer import MasterAdamW, learning_rate
    from shoal.planning.speculation import expected_tokens

    # Sorted, so that a resumed generation, whose answers came in another order, gives the same training.
    texts = sorted((text for text in texts if len(text.token_ids) > 1), key=lambda text: text.index)
    held = max(1, round(len(texts) * what["heldout"]))
    if len(texts) - held < 1:
        raise RunError("there are too few texts to learn from.", "Give more prompts, or ask for longer answers.")
    held_texts, own_texts = texts[-held:], texts[:-held]
    pupil = _pupil(local, own_texts, what, threads=threads, device=device)
    parameters = pupil.parameters
    optimizer = MasterAdamW(parameters, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, grad_clip=0.5)
    num_steps = max(1, what["epochs"] * len(own_texts) // what["batch_size"])
    warmup = max(1, num_steps // 50)
    plan = Plan(
        num_steps,
        what["batch_size"],
        microbatch,
        what["test_steps"],
        lambda step: learning_rate(what["lr"], warmup, step, schedule="cosine", total_steps=num_steps),
        what["seed"],
    )
    begin = 0
    if (saved := checkpoints.load_latest(out / CHECKPOINTS)) is not None:
        try:
            pupil.restore(saved.weights)
        except RuntimeError:
            raise RecordError("the checkpoint does not fit this drafter.", f"Remove {out / CHECKPOINTS}.") from None
        optimizer.load_state_dict(saved.optimizer)
        begin = saved.version
        note(f"continuing after step {begin}")
    record = _metrics(out / METRICS, begin)
    accept: list[float] = []
    loss = float("nan")
    began = time.monotonic()
    if begin >= num_steps:
        loss, accept = pupil.evaluate(held_texts, plan)
    for report in pupil.train(own_texts, plan, optimizer, begin):
        record({"kind": "step", "step": report.step, "loss": report.loss, "accept": report.accept})
        last = report.step == num_steps
        if report.step % eval_every == 0 or last:
            loss, accept = pupil.evaluate(held_texts, plan)
            record({"kind": "eval", "step": report.step, "loss": loss, "accept": accept})
            each = (time.monotonic() - began) / (report.step - begin)
            note(
                f"step {report.step}/{num_steps}: loss {report.loss:.3f}, held out {loss:.3f}, accepted "
                + " ".join(f"{rate:.2f}" for rate in accept)
                + f", {each:.2f} s a step"
            )
        if report.step % checkpoint_every == 0 or last:
            state = pupil.state()
            checkpoints.save(
                out / CHECKPOINTS, checkpoints.Checkpoint(report.step, state, optimizer.state_dict(), extra={})
            )
    folder = out / (HEAD if isinstance(pupil, Pupil) else STUDENT)
    pupil.save(folder)
    coverage = {}
    if isinstance(pupil, Pupil):
        coverage["draft_vocab_coverage"] = _coverage(held_texts, set(pupil.head.ids_R.tolist()))
    return {
        "drafter": str(folder),
        "texts": len(texts),
        "texts_heldout": held,
        "tokens": sum(len(text.token_ids) for text in texts),
        "parameters": sum(p.numel() for p in parameters.values()),
        **coverage,
        "steps": num_steps,
        "train_s": time.monotonic() - began,
        "heldout_loss": loss,
        "heldout_accept": accept,
        "tokens_per_round": expected_tokens(accept, len(accept)),
    }


def _pupil(
    local: LocalModel, texts: Sequence[TargetText], what: dict[str, Any], *, threads: int, device: str
) -> Pupil | StudentPupil:
    """What is to learn, at its beginning."""
    from shoal.engine.speculation.eagle_pupil import prepare
    from shoal.engine.speculation.student_training import StudentPupil

    more: dict[str, Any] = {"dtype": what["dtype"], "device": device, "threads": threads}
    if "layers" in what:
        return StudentPupil(local, what["layers"], **more)
    return prepare(local, texts, what["draft_vocab"], seed=what["seed"], **more)


def _coverage(texts: Sequence[TargetText], known: set[int]) -> float:
    """Share of the tokens of texts that the reduced vocabulary has."""
    tokens = [token for text in texts for token in text.token_ids]
    return sum(token in known for token in tokens) / max(1, len(tokens))


def _metrics(path: Path, begin: int) -> Callable[[dict[str, Any]], None]:
    """Lines up to the step that is gone on from are kept, the others dropped; gives what adds one."""
    lines = [json_module.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    path.write_text("".join(json_module.dumps(line) + "\n" for line in lines if line["step"] <= begin))

    def record(line: dict[str, Any]) -> None:
        with path.open("a") as file:
            file.write(json_module.dumps(line) + "\n")

    return record
