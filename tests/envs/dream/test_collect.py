"""Collected episodes: whole, readable, continued, and changed by scripts that are exact on real pages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.cli.app import main
from shoal.envs.dream.collect import Collected, transitions
from shoal.envs.dream.edit import apply, diff
from shoal.envs.dream.script import read_script, write_script
from shoal.envs.web.browser import BrowserError, require_browser
from shoal.protocol.codec import read_jsonl

CONFIG = """
[envs.web]
type = "web"
settings = { tasks = ["shop/put_one", "forum/like", "miniwob/click-tab-2"], heldout = "instance" }
"""


@pytest.mark.timeout(300)
def test_collecting_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        require_browser()
    except BrowserError as error:
        pytest.skip(f"needs a browser: {error}")
    (tmp_path / "web.toml").write_text(CONFIG)
    out = tmp_path / "experts"
    command = ["dream", "collect", "--out", str(out), "--config", str(tmp_path / "web.toml"), "--json", "--episodes"]
    assert main([*command, "2"]) == 0
    first = (out / "episodes.jsonl").read_bytes()
    with (out / "episodes.jsonl").open("ab") as file:
        file.write(b'{"half a li')
    capsys.readouterr()
    assert main([*command, "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["episodes"], found["succeeded"], found["spoilt"]) == (3, 3, 0)
    assert (out / "episodes.jsonl").read_bytes().startswith(first)
    episodes = list(read_jsonl(out / "episodes.jsonl", Collected))
    assert len({one.id for one in episodes}) == 3
    for one in episodes:
        for move in transitions(one):
            script = diff(move.before, move.after)
            assert apply(read_script(write_script(script)), move.before) == move.after
    lines = [json.loads(line) for line in (out / "conversations.jsonl").read_text().splitlines()]
    assert [line["messages"][-1]["role"] for line in lines] == ["assistant"] * 3
    assert main([*command, "3", "--policy", "random"]) == 2
    assert "other settings" in capsys.readouterr().err
