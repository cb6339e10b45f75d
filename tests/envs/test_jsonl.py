"""Question files: splits by text, three graders, and a clear word about every bad line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.envs.registry import make
from shoal.errors import TaskError
from shoal.protocol.codec import decode, encode
from shoal.protocol.episode import Task


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def gsm(tmp_path: Path) -> Path:
    return write(
        tmp_path / "gsm.jsonl",
        [{"question": f"Tom has {i} apples.", "answer": f"He has {i}.\n#### {i * 1000:,}"} for i in range(300)],
    )


async def test_gsm8k_format(gsm: Path) -> None:
    env = make("jsonl", {"path": str(gsm), "instruction": "Think."}, name="gsm")
    task = next(t for t in env.tasks("train") if t.data["question"] == "Tom has 7 apples.")
    assert (await env.reset(task)).messages[-1].content == "Tom has 7 apples. Think."
    for reply, strict, lenient in [("So 7000.", 1, 1), ("#### 7,000", 1, 1), ("7000 apples", 0, 1), ("7", 0, 0)]:
        step = await env.score(task, [reply])
        assert (step.reward, step.info["lenient"]) == (strict, lenient)
    assert (await env.score(task, ["7000"], truncated=[True])).reward == 0


def test_splits_are_disjoint_and_an_epoch_asks_everything_once(gsm: Path) -> None:
    env = make("jsonl", {"path": str(gsm)})
    heldout = env.heldout()
    n = 300 - len(heldout)
    assert 10 <= len(heldout) <= 60
    first, second = ([env.task("train", epoch * n + i, 3).id for i in range(n)] for epoch in (0, 1))
    assert set(first) == set(second)
    assert len(set(first)) == n
    assert first != second
    assert set(first).isdisjoint(t.id for t in heldout)
    assert [env.task("train", i, 4).id for i in range(n)] != first
    assert [t.id for t in env.heldout(5)] == [t.id for t in heldout[:5]]


def test_a_question_of_the_second_file_is_not_trained_on(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [{"question": f"q{i}?", "answer": i} for i in range(10)])
    test = write(tmp_path / "b.jsonl", [{"question": " Q3? ", "answer": 3}, {"question": "new?", "answer": 1}])
    env = make("jsonl", {"path": str(train), "heldout_path": str(test)})
    trained = {env.task("train", i, 0).data["question"] for i in range(9)}
    assert trained == {f"q{i}?" for i in range(10)} - {"q3?"}
    assert {t.data["question"] for t in env.heldout()} == {"Q3?", "new?"}


async def test_a_worker_needs_no_copy_of_the_file(gsm: Path) -> None:
    env = make("jsonl", {"path": str(gsm)})
    task = decode(encode(env.task("train", 0, 0)), Task)
    elsewhere = make("jsonl", {"path": f"{gsm}.elsewhere"})
    await elsewhere.reset(task)
    assert (await elsewhere.step(task.data["answer"])).reward == 1
    with pytest.raises(TaskError, match="cannot be read"):
        elsewhere.task("train", 0, 0)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"question": "one?", "answer": 1}])
    env = make("jsonl", {"path": str(path), "heldout_path": str(path)})
    assert len(env.heldout()) == 1
    write(path, [{"question": f"q{i}?", "answer": 1} for i in range(4)])
    assert len(env.heldout()) == 4


async def test_exact_and_choice_graders(tmp_path: Path) -> None:
    rows = [{"question": "Capital of France?", "answer": "Paris"}]
    path = str(write(tmp_path / "exact.jsonl", rows))
    exact = make("jsonl", {"path": path, "heldout_path": path, "grader": "exact"})
    task = exact.heldout()[0]
    for reply, strict, lenient in [("**paris.**", 1, 1), ("Hm.\nParis of course", 0, 1), ("Parisian", 0, 0)]:
        assert (await exact.score(task, [reply])).info == {"strict": strict, "lenient": lenient}

    options = ["red", "green", "blue"]
    rows = [{"q": "Which?", "a": a, "choices": options, "n": i} for i, a in enumerate(["B", 1, "green"])]
    for i, row in enumerate(rows):
        path = str(write(tmp_path / f"choice{i}.jsonl", [row]))
        keys = {"question_key": "q", "answer_key": "a", "grader": "choice"}
        env = make("jsonl", {"path": path, "heldout_path": path, **keys})
        task = env.heldout()[0]
        assert (await env.reset(task)).messages[-1].content == "Which?\nA) red\nB) green\nC) blue"
        for reply, right in [("B", 1), ("The answer is (b).", 1), ("green", 1), ("C", 0), ("", 0)]:
            assert (await env.score(task, [reply])).reward == right


@pytest.mark.parametrize(
    ("lines", "settings", "words"),
    [
        (['{"question": "a?", "answer": 1}', '{"prompt": "b?", "answer": 1}'], {}, ["line 2", "'question'", "prompt"]),
        (['{"question": "a?", "answer": "yes"}'], {}, ["line 1", "not a number", "exact"]),
        (["nonsense"], {}, ["line 1", "not JSON"]),
        (["[1]"], {}, ["line 1", "not a JSON object"]),
        (["[" * 100_000], {}, ["line 1", "not JSON"]),
        (["", " "], {}, ["no questions"]),
        (['{"question": "a?", "answer": "x"}'], {"grader": "choice"}, ["line 1", "choices"]),
        (['{"question": "a?", "answer": "9", "choices": ["x", "y"]}'], {"grader": "choice"}, ["none of its choices"]),
    ],
)
def test_a_bad_file_is_named_with_its_line(
    tmp_path: Path, lines: list[str], settings: dict[str, str], words: list[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(TaskError) as caught:
        make("jsonl", {"path": str(path), **settings}).task("train", 0, 0)
    for word in [*words, "bad.jsonl"]:
        assert word in str(caught.value)


def test_a_missing_or_binary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_DATA", str(tmp_path))
    with pytest.raises(TaskError, match=r"none\.jsonl cannot be read: No such file") as caught:
        make("jsonl", {"path": "$SHOAL_DATA/none.jsonl"}).heldout()
    assert str(tmp_path) in str(caught.value)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TaskError, match="not UTF-8"):
        make("jsonl", {"path": "$SHOAL_DATA/binary"}).heldout()


@pytest.mark.parametrize(
    "data", [{}, {"question": "a?"}, {"question": "a?", "answer": "x"}, {"question": 1, "answer": "1"}]
)
async def test_a_task_without_its_question_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(TaskError):
        await make("jsonl", {"path": "x"}).reset(Task(env="jsonl", id="1", seed=0, data=data))
