"""`shoal lab` from outside: a network held by one command, used by another, and measured."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.lab import namespaces, tun

NETWORK = 'nodes = [{ name = "up1", up_mbps = 20, delay_ms = 12 }, { name = "up2", up_mbps = 10, nat = "cone" }]\n'

SHOAL = [sys.executable, "-m", "shoal.cli"]


@pytest.fixture
def network(tmp_path: Path) -> Path:
    file = tmp_path / "net.toml"
    file.write_text(NETWORK)
    return file


def shoal(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*SHOAL, *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.netns
@pytest.mark.skipif(bool(tun.missing()), reason=tun.missing() or "-")
def test_up_exec_and_ctrl_c(network: Path) -> None:
    with subprocess.Popen([*SHOAL, "lab", "up", network, "--json"], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        told = json.loads(holder.stdout.readline())
        try:
            names = [row["namespace"] for row in told["nodes"]]
            done = shoal(
                "lab", "exec", "up1", "--lab", told["pid"], "--", "ip", "-o", "-4", "addr", "show", "dev", "wan"
            )
            assert done.returncode == 0 and told["nodes"][0]["address"] in done.stdout, done
            assert shoal("lab", "exec", "up2", "--lab", told["pid"], "--", "sh", "-c", "exit 7").returncode == 7
        finally:
            holder.send_signal(signal.SIGINT)
        assert holder.wait(30) == 0
        assert not set(names) & set(namespaces.existing())


@pytest.mark.slow
@pytest.mark.netns
@pytest.mark.skipif(bool(tun.missing()), reason=tun.missing() or "-")
def test_measure_says_what_was_asked_and_seen(network: Path) -> None:
    done = shoal("lab", "measure", network, "--attempts", "1", "--json")
    paths = json.loads(done.stdout)["paths"]
    assert [(row["source"], row["target"], row["asked_mbps"]) for row in paths] == [
        ("up1", "up2", 20),
        ("up2", "up1", 10),
    ]
    assert done.returncode == (0 if all(row["within_5_percent"] for row in paths) else 1)
    assert all(row["mbps"] < row["asked_mbps"] * 1.05 and row["delay_ms"] > 11.9 for row in paths)


def test_errors_are_one_paragraph(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text('nodes = [{ name = "a", speed = 3 }]')
    for arguments, words in (
        (("up", file), "speed"),
        (("measure", tmp_path / "none.toml"), "cannot be read"),
        (("exec", "nowhere", "--", "true"), "No running lab has a node nowhere"),
        (("exec", "nowhere"), "no program to run"),
    ):
        done = shoal("lab", *arguments)
        assert done.returncode == 2 and words in " ".join(done.stderr.split()), done
        assert "Traceback" not in done.stderr
