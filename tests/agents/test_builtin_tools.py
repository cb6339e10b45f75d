"""The built-in tools: exact arithmetic, documents, search, Python in the sandbox."""

from __future__ import annotations

import math
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.agents.builtin.bm25 import K1, B, Bm25, words
from shoal.agents.builtin.calculator import calculate
from shoal.agents.builtin.catalogue import NEEDS_ROOT, Surroundings, builtin_tools
from shoal.agents.builtin.fusion import K, fused
from shoal.agents.builtin.text import CHUNK_CHARS, chunks, files_below, html_text, read_text
from shoal.agents.tools.function import ToolError
from shoal.agents.tools.outcome import Failure, Outcome, Success
from shoal.errors import ConfigError
from shoal.sandbox import Sandbox

expressions = st.recursive(
    st.integers(0, 10**6).map(str),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*"]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        inner.map(lambda one: f"-{one}"),
    ),
    max_leaves=12,
)


@given(expressions)
def test_arithmetic_is_exact(expression: str) -> None:
    assert calculate(expression) == str(eval(expression))  # noqa: S307 - made of digits and operators here


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1/4 + 1/4", "0.5"),
        ("1/3", "1/3 (about 0.333333333333333)"),
        ("0.1 + 0.2", "0.3"),
        ("2 ^ 10 × 3", "3072"),
        ("max(2, 7) // 2 % 2", "1"),
        ("sqrt(16) + round(2.6)", "7"),
        ("7 ** -1 * 7", "1"),
    ],
)
def test_expressions_as_people_write_them(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        *("", "1/0", "2 ** 99999999", "9" * 1999, "__import__('os')", "[1]*9", "a", "1 if 1 else 2", "sqrt(-1)"),
        *("max()", "min(1, key=2)", "True + 1", "9**9**9", "1e999999999", "sqrt(10 ** 999)", "(" * 900 + ")" * 900),
    ],
)
def test_what_is_no_arithmetic_takes_no_time_and_says_so(expression: str) -> None:
    with pytest.raises(ToolError):
        calculate(expression)


@given(st.lists(st.text(st.characters(blacklist_characters="\r"), max_size=50), max_size=30), st.integers(0, 4))
def test_chunks_in_order_are_the_text(lines: list[str], copies: int) -> None:
    text = "\n".join(lines * (1 + 20 * copies))
    found = chunks(text)
    assert "\n".join(found) == text and all(len(one) <= CHUNK_CHARS for one in found)


def test_a_long_line_is_cut() -> None:
    found = chunks("x" * (3 * CHUNK_CHARS))
    assert len(found) == 3 and "".join(found) == "x" * (3 * CHUNK_CHARS)


def test_nothing_outside_the_folder_is_read(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("secret")
    (root / "sub" / "a.md").write_text("text")
    (root / "link.txt").symlink_to(tmp_path / "secret.txt")
    (root / "b.exe").write_text("no text")
    assert files_below(root) == ["sub/a.md"]
    assert read_text(root, "sub/a.md") == "text"
    for name in ("../secret.txt", "link.txt", str(tmp_path / "secret.txt"), "sub", "b.exe", "missing.md", "a\0.md", ""):
        with pytest.raises(ToolError):
            read_text(root, name)


def test_a_page_is_its_words() -> None:
    page = "<head><title>no</title></head><p>One &amp; two</p><script>no()</script><table><tr><td>a</td><td>b</td></tr>"
    assert html_text(page) == "One & two\n| a | b"


def make_pdf(words_: str) -> bytes:
    """The smallest file that is a PDF with one line of text."""
    stream = f"BT /F1 12 Tf 20 100 Td ({words_}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 200] /Contents 4 0 R"
        b" /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    made, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, start=1):
        places.append(len(made))
        made += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    start = len(made)
    made += b"xref\n0 %d\n0000000000 65535 f \n%s" % (len(objects) + 1, table)
    return made + b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, start)


def test_a_pdf_is_read_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(make_pdf("The blue whale weighs 150 tonnes"))
    (tmp_path / "b.pdf").write_bytes(b"%PDF-1.4\nnothing of the kind")
    assert read_text(tmp_path, "a.pdf").strip() == "The blue whale weighs 150 tonnes"
    with pytest.raises(ToolError, match="cannot be read as a PDF"):
        read_text(tmp_path, "b.pdf")


async def perform(name: str, tool: str, root: Path | None = None, **arguments: Any) -> Outcome:
    (found,) = (one for one in builtin_tools(name, Surroundings(root)) if one.card.name == tool)
    return await found.call(arguments, lambda _: None)


async def test_documents_are_listed_read_in_chunks_and_searched(tmp_path: Path) -> None:
    lines = [f"line {n} of the log" + (" ERROR" if n % 100 == 0 else "") for n in range(1000)]
    (tmp_path / "log.txt").write_text("\n".join(lines))
    assert await perform("documents", "list_documents", tmp_path) == Success(value=["log.txt"])
    first = await perform("documents", "read_document", tmp_path, document="log.txt")
    assert isinstance(first, Success) and first.value["chunks"] > 5
    texts = []
    for number in range(first.value["chunks"]):
        chunk = await perform("documents", "read_document", tmp_path, document="log.txt", chunk=number)
        assert isinstance(chunk, Success)
        texts.append(chunk.value["text"])
    assert "\n".join(texts) == "\n".join(lines)
    beyond = await perform("documents", "read_document", tmp_path, document="log.txt", chunk=len(texts))
    assert isinstance(beyond, Failure)
    found = await perform("documents", "find_in_document", tmp_path, document="log.txt", words="error")
    assert isinstance(found, Success) and len(found.value) == 10


async def test_the_corpus_gives_the_passage_that_fits(tmp_path: Path) -> None:
    (tmp_path / "whales.md").write_text("The blue whale weighs 150 tonnes.")
    (tmp_path / "birds.md").write_text("The robin weighs twenty grams. The robin sings.")
    (tmp_path / "broken.pdf").write_bytes(b"nothing")
    found = await perform("corpus", "search", tmp_path, query="What does a blue whale weigh?", count=1)
    assert isinstance(found, Success)
    (hit,) = found.value
    assert hit["document"] == "whales.md" and hit["score"] > 0


@given(st.lists(st.text("abc ", max_size=12), max_size=8), st.text("abcd ", max_size=8), st.integers(1, 5))
def test_bm25_is_its_formula(texts: list[str], query: str, count: int) -> None:
    lengths = [len(words(text)) for text in texts]
    mean = (sum(lengths) / len(texts) if texts else 0) or 1.0
    expected = {}
    for number, text in enumerate(texts):
        counts = Counter(words(text))
        score = 0.0
        for term in set(words(query)):
            n = sum(term in words(other) for other in texts)
            idf = math.log(1 + (len(texts) - n + 0.5) / (n + 0.5))
            f = counts[term]
            score += idf * f * (K1 + 1) / (f + K1 * (1 - B + B * lengths[number] / mean))
        if score:
            expected[number] = score
    found = Bm25(texts).best(query, count)
    ranked = sorted(expected.items(), key=lambda item: (-round(item[1], 9), item[0]))[:count]
    assert len(found) == len(ranked)
    assert [round(score, 6) for _, score in found] == [round(score, 6) for _, score in ranked]
    assert all(math.isclose(expected[number], score) for number, score in found)


def test_the_catalogue_names_what_is_missing(tmp_path: Path) -> None:
    assert all(builtin_tools(name, Surroundings(tmp_path)) for name in ("calculator", "python", *NEEDS_ROOT[:2], "web"))
    for name, root in (("chess", None), ("documents", None), ("corpus", tmp_path / "nothing"), ("pages", None)):
        with pytest.raises(ConfigError):
            builtin_tools(name, Surroundings(root))
    with pytest.raises(ConfigError, match="no address of a search service"):
        builtin_tools("web", Surroundings(search_url="searx"))


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shoal.agents.builtin.evm", None)
    with pytest.raises(ConfigError, match="shoal\\[evm\\]"):
        builtin_tools("evm")


@given(st.lists(st.lists(st.integers(0, 9), unique=True, max_size=8), max_size=3), st.integers(1, 5))
def test_fused_ranks_are_their_formula(rankings: list[list[int]], count: int) -> None:
    expected = {
        one: sum(1 / (K + ranking.index(one) + 1) for ranking in rankings if one in ranking)
        for one in {number for ranking in rankings for number in ranking}
    }
    found = fused(rankings, count)
    assert len(found) == min(count, len(expected))
    assert all(math.isclose(expected[number], score) for number, score in found)
    assert all(expected[number] <= found[-1][1] + 1e-12 for number in expected.keys() - dict(found).keys())


async def test_the_corpus_finds_other_spellings_of_a_word(tmp_path: Path) -> None:
    """Words alone find nothing here: no term of the question is in the text as it is written there."""
    (tmp_path / "a.md").write_text("Photosynthesising organisms take up carbon.")
    (tmp_path / "b.md").write_text("The harbour was closed on Sundays.")
    assert not Bm25(["Photosynthesising organisms take up carbon."]).best("photosynthesis", 1)
    found = await perform("corpus", "search", tmp_path, query="photosynthesis", count=1)
    assert isinstance(found, Success) and found.value[0]["document"] == "a.md"


@pytest.mark.slow
async def test_python_runs_in_the_sandbox() -> None:
    if not (await Sandbox.available()).python:
        pytest.skip("this machine has no sandbox")
    ran = await perform("python", "run_python", program="import sys; print(6 * 7); print('no', file=sys.stderr)")
    assert ran == Success(value={"stdout": "42\n", "stderr": "no\n", "ended": "ok"})
    for program in ("open('/etc/shadow')", "import socket; socket.create_connection(('127.0.0.1', 22))", "1 // 0"):
        ran = await perform("python", "run_python", program=program)
        assert isinstance(ran, Success) and ran.value["ended"] == "exit" and "Error" in ran.value["stderr"]


def test_fractions_are_reduced() -> None:
    assert Fraction(calculate("6/4")) == Fraction(3, 2)
