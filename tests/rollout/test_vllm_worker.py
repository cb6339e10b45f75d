"""vLLM as a worker's engine. What needs no vLLM is tested always; the rest where `SHOAL_VLLM_PYTHON` names a Python
that has it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from shoal.broadcast.tensors import TensorView, view_of
from shoal.engine.local import LocalEngine
from shoal.engine.source import LocalModel
from shoal.engine.weights import to_views
from shoal.errors import ModelError, StorageError
from shoal.protocol.sampling import Grammar, SampleRequest, SamplingParams
from shoal.protocol.work import WorkSpec
from shoal.rollout.vllm_engine import VllmEngine, vllm_engine
from shoal.rollout.vllm_server import (
    GUARD,
    VllmOptions,
    cache_bytes_of,
    command_of,
    environment_of,
    find_python,
    private_folder,
    serving,
)
from shoal.rollout.weight_files import write_weights
from tiny import make_wide_model

needs_vllm = pytest.mark.skipif(
    not os.environ.get("SHOAL_VLLM_PYTHON"), reason="SHOAL_VLLM_PYTHON names no Python that has vLLM"
)

PATIENCE_S = 60.0


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, "what was waited for did not happen"
        time.sleep(0.05)
    return found


def test_weights_are_written_as_safetensors_reads_them(tmp_path: Path) -> None:
    given = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((0, 4), dtype=np.int64)}
    views = {
        "a": view_of("F32", (2, 3), given["a"].tobytes()),
        "b": view_of("I64", (0, 4), given["b"].tobytes()),
        "half": view_of("BF16", (2,), b"\x80\x3f\x00\x40"),
    }
    path = tmp_path / "model.safetensors"
    write_weights(path, views)
    write_weights(path, views)
    found = load_file(path)
    assert found["half"].tolist() == [1.0, 2.0]
    assert all(np.array_equal(found[name].numpy(), array) for name, array in given.items())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(StorageError, match="cannot be written"):
        write_weights(tmp_path / "none" / "model.safetensors", views)


def test_a_python_without_vllm_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOAL_VLLM_PYTHON", raising=False)
    with pytest.raises(ModelError, match="needs an environment that holds vLLM"):
        find_python(VllmOptions())
    with pytest.raises(ModelError, match="there is no Python /no/such"):
        find_python(VllmOptions("/no/such"))
    assert find_python(VllmOptions(sys.executable)) == sys.executable


CHAIN = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open(sys.argv[1], "a").write(f"{os.getpid()} ")
child = subprocess.Popen([sys.executable, "-c", "import os,sys,time; open(sys.argv[1],'a').write(f'{os.getpid()} '); time.sleep(600)", sys.argv[1]], start_new_session=True)
time.sleep(600)
"""  # noqa: E501


@pytest.mark.parametrize("how", ["close", "term", "server_dies"])
def test_the_guard_leaves_nothing_behind(tmp_path: Path, how: str) -> None:
    """A server that starts two processes in sessions of their own, as an engine might."""
    pids = tmp_path / "pids"
    guard = subprocess.Popen(
        [sys.executable, str(GUARD), sys.executable, "-c", CHAIN, str(pids)], stdin=subprocess.PIPE
    )
    assert guard.stdin is not None
    try:
        until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
        server, engine = map(int, pids.read_text().split())
        if how == "close":
            guard.stdin.close()
        elif how == "term":
            guard.terminate()
        else:
            os.kill(server, signal.SIGKILL)
        code = guard.wait(PATIENCE_S)
        assert not alive(server) and not alive(engine)
        assert code == (128 + signal.SIGKILL if how == "server_dies" else 0)
    finally:
        guard.kill()
        guard.wait()


async def test_a_server_that_does_not_start_says_why() -> None:
    async with private_folder() as folder:
        assert folder.stat().st_mode & 0o077 == 0
        command = [sys.executable, "-c", "raise ValueError('no such model')"]
        with pytest.raises(ModelError, match="exit code 1: ValueError: no such model"):
            async with serving(command, dict(os.environ), folder):
                pytest.fail("it did not start")
    assert not folder.exists()


def test_a_command_names_what_matters(tmp_path: Path) -> None:
    command = command_of(
        "python", tmp_path, tmp_path / "s", dtype="bf16", on_cpu=False, context_tokens=64, max_sequences=8, more=["--x"]
    )
    assert command[-1] == "--x" and "--enforce-eager" not in command
    assert "processed_logprobs" in command, "behaviour log-probabilities are those of the tempered distribution"
    given = environment_of(sys.executable, on_cpu=True, threads=3, cache_bytes=2**30 + 1)
    assert given["VLLM_CPU_KVCACHE_SPACE"] == "2" and given["OMP_NUM_THREADS"] == "3"
    shape = {"num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48}
    assert cache_bytes_of(shape, 100, 2) == 2 * 2 * 2 * 8 * 2 * 100


# With vLLM


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    return LocalModel("tiny", make_wide_model(tmp_path_factory.mktemp("vllm")))


def spec_of(model: LocalModel, on_swap: Any = "finish") -> WorkSpec:
    return WorkSpec(
        model=str(model.directory), dtype="fp32", envs={}, context_tokens=64, heartbeat_s=1.0, on_swap=on_swap
    )


@asynccontextmanager
async def engine_of(model: LocalModel, on_swap: Any = "finish") -> AsyncIterator[VllmEngine]:
    made = vllm_engine(
        model, spec_of(model, on_swap), VllmOptions(), device="cpu", threads=1, max_sequences=16, cache_tokens=4096
    )
    async with made as engine:
        yield engine


def tensors_of(model: LocalModel, factor: float) -> dict[str, torch.Tensor]:
    """A version of the model; sharper than it comes, since it finds everything about equally likely."""
    return {
        name: tensor.float() * (4.0 * factor if tensor.ndim > 1 else 1.0) for name, tensor in model.tensors().items()
    }


def changed(model: LocalModel, factor: float) -> dict[str, TensorView]:
    return dict(to_views(tensors_of(model, factor)))


def asked(**params: Any) -> SampleRequest:
    return SampleRequest(prompt_ids=(3, 10, 11, 12), params=SamplingParams(**{"max_tokens": 24, "seed": 5, **params}))


@needs_vllm
@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_tokens_logprobs_versions_and_weights(model: LocalModel) -> None:
    """Against our own engine, under two versions; a change of weights waits for what is in flight."""
    ours = LocalEngine(model, dtype="fp32", device="cpu", max_sequences=4, cache_tokens=1024, context_tokens=64)
    async with engine_of(model) as engine:
        await engine.load_weights(0, changed(model, 1.0))
        await ours.load_weights(0, changed(model, 1.0))
        for version, factor in ((0, 1.0), (1, 1.5), (2, 1.0)):
            if version:
                await engine.load_weights(version, changed(model, factor))
                await ours.load_weights(version, changed(model, factor))
            greedy, expected = await engine.sample(asked(temperature=0.0)), await ours.sample(asked(temperature=0.0))
            assert greedy.token_ids == expected.token_ids
            assert greedy.logprobs == pytest.approx(expected.logprobs, abs=1e-3)
            assert (greedy.finish, greedy.text) == (expected.finish, expected.text)
            assert set(greedy.versions) == {version}
            greedy.check()
        warm = await asyncio.gather(*(engine.sample(asked(temperature=0.7, seed=n)) for n in range(12)))
        assert len({one.token_ids for one in warm}) > 6
        reference = AutoModelForCausalLM.from_pretrained(str(model.directory), dtype=torch.float32)
        reference.load_state_dict(tensors_of(model, 1.0), strict=False)
        reference.tie_weights()
        for one in warm:
            one.check()
            ids = torch.tensor([[*asked().prompt_ids, *one.token_ids]])
            with torch.no_grad():
                logs = torch.log_softmax(reference(ids).logits[0, len(asked().prompt_ids) - 1 : -1] / 0.7, dim=-1)
            expected = logs.gather(1, torch.tensor(one.token_ids)[:, None])[:, 0]
            assert one.logprobs == pytest.approx(expected.tolist(), abs=1e-3), "of the tempered distribution"
        running = [asyncio.create_task(engine.sample(asked(max_tokens=50, seed=n))) for n in range(8)]
        await asyncio.sleep(0.05)
        pause_s = await engine.load_weights(3, changed(model, 0.5))
        late = await engine.sample(asked())
        done = await asyncio.gather(*running)
        assert pause_s > 0 and set(late.versions) == {3}
        assert all(len(set(one.versions)) == 1 for one in done), "no answer mixes versions"
        with pytest.raises(ModelError, match="lacks"):
            await engine.load_weights(4, {"odd": view_of("F32", (1,), b"\0\0\0\0")})
        with pytest.raises(ModelError, match="grammar"):
            await engine.sample(SampleRequest(prompt_ids=(3,), grammar=Grammar(kind="regex", text="a")))
        assert (await engine.sample(asked())).versions[0] == 3, "what was refused changed nothing"
        assert engine.stats().tokens_drawn > 100
        await ours.close()
        # And when it dies, whoever waits is told, and nothing is left of it.
        guard = engine._server.process.pid
        (server,) = map(int, Path(f"/proc/{guard}/task/{guard}/children").read_text().split())
        pending = asyncio.create_task(engine.sample(asked(max_tokens=50)))
        await asyncio.sleep(0.05)
        os.kill(server, signal.SIGKILL)
        with pytest.raises(ModelError, match="vLLM"):
            await asyncio.gather(pending, engine.sample(asked()))
    until(lambda: not alive(guard) and not alive(server))


@needs_vllm
@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_answers_are_cut_off_and_go_on_under_new_weights(model: LocalModel) -> None:
    async with engine_of(model, "recompute") as engine:
        await engine.load_weights(0, changed(model, 1.0))
        later = changed(model, 1.2)
        running = [asyncio.create_task(engine.sample(asked(max_tokens=55, seed=n))) for n in range(96)]
        while engine.stats().tokens_drawn < 100:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.005)
        await engine.load_weights(1, later)
        done = await asyncio.gather(*running)
        seen = [tuple(sorted(set(one.versions))) for one in done]
        assert (0, 1) in seen and (1,) in seen, f"some had begun, and others had not: {seen}"
        for one in done:
            one.check()
            assert list(one.versions) == sorted(one.versions)
            assert one.finish in ("stop", "length") and len(one.token_ids) <= 55
