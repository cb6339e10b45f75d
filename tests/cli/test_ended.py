"""What a run's folder tells when nobody runs it: its costs, of the summary or of the last step."""

from __future__ import annotations

import json
from pathlib import Path

from shoal.cli.ended import read_ended
from shoal.cli.status import _spent

PAID = {"usd": 12.0, "usd_idle": 3.0, "usd_lost_stale": 0.5, "usd_per_heldout_point": 0.25}


def test_the_costs_of_a_run_that_is_over(tmp_path: Path) -> None:
    assert read_ended(tmp_path).costs == {} and _spent({}) == ""
    lines = [{"kind": "step", "step": 1, "usd": 1.0, "usd_idle": 0.0}, {"kind": "step", "step": 2, **PAID}]
    cut = b'{"kind": "step", "st'
    (tmp_path / "metrics.jsonl").write_bytes("".join(json.dumps(line) + "\n" for line in lines).encode() + cut)
    found = read_ended(tmp_path)
    assert found.costs == PAID == found.as_json()["costs"]
    assert _spent(found.costs) == "12.00 $ so far, of that 3.00 idle, 0.50 stale; 0.25 $ a held-out point"
    summary = {**PAID, "usd": 13.0, "steps": 2, "usd_by_machine": {"ann": 13.0}}
    (tmp_path / "summary.json").write_text(json.dumps(summary, indent=1))
    assert read_ended(tmp_path).costs == {**PAID, "usd": 13.0}
    (tmp_path / "summary.json").write_text("[]")
    assert read_ended(tmp_path).costs == PAID
