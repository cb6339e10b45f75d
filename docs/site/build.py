"""Builds the documentation: `python docs/site/build.py [FOLDER]`, by default into build/docs/site.

The repository's own pages are copied as they lie, so that links between them, and into configs/ and deploy/, mean the
same on the site as in the checkout; the reference is written beside them; then Zensical builds the whole strictly: a
link, anchor or name in a docstring that leads nowhere ends it with an error.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from reference import command_line, rooms

REPOSITORY = Path(__file__).parents[2]

COPIED = ("README.md", "CONTRIBUTING.md", "LICENSE", "docs", "deploy", "configs")
NO_PAGES = shutil.ignore_patterns("site", "__pycache__", "*.py")

NAVIGATION: dict[str, tuple[str, ...]] = {
    "Start": ("README.md", "docs/first_hour.md", "docs/howto/python.md", "docs/troubleshooting.md"),
    "Concepts": ("docs/flows.md", "docs/staleness.md", "docs/trust.md", "docs/security.md"),
    "Systems": (
        "docs/training.md",
        "docs/capacity.md",
        "docs/broadcast.md",
        "docs/speculation.md",
        "docs/memory.md",
        "docs/collective.md",
        "docs/agents.md",
        "docs/web.md",
        "docs/dreams.md",
        "docs/evm.md",
    ),
    "How to": ("docs/environments.md", "docs/capture.md", "docs/finetuning.md", "docs/serving.md", "deploy/README.md"),
    "Decisions": ("docs/decisions/README.md",),
    "What was tried": ("docs/log.md",),
}
"""What is not named here is put where its folder says, else under "More"."""

TIMEOUT_S = 600


def stage(folder: Path) -> Path:
    """Copy and write all pages into `folder`, made anew; gives the settings' file."""
    shutil.rmtree(folder, ignore_errors=True)
    pages = folder / "pages"
    pages.mkdir(parents=True)
    for name in COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, pages / name, ignore=NO_PAGES)
        else:
            shutil.copy(source, pages / name)
    reference = pages / "reference"
    reference.mkdir()
    for name, content in {"commands.md": command_line(), **rooms()}.items():
        (reference / name).write_text(content, encoding="utf-8")
    settings: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "mkdocs.yml").read_text())
    settings |= {"docs_dir": "pages", "site_dir": "site", "nav": navigation(pages)}
    (python,) = [one["mkdocstrings"]["handlers"]["python"] for one in settings["plugins"] if isinstance(one, dict)]
    python["paths"] = [str(REPOSITORY / "src")]
    file = folder / "mkdocs.yml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    return file


def navigation(pages: Path) -> list[dict[str, Any]]:
    """Every page at its place; raises `FileNotFoundError` where one that is named is not there."""
    found: dict[str, list[str]] = {}
    for title, names in NAVIGATION.items():
        for name in names:
            if not (pages / name).is_file():
                raise FileNotFoundError(f"docs/site/build.py names {name}, which is not there")
        found[title] = list(names)
    placed = {name for names in NAVIGATION.values() for name in names}
    by_folder = {"docs/howto/": "How to", "docs/decisions/": "Decisions", "reference/": "Reference"}
    for path in sorted(pages.rglob("*.md")):
        name = path.relative_to(pages).as_posix()
        if name not in placed:
            title = next((title for start, title in by_folder.items() if name.startswith(start)), "More")
            found.setdefault(title, []).append(name)
    return [{title: names} for title, names in found.items()]


def main() -> int:
    """Build; the exit code is Zensical's."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else REPOSITORY / "build" / "docs").resolve()
    settings = stage(folder)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(settings)]
    done = subprocess.run(command, cwd=folder, timeout=TIMEOUT_S, check=False)
    if done.returncode == 0:
        print(f"the documentation is in {folder / 'site' / 'index.html'}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
