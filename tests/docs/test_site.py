"""The documentation is built without a warning, and its pages lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from documented import REPOSITORY, pages

sys.path.append(str(REPOSITORY / "docs" / "site"))

from build import navigation, stage

LINK = re.compile(r"!?\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_and_pictures_lead_to_files(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    wanted = [link for link in LINK.findall(text) if "://" not in link and not link.startswith("mailto:")]
    missing = [link for link in wanted if not (page.parent / link).exists()]
    assert not missing


def test_every_page_has_its_place_once(tmp_path: Path) -> None:
    stage(tmp_path / "docs")
    placed = [name for part in navigation(tmp_path / "docs" / "pages") for names in part.values() for name in names]
    assert len(placed) == len(set(placed))
    assert {str(path.relative_to(REPOSITORY)) for path in pages()} <= set(placed)
    assert {"reference/commands.md", "reference/engine.md"} <= set(placed)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_is_built_strictly(tmp_path: Path) -> None:
    build = [sys.executable, str(REPOSITORY / "docs" / "site" / "build.py"), str(tmp_path / "docs")]
    done = subprocess.run(build, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "docs" / "site"
    assert "Shoal" in (site / "index.html").read_text()
    assert "shoal train" in (site / "reference" / "commands" / "index.html").read_text()
    assert "max_staleness" in (site / "reference" / "config" / "index.html").read_text()
    for page in site.rglob("*.html"):
        assert not re.search(r'(?:src|href)="https?://fonts\.', page.read_text()), f"{page} fetches from elsewhere"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_link_to_nowhere_ends_the_build(tmp_path: Path) -> None:
    settings = stage(tmp_path / "docs")
    (tmp_path / "docs" / "pages" / "README.md").write_text("# Shoal\n\n[gone](docs/no_such_page.md)\n")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(settings)]
    done = subprocess.run(command, cwd=settings.parent, capture_output=True, text=True, timeout=500)
    assert done.returncode != 0 and "no_such_page" in done.stdout + done.stderr
