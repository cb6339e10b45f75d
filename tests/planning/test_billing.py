"""The ledger: a scripted bill by hand, random scripts against a slow reference, and the budget."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.planning.billing import Budget, Ledger


def test_a_scripted_bill() -> None:
    """By hand: 1.5 h of use at 2 $; 2 begun hours at 3 $, then one more; 2 GB at 0.09 $."""
    ledger = Ledger()
    ledger.add("use", 2.0, "per_use", usd_per_byte=0.09e-9)
    ledger.add("hour", 3.0, "per_hour")
    ledger.activate("use", 0.0)
    ledger.acquire("hour", 0.0)
    ledger.activate("hour", 1800.0)
    ledger.park("use", 3600.0)
    ledger.activate("use", 9000.0)
    ledger.park("use", 10800.0)
    ledger.park("hour", 4000.0)
    ledger.release("hour", 4500.0)
    ledger.sent("use", 2e9)
    assert ledger.usd(20_000.0) == pytest.approx(3.0 + 6.0 + 0.18)
    assert ledger.idle_usd(20_000.0) == pytest.approx(6.0 - 3.0 * 2200 / 3600)
    ledger.activate("hour", 20_000.0)
    assert ledger.usd(20_001.0) == pytest.approx(3.0 + 9.0 + 0.18), "a begun hour is paid at once"
    assert ledger.accounts["hour"].paid_hours_left(20_900.0) == pytest.approx(0.75)
    ledger.release("use", 20_001.0)
    ledger.add("use", 10.0, "per_use")
    assert ledger.usd(20_001.0) == pytest.approx(3.0 + 9.0 + 0.18), "a new price changes nothing that was"


@given(
    script=st.lists(
        st.tuples(st.sampled_from(("acquire", "activate", "park", "release", "lost")), st.floats(0, 5000)), max_size=30
    ),
    billing=st.sampled_from(("per_use", "per_hour")),
)
def test_random_scripts_cost_what_a_slow_reference_says(script: list[tuple[str, float]], billing: str) -> None:
    ledger = Ledger()
    ledger.add("m", 3.6, "per_use" if billing == "per_use" else "per_hour")
    now, spent, history = 0.0, 0.0, []
    for act, seconds in script:
        history.append((now, act))
        getattr(ledger, act)("m", now)
        now += seconds
        assert ledger.usd(now) >= spent - 1e-9, "dollars never fall"
        spent = ledger.usd(now)
        assert -1e-9 <= ledger.idle_usd(now) <= spent + 1e-9
    ours, active, held_since, used, hours, paid_until = False, False, 0.0, 0.0, 0, -1.0
    for (start, act), end in zip(history, [*(t for t, _ in history[1:]), now], strict=False):
        if act in ("acquire", "activate") and not ours:
            ours = True
            if start < paid_until:
                hours -= math.ceil((paid_until - held_since) / 3600 - 1e-9)  # it goes on in the hour that it left
            else:
                held_since = start
            paid_until = -1.0
        if act in ("release", "lost") and ours:
            begun = max(1, math.ceil((start - held_since) / 3600))
            ours, hours = False, hours + begun
            paid_until = held_since + 3600 * begun if act == "lost" else -1.0
        active = act == "activate" or (active and act == "acquire")
        used += (end - start) * active
    hours += max(1, math.ceil((now - held_since) / 3600)) if ours else 0
    assert spent == pytest.approx(3.6 * used / 3600 if billing == "per_use" else 3.6 * hours)


def test_a_machine_that_was_lost_goes_on_in_its_paid_hour() -> None:
    ledger = Ledger()
    ledger.add("m", 3.0, "per_hour")
    ledger.activate("m", 0.0)
    ledger.lost("m", 600.0)
    ledger.add("m", 3.0, "per_hour")
    ledger.activate("m", 660.0)
    assert ledger.usd(661.0) == ledger.usd(3599.0) == pytest.approx(3.0), "one hour is one hour"
    assert ledger.accounts["m"].paid_hours_left(1800.0) == pytest.approx(0.5)
    assert ledger.usd(3601.0) == pytest.approx(6.0)
    ledger.lost("m", 3700.0)
    ledger.activate("m", 7300.0)
    assert ledger.usd(7301.0) == pytest.approx(9.0), "after the paid hour it is another"
    ledger.lost("m", 7400.0)
    ledger.add("m", 4.0, "per_hour")
    ledger.activate("m", 7500.0)
    assert ledger.usd(7501.0) == pytest.approx(13.0), "and so it is at another price"
    ledger.release("m", 7600.0)
    ledger.activate("m", 7700.0)
    assert ledger.usd(7701.0) == pytest.approx(17.0), "what was given back is rented anew"


def test_a_budget_leaves_enough_to_end_in_order() -> None:
    budget = Budget(max_usd=10.0)
    assert budget.verdict(9.0, 3.6, 900.0) == "run"
    assert budget.verdict(9.2, 3.6, 900.0) == "drain", "a quarter of an hour at 3.60 is 0.90"
    assert Budget().verdict(1e9, 1e3, 1e6) == "run"
