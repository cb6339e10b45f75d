"""Public sets are read in their published form, and scored as their authors do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import ConfigError
from shoal.memory.public import fever, hotpot, locomo
from shoal.memory.public.scoring import answers_overlap, exact_match, fever_score, locomo_f1, locomo_list_f1, recall_of


@given(st.text(), st.text())
def test_marks_are_shares_and_an_answer_agrees_with_itself(one: str, other: str) -> None:
    for mark in (answers_overlap(one, other).f1, locomo_f1(one, other), locomo_list_f1(one, other)):
        assert 0.0 <= mark <= 1.0
    assert exact_match(one, one) == 1.0
    assert answers_overlap(one, other).f1 == pytest.approx(answers_overlap(other, one).f1)


def test_answers_are_compared_as_hotpotqa_does() -> None:
    assert exact_match("The  Eiffel tower!", "eiffel Tower") == 1.0
    assert answers_overlap("the big red tower", "red tower").f1 == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    assert answers_overlap("yes", "yes").f1 == 1.0
    assert answers_overlap("yes it is", "yes").f1 == 0.0
    assert answers_overlap("Chief of Protocol", "no").f1 == 0.0


def test_hotpotqa(tmp_path: Path) -> None:
    row = {
        "_id": "5a8b57f25542995d1e6f1371",
        "answer": "yes",
        "question": "Were Scott Derrickson and Ed Wood of the same nationality?",
        "supporting_facts": [["Scott Derrickson", 0], ["Ed Wood", 0]],
        "context": [
            ["Ed Wood (film)", ["A film."]],
            ["Scott Derrickson", ["He is American."]],
            ["Ed Wood", ["So he."]],
        ],
        "type": "comparison",
        "level": "hard",
    }
    path = tmp_path / "hotpot.json"
    path.write_text(json.dumps([row, row]))
    (question,) = hotpot.read(path, most=1)
    assert question.sentences["Ed Wood", 0] == "So he."
    marks = hotpot.score(question, "Yes.", [("Scott Derrickson", 0), ("Ed Wood (film)", 0)])
    assert (marks.em, marks.facts_em, marks.joint_em) == (1.0, 0.0, 0.0)
    assert marks.facts.f1 == marks.joint_f1 == 0.5
    perfect = hotpot.score(question, "yes", [("Ed Wood", 0), ("Scott Derrickson", 0)])
    assert perfect.joint_em == perfect.joint_f1 == 1.0
    path.write_text("{}")
    with pytest.raises(ConfigError, match="published"):
        hotpot.read(path)


def test_fever(tmp_path: Path) -> None:
    lines = [
        {
            "id": 91198,
            "verifiable": "NOT VERIFIABLE",
            "label": "NOT ENOUGH INFO",
            "claim": "Colin Kaepernick became a starter.",
            "evidence": [[[108548, None, None, None]]],
        },
        {
            "id": 194462,
            "verifiable": "VERIFIABLE",
            "label": "SUPPORTS",
            "claim": "Tilda Swinton is a vegan.",
            "evidence": [[[1, 2, "Tilda_Swinton", 7], [1, 2, "Vegan", 0]], [[3, 4, "Tilda_Swinton", 9]]],
        },
    ]
    path = tmp_path / "dev.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    unknown, supported = fever.read(path)
    assert fever.score(unknown, "NOT ENOUGH INFO", []).fever == 1.0
    assert fever.score(unknown, "SUPPORTS", []).label == 0.0
    assert fever.score(supported, "SUPPORTS", [("Tilda_Swinton", 7)]) == fever.Marks(1.0, 0.0)
    assert fever.score(supported, "SUPPORTS", [("Vegan", 0), ("Tilda_Swinton", 7)]).fever == 1.0
    assert fever.score(supported, "REFUTES", [("Tilda_Swinton", 9)]).fever == 0.0
    late = [(f"p{n}", 0) for n in range(5)]
    assert fever_score("SUPPORTS", [*late, ("Tilda_Swinton", 9)], "SUPPORTS", supported.sets) == 0.0
    pages = tmp_path / "wiki-pages"
    pages.mkdir()
    page = {"id": "Vegan", "text": "…", "lines": "0\tA vegan eats no meat.\tmeat\n1\t\n2\tSecond.\tx"}
    (pages / "wiki-001.jsonl").write_text(json.dumps(page) + "\n")
    assert fever.sentences(pages, ["Vegan", "Nobody"]) == {
        ("Vegan", 0): "A vegan eats no meat.",
        ("Vegan", 2): "Second.",
    }
    path.write_text('{"id": "x"}\n')
    with pytest.raises(ConfigError, match="line 1"):
        fever.read(path)


def test_locomo(tmp_path: Path) -> None:
    sample = {
        "sample_id": "conv-26",
        "conversation": {
            "speaker_a": "Caroline",
            "speaker_b": "Melanie",
            "session_1_date_time": "1:56 pm on 8 May, 2023",
            "session_1": [
                {"speaker": "Caroline", "dia_id": "D1:1", "text": "I went to a support group."},
                {"speaker": "Melanie", "dia_id": "D1:2", "text": "Nice!", "blip_caption": "a photo of a dog"},
            ],
            "session_2_date_time": "later",
            "session_2": [{"speaker": "Caroline", "dia_id": "D2:1", "text": "I like hiking, painting and pottery."}],
        },
        "qa": [
            {"question": "When?", "answer": "7 May 2023", "evidence": ["D1:1"], "category": 2},
            {"question": "Hobbies?", "answer": "hiking, pottery", "evidence": ["D2:1; D1:2"], "category": 1},
            {"question": "Year?", "answer": 2022, "evidence": ["D9:9"], "category": 2},
            {"question": "Cats?", "adversarial_answer": "two cats", "evidence": ["D1:2"], "category": 5},
        ],
    }
    path = tmp_path / "locomo10.json"
    path.write_text(json.dumps([sample]))
    (conversation,) = locomo.read(path)
    assert [turn.id for turn in conversation.turns] == ["D1:1", "D1:2", "D2:1"]
    assert conversation.turns[1].words == "(1:56 pm on 8 May, 2023) Melanie: Nice! [shows a photo of a dog]"
    when, hobbies, year, cats = conversation.questions
    assert hobbies.evidence == ("D2:1", "D1:2") and year.answer == "2022"
    assert list(locomo.with_evidence(conversation)) == [when, hobbies, cats]
    assert recall_of(["D2:1", "D3:3"], hobbies.evidence) == 0.5
    assert locomo.score(when, "on 7 May") == pytest.approx(2 * (2 / 3) * (2 / 3) / (4 / 3))
    assert locomo.score(hobbies, "pottery, swimming") == 0.5
    assert locomo.score(cats, "No information available.") == 1.0 and locomo.score(cats, "two cats") == 0.0
    path.write_text(json.dumps([{"conversation": {}, "qa": []}]))
    with pytest.raises(ConfigError, match="no sessions"):
        locomo.read(path)
