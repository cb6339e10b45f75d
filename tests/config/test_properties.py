"""Properties: what is written reads back equal, and no file or override ends in anything but a ConfigError."""

from __future__ import annotations

import tomllib
from typing import Any

import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.config import Config, config_from, to_toml
from shoal.config.explain import line_of
from shoal.config.schema import kinds_of, locate, tag_values
from shoal.errors import ConfigError

text = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=12)
scalars = st.one_of(text, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False))
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=8
)
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,8}", fullmatch=True)


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, exclude_min=True, exclude_max=True)


losses = st.fixed_dictionaries(
    {"type": st.sampled_from(["grpo", "gspo"])},
    optional={
        "eps_low": numbers(0, 1),
        "kl_beta": numbers(0, 1),
        "delta": numbers(1, 10),
        "normalisation": st.sampled_from(["grpo", "bnpo", "dr_grpo", "dapo"]),
        "importance": st.just({"type": "behaviour"}) | st.fixed_dictionaries({"type": st.just("proximal")}),
    },
)
learners = st.one_of(
    st.fixed_dictionaries(
        {"mode": st.sampled_from(["pull", "colocated"]), "lr": numbers(0, 1), "loss": losses},
        optional={"lora": st.fixed_dictionaries({"rank": st.integers(1, 64), "targets": st.lists(text, max_size=3)})},
    ),
    st.integers(1, 9).flatmap(
        lambda s: st.fixed_dictionaries({"max_staleness": st.just(s), "publish_every": st.integers(1, s)})
    ),
)
configurations = st.fixed_dictionaries(
    {
        "envs": st.dictionaries(
            names,
            st.fixed_dictionaries(
                {"type": st.text(min_size=1, max_size=9), "weight": numbers(0, 9)},
                optional={"settings": st.dictionaries(text, trees, max_size=4)},
            ),
            min_size=1,
            max_size=3,
        ),
        "learner": learners,
    },
    optional={
        "run": st.fixed_dictionaries({"seed": st.integers(0, 2**63 - 1)}, optional={"name": names}),
        "rollout": st.fixed_dictionaries({"stop": st.lists(text, max_size=3)}),
    },
)


@given(configurations, st.booleans())
@settings(max_examples=150)
def test_what_is_written_reads_back_equal(tables: dict[str, Any], comments: bool) -> None:
    config = config_from(tables)
    assert config_from(tomllib.loads(to_toml(config, comments=comments))) == config


def valid() -> dict[str, Any]:
    return {"envs": {"sums": {"type": "arithmetic"}}, "learner": {"mode": "async", "loss": {"type": "grpo"}}}


def all_paths(annotation: Any = Config, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all fields of all kinds of all sections."""
    found: list[tuple[str, ...]] = []
    for section in kinds_of(annotation):
        for name, field in section.model_fields.items():
            found.append((*prefix, name))
            found += all_paths(field.annotation, (*prefix, name))
    return sorted(set(found))


@given(st.sampled_from(all_paths()), trees | st.none())
@settings(max_examples=300)
def test_any_value_anywhere_loads_or_is_explained(path: tuple[str, ...], value: Any) -> None:
    tables = valid()
    table = tables
    for key in path[:-1]:
        table = table.setdefault(key, {})
    table[path[-1]] = value
    try:
        config = config_from(tables)
    except ConfigError as error:
        assert error.problem
        assert error.remedy
    else:
        assert config_from(tomllib.loads(to_toml(config))) == config


@given(
    st.lists(st.sampled_from(all_paths()).map(".".join) | names, max_size=3), st.lists(text, max_size=3), st.booleans()
)
@settings(max_examples=300)
def test_any_overrides_load_or_are_explained(keys: list[str], values: list[str], joined: bool) -> None:
    pairs = list(zip(keys, values, strict=False))
    arguments = [f"--{k}={v}" for k, v in pairs] if joined else [x for k, v in pairs for x in (f"--{k}", v)]
    try:
        config_from(valid(), arguments)
    except ConfigError as error:
        assert error.problem


@given(st.sampled_from(all_paths()), scalars)
def test_a_quoted_override_is_what_the_file_would_say(path: tuple[str, ...], value: Any) -> None:
    tables = valid()
    table = tables
    for key in path[:-1]:
        table = table.setdefault(key, {})
    table[path[-1]] = value
    literal = tomli_w.dumps({"": value}).removeprefix('"" = ').rstrip("\n")

    def outcome(data: dict[str, Any], overrides: list[str]) -> Any:
        try:
            return config_from(data, overrides)
        except ConfigError:
            return "refused"

    written, overridden = outcome(tables, []), outcome(valid(), [f"--{'.'.join(path)}={literal}"])
    if written != "refused":
        assert overridden == written


def test_every_field_is_documented_and_found() -> None:
    for path in all_paths():
        fields = [
            section.model_fields[path[-1]]
            for section in kinds_of(Config if len(path) == 1 else _annotation_at(path[:-1]))
            if path[-1] in section.model_fields
        ]
        assert fields, path
        assert all(field.description for field in fields), path


def _annotation_at(path: tuple[str, ...]) -> Any:
    annotation: Any = Config
    for key in path:
        holders = [kind for kind in kinds_of(annotation) if key in kind.model_fields]
        annotation = holders[0].model_fields[key].annotation
    return annotation


def test_tags_tell_kinds_apart() -> None:
    key, kinds = tag_values(kinds_of(Config.model_fields["learner"].annotation))
    assert key == "mode"
    assert list(kinds) == ["async", "pull", "colocated"]
    assert locate(("learner", "max_staleness"), {"learner": {"mode": "pull"}}).unknown_at == 1
    assert locate(("learner", "max_staleness"), {}).unknown_at is None
    assert locate(("envs", "a", "settings", "b", "c"), {}).unknown_at is None


def test_line_of_finds_keys_and_tables() -> None:
    document = "# top\n[run]\nsteps = 3\n\n[envs.a]\ntype = 'x'\n[envs.'a'.settings]\ndeep.er = 1\n"
    assert line_of(document, ("run", "steps")) == 3
    assert line_of(document, ("run", "seed")) == 2
    assert line_of(document, ("envs", "a", "type")) == 6
    assert line_of(document, ("envs", "a", "settings", "deep", "er")) == 8
    assert line_of(document, ("learner",)) is None


@given(st.text(), st.lists(text, max_size=3))
def test_line_of_survives_any_text(document: str, path: list[str]) -> None:
    line = line_of(document, path)
    assert line is None or 1 <= line <= len(document.splitlines())
