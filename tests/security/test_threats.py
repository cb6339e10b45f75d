"""Every row of the threat table: its attack fails, and succeeds once the defence is gone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from threats import THREATS, Threat
from undefended import function_at

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent
PAGE = TESTS.parent / "docs" / "security.md"

TIMEOUT_S = 300.0
FAILED = 1
"""What pytest exits with when a test failed; other numbers mean that it could not run."""


def attack(threat: Threat, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a threat's test in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "slow or not slow"]
    return subprocess.run(
        [*command, threat.attack],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE / "removal"), str(HERE), *sys.path]), **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def test_rows_have_names_of_their_own_and_defences_that_are_there() -> None:
    assert len({threat.name for threat in THREATS}) == len(THREATS)
    for threat in THREATS:
        assert (TESTS / threat.attack.partition("::")[0]).is_file(), threat.attack
        for path, _ in threat.removed:
            function_at(path)


def test_the_page_has_every_row_with_its_test_and_no_other() -> None:
    table = PAGE.read_text(encoding="utf-8").partition("\n## Threats\n")[2].partition("\n## ")[0]
    written = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    assert written[1:] == [
        f"| {threat.name} | {threat.who} | {threat.gain} | {threat.defence} | `{threat.attack}` |" for threat in THREATS
    ]


@pytest.mark.slow
@pytest.mark.timeout(2 * TIMEOUT_S)
@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: threat.name.replace(" ", "-"))
def test_without_its_defence_an_attack_succeeds(threat: Threat) -> None:
    defended = attack(threat)
    assert defended.returncode == 0, defended.stdout[-3000:]
    if "skipped" in defended.stdout and "passed" not in defended.stdout:
        pytest.skip(defended.stdout.strip().splitlines()[-1])
    undefended = attack(threat, SHOAL_UNDEFENDED=threat.name)
    assert undefended.returncode == FAILED, undefended.stdout[-3000:]
