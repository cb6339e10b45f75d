"""The public layout of GAIA: `metadata.jsonl`, one question a line, and the files that questions come with beside it.

    {"task_id": "…", "Question": "…", "Level": 1, "Final answer": "…", "file_name": "table.xlsx"}

Other keys (`Annotator Metadata`) are ignored. A set without answers (`"?"`, as the benchmark's own test set has it) can
be answered and not scored. A question that needs several files has them in one `.zip`.

Invariants: a file's name leads nowhere but into the set's folder; what is unpacked is bounded and stays in its folder.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from shoal.errors import ConfigError, StorageError

METADATA = "metadata.jsonl"
SPLITS = ("", "validation", "test", "2023/validation", "2023/test")
"""Where the file is looked for below the folder that is named."""

MAX_QUESTIONS = 100_000
MAX_LINE_BYTES = 4 * 2**20
MAX_UNPACKED_FILES = 1000
MAX_UNPACKED_BYTES = 512 * 2**20
UNKNOWN = "?"
"""In place of an answer that is not published."""


@dataclass(frozen=True)
class Asked:
    """One question."""

    id: str
    question: str
    level: int
    answer: str
    """Empty where it is not known."""
    file: Path | None
    """What it comes with."""


class _Line(msgspec.Struct):
    task_id: str
    question: str = msgspec.field(name="Question")
    level: int | str = msgspec.field(name="Level")
    answer: Any = msgspec.field(name="Final answer", default="")
    file_name: str | None = ""


def read(folder: Path) -> list[Asked]:
    """The questions of a folder, in their order.

    Raises:
        ConfigError: there is no `metadata.jsonl`, a line is malformed, or a file is missing.
    """
    path = next((found for split in SPLITS if (found := folder / split / METADATA).is_file()), None)
    if path is None:
        raise ConfigError(f"there is no {METADATA} in {folder}.", "Name the folder of the set with --data.")
    asked: list[Asked] = []
    seen: set[str] = set()
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            one = _asked(path, number, line)
            if one.id in seen or len(asked) == MAX_QUESTIONS:
                raise ConfigError(f"{path}, line {number}: {one.id!r} is there twice, or there are too many questions.")
            seen.add(one.id)
            asked.append(one)
    return asked


def _asked(path: Path, number: int, line: bytes) -> Asked:
    where = f"{path}, line {number}"
    try:
        if len(line) > MAX_LINE_BYTES:
            raise ValueError("it is too long")
        found = msgspec.json.decode(line, type=_Line)
        level = int(found.level)
        if not found.task_id or not 1 <= level <= 9:
            raise ValueError("its task_id is empty, or its Level is not between 1 and 9")
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {error}.", "Each line is an object with task_id, Question and Level.") from None
    file = None
    if found.file_name:
        file = path.parent / found.file_name
        if Path(found.file_name).name != found.file_name or not file.is_file():
            raise ConfigError(f"{where}: there is no file {found.file_name!r} beside it.")
    answer = "" if found.answer in (None, UNKNOWN) else str(found.answer)
    return Asked(found.task_id, found.question, level, answer, file)


def write(folder: Path, questions: Iterable[tuple[Asked, Sequence[Path]]]) -> None:
    """Write questions in this layout; several files of one question become a `.zip`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / METADATA).open("wb") as lines:
        for asked, files in questions:
            name = ""
            if len(files) == 1:
                name = f"{asked.id}{files[0].suffix}"
                shutil.copyfile(files[0], folder / name)
            elif files:
                name = f"{asked.id}.zip"
                with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
                    for file in files:
                        archive.write(file, file.name)
            line = {
                "task_id": asked.id,
                "Question": asked.question,
                "Level": asked.level,
                "Final answer": asked.answer or UNKNOWN,
                "file_name": name,
            }
            lines.write(msgspec.json.encode(line) + b"\n")


def lay_out(asked: Asked, folder: Path) -> list[str]:
    """Put what a question comes with into a folder of its own; gives the files' names.

    Raises:
        StorageError: an archive is damaged, too large, or its names lead out of the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if asked.file is None:
        return []
    if asked.file.suffix.lower() != ".zip":
        shutil.copyfile(asked.file, folder / asked.file.name)
        return [asked.file.name]
    try:
        with zipfile.ZipFile(asked.file) as archive:
            return [_unpack(archive, entry, folder) for entry in _bounded(archive, asked.file)]
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError) as error:
        raise StorageError(f"{asked.file} cannot be unpacked: {error}.", "Fetch the set again.") from None


def _bounded(archive: zipfile.ZipFile, file: Path) -> list[zipfile.ZipInfo]:
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    size = sum(entry.file_size for entry in entries)
    if len(entries) > MAX_UNPACKED_FILES or size > MAX_UNPACKED_BYTES:
        raise StorageError(f"{file} holds {len(entries)} files of {size} bytes: more than is unpacked.")
    return entries


def _unpack(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, folder: Path) -> str:
    place = (folder / entry.filename).resolve()
    if not place.is_relative_to(folder.resolve()):
        raise StorageError(f"{entry.filename!r} leads out of its archive.", "Do not use this set.")
    place.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(entry) as source, place.open("wb") as target:
        left = entry.file_size  # What the archive says; what it holds may be more.
        while left > 0 and (data := source.read(min(left, 1 << 20))):
            target.write(data)
            left -= len(data)
    return str(place.relative_to(folder.resolve()))
