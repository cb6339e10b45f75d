"""`shoal plan`: a fleet file or flags in; table, JSON, pictures out; mistakes are explained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.cli.app import main

FLEET = """
[run]
rollouts_per_step = 64
train_s = 60
max_staleness = 2
rollout_s = 6
snapshot_mb = 300

[learner]
price_usd_per_hour = 10.0
uplink_mbps = 1000

[[workers]]
name = "cheap"
count = 12
rollouts_per_s = 0.1
price_usd_per_hour = 0.3

[[workers]]
name = "dear"
count = 12
rollouts_per_s = 0.1
price_usd_per_hour = 3.0

[colocated]
price_usd_per_hour = 10.0
rollouts_per_s = 1.0
"""


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    file = tmp_path / "fleet.toml"
    file.write_text(FLEET)
    return file


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_fleet_file(fleet: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = planned(capsys, str(fleet), "--staleness", "2", "--staleness", "0", "--plots", str(tmp_path / "plots"))
    pull, overlapped = said["plans"]
    assert (pull["max_staleness"], overlapped["max_staleness"]) == (0, 2)
    # 64/60 rollouts a second and 5 % more: 12 machines of 0.1, all of them cheap.
    assert overlapped["workers"] == {"cheap": 12} and overlapped["covered"] and overlapped["overlaps"]
    assert overlapped["utilisation"] == pytest.approx(1.0) and pull["utilisation"] < 0.5
    assert overlapped["usd_per_step"] == pytest.approx((10 + 12 * 0.3) * 60 / 3600)
    assert said["colocated"]["usd_per_step"] == pytest.approx(10 * 124 / 3600)
    assert [Path(p).read_bytes()[:4] for p in said["plots"]] == [b"\x89PNG"]


def test_flags_alone_and_options_over_a_file(fleet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = ["--rollouts-per-step", "128", "--train-s", "60", "--rollouts-per-s", "0.3", "--bcast-s", "18"]
    said = planned(capsys, *numbers, "--workers", "16", "--staleness", "6")
    assert said["plans"][0]["num_workers"] == 8 and said["colocated"] is None
    said = planned(capsys, str(fleet), "--rollouts-per-step", "6400", "--staleness", "2")
    assert not said["plans"][0]["covered"] and said["plans"][0]["num_workers"] == 24
    said = planned(capsys, str(fleet), "--staleness", "2", "--max-usd-per-hour", "11")
    assert said["plans"][0]["usd_per_hour"] <= 11


def test_the_table_says_what_idles_and_what_would_end_it(fleet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(fleet), "--rollouts-per-step", "32", "--bcast-s", "50", "--staleness", "1"]) == 0
    shown = capsys.readouterr().out
    assert "S = 2" in shown or "no number of workers" in shown or "rollouts/s" in shown
    assert main(["plan", str(fleet)]) == 0
    shown = capsys.readouterr().out
    assert "12 × cheap" in shown and "co-located fleet: 124.0 s" in shown


def test_simulated_beside_predicted(fleet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = planned(capsys, str(fleet), "--staleness", "3", "--simulate")
    simulated = said["simulated"][0]
    assert simulated["staleness_violations"] == 0
    assert simulated["utilisation"] == pytest.approx(said["plans"][0]["utilisation"], abs=0.05)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["needs three numbers", "--train-s"]),
        (["nowhere.toml"], ["nowhere.toml", "cannot be read"]),
        (["FLEET", "--rollouts-per-s", "3"], ["says what its workers are"]),
        (["FLEET", "--staleness", "65"], ["--staleness 65", "0 to 64"]),
        (["FLEET", "--max-usd-per-hour", "9"], ["does not even pay for the learner"]),
        (["FLEET", "--train-s", "-1"], ["run.train_s"]),
    ],
)
def test_mistakes(arguments: list[str], words: list[str], fleet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *(str(fleet) if a == "FLEET" else a for a in arguments)]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("prise = 3", ['there is no key "prise"']),
        ("billing = 'monthly'", ["workers.1.billing", "monthly"]),
        ("rollouts_per_s = 'x'", ["not valid TOML"]),
        ("name = 'cheap'\n", ["not valid TOML"]),
        ("[[workers]]\nname = 'cheap'\nrollouts_per_s = 1", ["share a name"]),
        ("[[workers]]\nname = 'z'\nrollouts_per_s = 1\ncount = 100000", ["more than 100000 machines"]),
    ],
)
def test_a_wrong_file(line: str, words: list[str], fleet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fleet.write_text(FLEET.replace("[colocated]", f"{line}\n[colocated]"))
    assert main(["plan", str(fleet)]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said


def test_no_torch() -> None:
    code = (
        "import sys; from shoal.cli.app import main; "
        "main('plan --rollouts-per-step 8 --train-s 9 --rollouts-per-s 1 --json'.split()); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=110).returncode == 0
