"""Reading configurations: shipped ones, overrides, and every mistake a user can make with one."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from shoal.config import (
    AsyncLearner,
    ColocatedLearner,
    GspoLoss,
    ProximalImportance,
    PullLearner,
    config_from,
    find_config,
    load_config,
    shipped_configs,
    to_toml,
)
from shoal.envs.base import parse_settings
from shoal.envs.registry import find
from shoal.errors import ConfigError

MINIMAL = '[envs.sums]\ntype = "arithmetic"\n'


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.toml"
    path.write_text(MINIMAL)
    return path


def refusal(path: str | Path, *overrides: str) -> str:
    """The paragraph that a configuration is refused with."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.remedy, "every message says what to do"
    assert "\n" not in str(caught.value), "one paragraph"
    return str(caught.value)


def test_every_shipped_configuration_loads(repository: Path) -> None:
    shipped = sorted((repository / "configs").glob("*.toml"))
    assert {"arithmetic", "arithmetic_pull", "arithmetic_colocated", "gsm8k", "sokoban", "lora"} <= set(
        shipped_configs()
    )
    assert sorted(shipped_configs().values()) == shipped
    for path in shipped:
        config = load_config(path)
        assert config.envs
        assert path.read_text().startswith("# "), f"{path} begins with what it is for"


def test_shipped_environments_take_their_settings() -> None:
    for name in shipped_configs():
        for label, env in load_config(name).envs.items():
            parse_settings(find(env.type).Settings, env.settings, label)


def test_shipped_modes() -> None:
    assert isinstance(load_config("arithmetic").learner, AsyncLearner)
    assert load_config("arithmetic").workers.count == 2
    assert isinstance(load_config("arithmetic_pull").learner, PullLearner)
    assert isinstance(load_config("arithmetic_colocated").learner, ColocatedLearner)
    assert load_config("lora").learner.lora is not None


def test_on_policy_modes_have_no_staleness(minimal: Path) -> None:
    for mode in ("pull", "colocated"):
        learner = load_config(minimal, ["--learner.mode", mode]).learner
        assert (learner.max_staleness, learner.publish_every) == (0, 1)


def test_overrides_are_toml_values_or_text(minimal: Path) -> None:
    config = load_config(
        minimal,
        [
            *("--learner.lr", "2e-6", "--run.steps=7", "--output.plots", "false", "--run.name", "17"),
            *("--rollout.stop", '["\\n", "Q:"]', "--learner.betas=[0.9, 0.95]", "--model.name", "Qwen/Qwen3-0.6B"),
            *("--learner.loss.type", "gspo", "--learner.loss.importance.type", "proximal", "--learner.lora.rank", "4"),
            *("--envs.sums.settings.level", "3", "--envs.more.type", "sokoban", "--envs.more.weight", "2"),
        ],
    )
    assert config.learner.lr == 2e-6
    assert config.run.steps == 7
    assert config.run.name == "17", "text stays text where only text can stand"
    assert config.output.plots is False
    assert config.rollout.stop == ("\n", "Q:")
    assert config.learner.betas == (0.9, 0.95)
    assert config.model.name == "Qwen/Qwen3-0.6B"
    assert isinstance(config.learner.loss, GspoLoss)
    assert isinstance(config.learner.loss.importance, ProximalImportance)
    assert config.learner.lora is not None
    assert config.learner.lora.rank == 4
    assert config.envs["sums"].settings == {"level": 3}
    assert config.envs["more"].weight == 2


def test_the_last_override_counts(minimal: Path) -> None:
    assert load_config(minimal, ["--run.steps", "3", "--run.steps", "4"]).run.steps == 4


def test_none_removes_what_may_be_absent(tmp_path: Path) -> None:
    path = tmp_path / "lora.toml"
    path.write_text(MINIMAL + "[learner.lora]\nrank = 8\n")
    assert load_config(path).learner.lora is not None
    assert load_config(path, ["--learner.lora", "none"]).learner.lora is None
    assert load_config(path, ["--output.tracker", "none"]).output.tracker == "none"
    assert "learner.lr" in refusal(path, "--learner.lr", "none")


def test_choosing_a_mode_drops_the_keys_of_the_other(tmp_path: Path) -> None:
    path = tmp_path / "async.toml"
    path.write_text(MINIMAL + "[learner]\nmax_staleness = 3\npublish_every = 2\nlr = 1e-3\n")
    for order in (
        ["--learner.mode", "pull", "--learner.lr", "1e-4"],
        ["--learner.lr", "1e-4", "--learner.mode", "pull"],
    ):
        learner = load_config(path, order).learner
        assert isinstance(learner, PullLearner)
        assert learner.lr == 1e-4
    for order in (
        ["--learner.mode", "pull", "--learner.max_staleness", "3"],
        ["--learner.max_staleness", "3", "--learner.mode", "pull"],
    ):
        assert 'It belongs to mode = "async", and here mode = "pull"' in refusal(path, *order)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "[learner]\nmax_stalenes = 3\n",
            ["bad.toml, line 4:", '"max_stalenes" in [learner]', 'mean "max_staleness"?'],
        ),
        ("[learner]\nsteps = 3\n", ["line 4", '"steps" in [learner]', "Did you mean run.steps?"]),
        ("[lerner]\nlr = 3\n", ["line 3", '"lerner"', 'Did you mean "learner"?']),
        (
            '[learner]\nmode = "pull"\nmax_staleness = 2\n',
            ["line 5", 'belongs to mode = "async"', 'here mode = "pull"'],
        ),
        ('[learner]\nmode = "sync"\n', ["line 4", 'learner.mode = "sync"', '"async", "pull", "colocated"']),
        ('[learner]\nlr = "2e-6"\n', ["line 4", 'learner.lr = "2e-6"', "a number, at least 0 and at most 1"]),
        ("[learner]\nlr = -1\n", ["learner.lr = -1", "at least 0"]),
        ("[learner]\nlr = nan\n", ["learner.lr = nan"]),
        ("[learner]\nbetas = [0.9]\n", ["learner.betas = [0.9]", "a list of 2 numbers"]),
        ("[learner]\nbetas = [0.9, 1.0]\n", ["learner.betas = 1.0", "below 1"]),
        ("[learner]\npublish_every = 3\n", ["publish_every = 3", "max_staleness = 2"]),
        ("[learner]\nmax_staleness = 0\n", ["learner.max_staleness = 0", "at least 1"]),
        ('[learner]\nloss = "gspo"\n', ["learner.loss", "not a table", 'type = "grpo" or "gspo"']),
        ("[learner.loss.importance]\ncap = 2.0\n", ["line 4", "cap", 'type = "proximal"']),
        ("[learner.loss]\nnormalisation = 'mean'\n", ['"grpo", "bnpo", "dr_grpo", "dapo"']),
        ("[run]\nsteps = 4.5\n", ["run.steps = 4.5", "a whole number"]),
        ("[run]\nsteps = true\n", ["run.steps = true", "a whole number"]),
        ("[run]\nname = '../up'\n", ["run.name", "letters, digits"]),
        ("[run]\nseed = 9223372036854775808\n", ["run.seed"]),
        ("[output]\nplots = 1\n", ["output.plots = 1", "true or false"]),
        ("[output]\ntracker = 'mlflow'\n", ['"none", "tensorboard", "trackio", "wandb"']),
        ("[workers]\ndevice = 'tpu'\n", ["workers.device", "cuda:N"]),
        ("[rollout]\nmax_tokens = 1024\n", ["rollout.max_tokens = 1024", "model.context_tokens = 1024"]),
        ("[rollout]\nlookahead_groups = 4\n", ["lookahead_groups = 4", "groups_per_step = 8"]),
        ("[rollout]\ntemperature = 0\n", ["rollout.temperature = 0", "above 0"]),
        ("[workers]\ncache_tokens = 512\n", ["workers.cache_tokens = 512"]),
        ("[network]\nhost = '0.0.0.0'\ntls = 'off'\n", ["network", "in the clear", '"auto" or "on"']),
        ("[envs.more]\nweight = 2.0\n", ["line 3", '[envs.more] needs the key "type"']),
        ("[envs.'a b']\ntype = 'sokoban'\n", ['the name "a b"', "letters, digits, dashes"]),
        ("[envs.more]\ntype = 'x'\nlevel = 3\n", ["line 5", '"level" in [envs.more]']),
        ("run = 3\n", ["sums"]),
        ("[a]\n[b]\n", ['no key "a"', "1 more"]),
        ("[run\n", ["bad.toml is not valid TOML", "line 3"]),
        ("[run]\nseed = 1\nseed = 2\n", ["not valid TOML", "line 5"]),
        ("x = " + "[" * 5000 + "]" * 5000, ["too deeply"]),
    ],
)
def test_mistakes_are_named_with_place_and_remedy(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(MINIMAL + text)
    message = refusal(path)
    for word in [*words, "bad.toml"]:
        assert word in message, message


def test_no_environment(tmp_path: Path) -> None:
    path = tmp_path / "none.toml"
    for text in ("", "[envs]\n"):
        path.write_text(text)
        assert "no environment to act in" in refusal(path)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["steps", "3"], ["'steps'", "--section.key VALUE"]),
        (["--run.steps"], ["--run.steps has no value"]),
        (["--run.steps", "--run.seed", "3"], ["--run.steps has no value"]),
        (["--", "3"], ["'--'"]),
        (["--run..steps", "3"], ["'--run..steps'"]),
        (["--run.steps.more", "3"], ["--run.steps.more", "steps"]),
        (["--run.stesp", "3"], ["--run.stesp (an override of", 'mean "steps"?']),
        (["--workers.count=two"], ["--workers.count (an override of", 'workers.count = "two"', "a whole number"]),
        (["--run.steps", "3\nseed = 4"], ["run.steps"]),
        (["--run.name", "x" * 70000], ["70000 characters"]),
    ],
)
def test_bad_overrides_are_named(tmp_path: Path, overrides: list[str], words: list[str]) -> None:
    path = tmp_path / "good.toml"
    path.write_text(MINIMAL + "[run]\nsteps = 3\n")
    message = refusal(path, *overrides)
    for word in words:
        assert word in message, message


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    assert "Did you mean arithmetic?" in refusal("arithmetik")
    (tmp_path / "train.toml").write_text(MINIMAL)
    assert f"Did you mean {tmp_path / 'train.toml'}?" in refusal(tmp_path / "trian.toml")
    assert "arithmetic_pull" in refusal("/nowhere/at/all")
    assert "directory" in refusal(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'# caf\xe9\n[envs.a]\ntype = "x"\n')
    assert "not UTF-8 text (byte 5)" in refusal(tmp_path / "latin.toml")
    (tmp_path / "large.toml").write_bytes(b"#" * (2 << 20))
    assert "2097152 bytes" in refusal(tmp_path / "large.toml")


def test_a_file_in_the_way_of_a_shipped_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("lora").name == "lora.toml"
    Path("lora").write_text(MINIMAL)
    assert find_config("lora") == Path("lora")


def test_a_configuration_cannot_be_edited(minimal: Path) -> None:
    config = load_config(minimal)
    with pytest.raises(ValueError, match="frozen"):
        config.run.steps = 3  # type: ignore[misc]


def test_comments_document_every_key(minimal: Path) -> None:
    text = to_toml(load_config(minimal, ["--learner.lora.rank", "4"]), comments=True)
    lines = text.splitlines()
    undocumented = [
        line for before, line in zip(["", *lines], lines, strict=False) if " = " in line and not before.startswith("#")
    ]
    undocumented = [line for line in undocumented if not line.startswith("#")]
    assert undocumented == []
    assert config_from(tomllib.loads(text)) == load_config(minimal, ["--learner.lora.rank", "4"])
