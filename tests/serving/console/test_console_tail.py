"""Lines of a growing file: each once, whole, in order, however it is written and read."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from shoal.serving.console import tail as module
from shoal.serving.console.tail import MAX_LINE_BYTES, Tail

LINE = st.binary(min_size=1, max_size=40).filter(lambda line: b"\n" not in line and line.strip())
BYTES = MAX_LINE_BYTES + 1


@given(lines=st.lists(LINE, max_size=20), cuts=st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_every_line_once_however_it_is_written(lines: list[bytes], cuts: list[int]) -> None:
    data = b"".join(line + b"\n" for line in lines)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines"
        tail, found, at, turn = Tail(path), [], 0, 0
        while at < len(data):
            with path.open("ab") as file:
                file.write(data[at : at + cuts[turn % len(cuts)]])
            at, turn = at + cuts[turn % len(cuts)], turn + 1
            read = tail.read(BYTES)
            assert not read.anew
            found += read.lines
    assert found == lines


def test_a_file_is_read_in_pieces(tmp_path: Path) -> None:
    path, line = tmp_path / "lines", b"x" * 1000
    path.write_bytes((line + b"\n") * 3000)
    tail, sizes = Tail(path), []
    while not sizes or tail.behind_bytes:
        sizes.append(len(tail.read(BYTES).lines))
    assert sum(sizes) == 3000
    assert len(sizes) == 3
    assert tail.share_read == 1.0


def test_an_unfinished_line_waits(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"one\ntw")
    tail = Tail(path)
    assert tail.read(BYTES).lines == (b"one",)
    assert tail.behind_bytes == 2
    with path.open("ab") as file:
        file.write(b"o\n")
    assert tail.read(BYTES).lines == (b"two",)


def test_a_line_without_end_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"one\n" + b"x" * (3 * MAX_LINE_BYTES) + b"\ntwo\n")
    tail, found = Tail(path), []
    for _ in range(5):
        found += tail.read(BYTES).lines
    assert found == [b"one", b"two"]
    assert tail.num_skipped == 1


def test_another_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"one\ntwo\n")
    tail = Tail(path)
    assert tail.read(BYTES).lines == (b"one", b"two")
    path.write_bytes(b"a\n")  # shorter: cut, or written again
    read = tail.read(BYTES)
    assert read.anew
    assert read.lines == (b"a",)
    aside = tmp_path / "aside"
    aside.write_bytes(b"b\nc\n")
    aside.replace(path)
    read = tail.read(BYTES)
    assert read.anew
    assert read.lines == (b"b", b"c")
    path.unlink()
    assert tail.read(BYTES).anew
    assert not tail.read(BYTES).anew


def test_a_file_that_is_not_there_yet(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "lines")
    assert tail.read(BYTES).lines == ()
    (tmp_path / "lines").write_bytes(b"one\n")
    assert tail.read(BYTES) == module.Lines((b"one",))
