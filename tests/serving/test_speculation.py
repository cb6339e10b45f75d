"""`shoal serve --draft`: the same answers, counted; lossy rules marked, and refused where answers are recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_cases import make_checkpoint
from pydantic import ValidationError
from serving_cases import MODEL, ChatServer, start

from shoal.config import Serving
from shoal.config.speculation import FlyRule, MarginRule, SemanticRule, StrictRule, TypicalRule
from shoal.engine.source import LocalModel
from shoal.engine.speculation import profile
from shoal.engine.speculation.fly import Fly
from shoal.engine.speculation.margin import Margin
from shoal.engine.speculation.profile import Profile, Threshold
from shoal.engine.speculation.semantic import Semantic
from shoal.engine.speculation.strict import Strict
from shoal.engine.speculation.typical import Typical
from shoal.errors import ConfigError, ModelError, RecordError
from shoal.serving.speculation import rule_of, speculations

ASKED: dict[str, Any] = {"model": MODEL, "prompt": "the thing in the wall", "max_tokens": 60, "temperature": 0}
ASKED |= {"logit_bias": {}, "n": 2}
CALIBRATED = Threshold(value=0.4, loss=0.01, loss_bound=0.02, tokens=1000, drafter="ngram", form="ratio")


def texts(server: ChatServer, body: dict[str, Any] = ASKED) -> tuple[list[str], str]:
    response = server.post("/completions", body)
    assert response.status_code == 200, response.text
    found = response.json()
    return [choice["text"] for choice in found["choices"]], found["system_fingerprint"]


def test_answers_are_the_model_s_own_and_counted(server: ChatServer, model: Path, tmp_path: Path) -> None:
    wanted = texts(server)
    streamed = {**ASKED, "n": 1, "stop": ["zz"]}
    with start(model, tmp_path, "--draft", "ngram") as drafting:
        assert texts(drafting) == wanted
        assert texts(drafting, streamed) == texts(server, streamed)
        rounds = drafting.metric("shoal_speculation_rounds_total")
        drafted, accepted = (drafting.metric(f"shoal_tokens_{name}_total") for name in ("drafted", "accepted"))
        assert drafted >= accepted >= 0 and drafted >= rounds
    assert server.metric("shoal_speculation_rounds_total") == 0


@pytest.mark.slow
def test_stages_draft_too(server: ChatServer, tmp_path: Path) -> None:
    deep = make_checkpoint(tmp_path / "deep", num_hidden_layers=4, max_position_embeddings=2048)
    plain_folder, folder = tmp_path / "plain", tmp_path / "drafting"
    plain_folder.mkdir()
    folder.mkdir()
    with start(deep, plain_folder) as plain, start(deep, folder, "--stages", "2", "--draft", str(deep)) as drafting:
        assert texts(drafting) == texts(plain)
        assert drafting.metric("shoal_tokens_accepted_total") > 0


def test_a_lossy_rule_is_marked(model: Path, tmp_path: Path) -> None:
    with start(model, tmp_path, "--draft", "ngram", "--rule", "margin", "--theta", "0.5") as server:
        assert texts(server)[1] == "v0-margin"
        chat = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
        assert server.post("/chat/completions", chat).json()["system_fingerprint"] == "v0-margin"
        answer = server.post("/responses", {"model": MODEL, "input": "hi", "max_output_tokens": 3}).json()
        assert answer["system_fingerprint"] == "v0-margin"


def test_a_lossy_rule_is_refused_where_answers_are_recorded(model: Path, tmp_path: Path) -> None:
    local = LocalModel("tiny", model)
    asked = {"draft": "ngram", "rule": {"type": "margin"}}
    with pytest.raises(ConfigError, match="rule margin changes what the model says"):
        speculations(local, Serving(speculation=asked, capture=str(tmp_path)), None)  # type: ignore[arg-type]
    strict = {"draft": "ngram"}
    assert speculations(local, Serving(speculation=strict, capture=str(tmp_path)), None)  # type: ignore[arg-type]
    assert speculations(local, Serving(), None) is None


def test_a_drafter_with_another_tokenizer_is_refused(model: Path, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other")
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    assert '"Ġthe"' in text
    (other / "tokenizer.json").write_text(text.replace('"Ġthe"', '"Ġxyz"'), encoding="utf-8")
    asked = Serving(speculation={"draft": str(other)}, dtype="fp32", device="cpu")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"another tokenizer|damaged|tokenizer"):
        speculations(LocalModel("tiny", model), asked, LocalModel("other", other))


def test_rules_come_from_settings_and_from_the_model_s_profile(tmp_path: Path) -> None:
    empty = Profile()
    assert rule_of(StrictRule(), empty) == Strict()
    assert rule_of(MarginRule(), empty) == Margin(0.9, "logits")
    assert rule_of(MarginRule(theta=0.3, form="difference"), empty) == Margin(0.3, "difference")
    assert rule_of(SemanticRule(tau=0.2), empty) == Semantic(0.2)
    assert rule_of(TypicalRule(), empty) == Typical() and rule_of(FlyRule(), empty) == Fly()
    known = Profile(margin=CALIBRATED, semantic=Threshold(value=0.6, loss=0, loss_bound=0.1, tokens=9, drafter="x"))
    path = profile.save(tmp_path, known)
    assert profile.load(tmp_path) == known and path.parent == tmp_path
    assert rule_of(MarginRule(), known) == rule_of(MarginRule(form="ratio"), known) == Margin(0.4, "ratio")
    assert rule_of(MarginRule(form="logits"), known) == Margin(0.9, "logits")
    assert rule_of(MarginRule(theta=0.8), known) == Margin(0.8, "logits")
    assert rule_of(SemanticRule(), known) == Semantic(0.6)
    assert profile.load(tmp_path / "nowhere") == empty


@pytest.mark.parametrize(
    "text", ["", "[]", '{"margin": 3}', '{"other": null}', '{"margin": {"value": -1}}', "x" * 100_000]
)
def test_a_damaged_profile_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / profile.FILE).write_text(text)
    with pytest.raises(RecordError, match="no profile"):
        profile.load(tmp_path)


def test_a_threshold_is_only_given_to_a_rule_that_has_one() -> None:
    for rule in ({"type": "strict", "theta": 0.5}, {"type": "fly", "tau": 0.5}, {"theta": 1.0}):
        with pytest.raises(ValidationError):
            Serving(speculation={"draft": "ngram", "rule": rule})  # type: ignore[arg-type]
