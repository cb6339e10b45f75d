"""How often nodes tell of themselves: what one hears stays bounded, and nobody is forgotten before he tells again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.protocol.roster import MAX_TTL_S
from shoal.swarm.pace import DEFAULT_PACE, UNHURRIED_NODES, slowdown


@given(st.integers(0, 8192))
def test_what_a_node_hears_is_bounded_while_records_may_last_so_long(num_nodes: int) -> None:
    factor = slowdown(DEFAULT_PACE, num_nodes)
    refresh_s, ttl_s = DEFAULT_PACE.refresh_s * factor, DEFAULT_PACE.ttl_s * factor
    assert factor >= 1 and ttl_s <= MAX_TTL_S * (1 + 1e-9)
    assert refresh_s * 2 < ttl_s, "a record that is lost is told again in time"
    if ttl_s < MAX_TTL_S:
        assert num_nodes / refresh_s <= UNHURRIED_NODES / DEFAULT_PACE.refresh_s * (1 + 1e-9)
