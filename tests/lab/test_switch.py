"""The switch in simulated time: nothing vanishes uncounted, calls may be late, cuts and NATs hold, seeds repeat."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packets import UDP, ends, packet

from shoal.lab.network import Network, Node, Path
from shoal.lab.statistics import Statistics
from shoal.lab.switch import Switch

SHAPED = Network(
    nodes=(
        Node(name="a", up_mbps=1, down_mbps=2, delay_ms=10, jitter_ms=3, loss=0.1, duplicate=0.1, queue_bytes=6000),
        Node(name="b", up_mbps=3, down_mbps=0.5, delay_ms=5, reorder=0.2, queue_bytes=4500),
        Node(name="c"),
    ),
    paths=(Path(source="a", target="c", delay_ms=20),),
    seed=4,
)
NAMES = "abc"

traffic = st.lists(
    st.tuples(st.floats(0, 0.01), st.integers(0, 2), st.integers(0, 2), st.integers(0, 1400)), max_size=120
)
"""Time since the packet before, source, target, payload size."""


def address(place: int) -> str:
    return SHAPED.public_address(NAMES[place])


def run(
    switch: Switch, flow: list[tuple[float, int, int, int]], step_s: float
) -> tuple[dict[int, list[int]], Statistics]:
    """Feed the traffic, releasing each `step_s`; serial numbers that each node got, in order."""
    now, got = 0.0, {0: list[int](), 1: list[int](), 2: list[int]()}
    released = 0.0

    def release(until: float) -> None:
        for place, data in switch.release(until):
            got[place].append(int.from_bytes(data[4:6]))

    for serial, (gap, source, target, size) in enumerate(flow):
        now += gap
        while released + step_s <= now:
            released += step_s
            release(released)
        switch.receive(source, packet(address(source), address(target), payload=b"x" * size, ident=serial), now)
    release(now + 60.0)
    assert switch.num_pending == 0 and switch.next_s is None
    return got, switch.statistics()


@given(traffic)
def test_every_packet_is_delivered_or_counted_once(flow: list[tuple[float, int, int, int]]) -> None:
    got, counted = run(Switch(SHAPED), flow, 0.005)
    lost = sum(way.lost_packets for way in counted.ways)
    doubled = sum(way.duplicated_packets for way in counted.ways)
    dropped = sum(node.up.dropped_packets + node.down.dropped_packets for node in counted.nodes.values())
    delivered = sum(len(serials) for serials in got.values())
    assert delivered + lost + dropped + counted.unroutable_packets == len(flow) + doubled
    assert counted.unroutable_packets == sum(source == target for _, source, target, _ in flow)


@given(traffic, st.floats(0.0005, 1.0))
def test_late_calls_change_nothing(flow: list[tuple[float, int, int, int]], step_s: float) -> None:
    assert run(Switch(SHAPED), flow, 0.0002) == run(Switch(SHAPED), flow, step_s)


def test_delay_and_rates_of_one_packet() -> None:
    network = Network(nodes=(Node(name="a", up_mbps=8, delay_ms=10), Node(name="b", down_mbps=4, delay_ms=5)))
    switch = Switch(network)
    switch.receive(0, packet("10.77.0.1", "10.77.0.2", payload=b"x" * 972), 1.0)  # 1000 bytes: 1 ms up, 2 ms down
    assert switch.release(1.0179) == []
    assert len(switch.release(1.0181)) == 1


def test_flows_share_a_link() -> None:
    network = Network(nodes=(Node(name="a", up_mbps=8), Node(name="b"), Node(name="c")))
    switch = Switch(network)
    for _ in range(50):
        for target in (2, 3):
            switch.receive(0, packet("10.77.0.1", f"10.77.0.{target}", payload=b"x" * 972), 0.0)
    for count in (10, 40, 90):
        assert len(switch.release(count / 1000 + 1e-9)) == {10: 10, 40: 30, 90: 50}[count]


def test_cuts_take_what_is_under_way_and_heal() -> None:
    network = Network(nodes=(Node(name="a", delay_ms=10), Node(name="b", delay_ms=10), Node(name="c")))
    switch = Switch(network)

    def send(source: int, target: int, now: float) -> None:
        switch.receive(source, packet(f"10.77.0.{source + 1}", f"10.77.0.{target + 1}"), now)

    send(0, 1, 0.0)
    switch.set_cuts([(0, 1)])
    send(0, 1, 0.001)
    send(1, 0, 0.001)
    send(0, 2, 0.001)
    assert sorted(place for place, _ in switch.release(1.0)) == [0, 2]
    assert [way.cut_packets for way in switch.statistics().ways if (way.source, way.target) == ("a", "b")] == [2]
    switch.set_cuts([])
    send(0, 1, 2.0)
    assert [place for place, _ in switch.release(3.0)] == [1]


def test_two_homes_reach_the_router_but_not_each_other() -> None:
    network = Network(nodes=(Node(name="r"), Node(name="x", nat="cone"), Node(name="y", nat="symmetric")))
    switch = Switch(network)
    router, x, y = "10.77.0.1", "192.168.2.2", "192.168.3.2"
    switch.receive(1, packet(x, router, UDP, (5, 80)), 0.0)
    switch.receive(2, packet(y, router, UDP, (5, 80)), 0.0)
    arrived = [ends(data) for _, data in switch.release(0.1)]
    assert {end[0] for end in arrived} == {"10.77.0.2", "10.77.0.3"}
    for source, _, port, _ in arrived:
        switch.receive(0, packet(router, source, UDP, (80, port)), 0.2)
    back = switch.release(0.3)
    assert [(place, ends(data)) for place, data in back] == [(1, (router, x, 80, 5)), (2, (router, y, 80, 5))]
    switch.receive(1, packet(x, "10.77.0.3", UDP, (5, 5)), 0.4)
    switch.receive(1, packet(x, y, UDP, (5, 5)), 0.4)  # a private address leads nowhere
    assert switch.release(0.5) == []
    counted = switch.statistics()
    assert counted.nodes["y"].nat_refused_packets == 1 and counted.unroutable_packets == 1
    switch.forget_sessions(1)
    switch.receive(0, packet(router, "10.77.0.2", UDP, (80, 5)), 0.6)
    assert switch.release(0.7) == []


@pytest.mark.parametrize("data", [b"", b"\x45", b"\x60" + b"\0" * 60, packet("10.77.0.1", "224.0.0.251")])
def test_what_is_not_for_a_node_is_dropped_and_counted(data: bytes) -> None:
    switch = Switch(SHAPED)
    switch.receive(0, data, 0.0)
    assert switch.release(9.0) == [] and switch.statistics().unroutable_packets == 1
