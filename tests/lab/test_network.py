"""The description: what is read from TOML, what is refused and how, how impairments add up."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path as FilePath

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import ConfigError
from shoal.lab.cuts import Cuts
from shoal.lab.network import Cut, Heal, Isolate, Network, Node, Partition, Path, load_network

GOOD = """
seed = 7
nodes = [
    { name = "router", up_mbps = 100, down_mbps = 100, delay_ms = 1 },
    { name = "home", up_mbps = 20, delay_ms = 15, jitter_ms = 2, loss = 0.1, nat = "cone" },
    { name = "far" },
]
paths = [{ source = "home", target = "far", delay_ms = 40, loss = 0.5, one_way = true }]
events = [
    { at_s = 3, action = "isolate", node = "router" },
    { at_s = 1.5, action = "partition", groups = [["home"], ["far", "router"]] },
    { at_s = 2, action = "cut", source = "home", target = "far", one_way = true },
    { at_s = 4, action = "heal" },
]
"""


def written(folder: FilePath, text: str) -> FilePath:
    file = folder / "net.toml"
    file.write_text(text)
    return file


def test_file_is_read(tmp_path: FilePath) -> None:
    network = load_network(written(tmp_path, GOOD))
    assert [type(event) for event in network.events] == [Isolate, Partition, Cut, Heal]
    assert network.nodes[1] == Node(name="home", up_mbps=20, delay_ms=15, jitter_ms=2, loss=0.1, nat="cone")
    assert msgspec.json.decode(msgspec.json.encode(network), type=Network) == network


def test_impairments_add_up(tmp_path: FilePath) -> None:
    network = load_network(written(tmp_path, GOOD))
    there, back = network.impairment("home", "far"), network.impairment("far", "home")
    assert there.delay_s == pytest.approx(0.055) and back.delay_s == pytest.approx(0.015)
    assert there.loss == pytest.approx(0.55) and back.loss == pytest.approx(0.1)
    assert network.impairment("home", "router").delay_s == pytest.approx(0.016)


def test_addresses_differ_and_private_ones_are_behind_nats(tmp_path: FilePath) -> None:
    network = load_network(written(tmp_path, GOOD))
    assert network.address("router") == network.public_address("router")
    assert network.address("home").startswith("192.168.") and network.public_address("home").startswith("10.77.")
    assert len({network.public_address(node.name) for node in network.nodes}) == 3


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name = "far"', 'name = "home"', "Two nodes are called home"),
        ('name = "far"', 'name = "Far_1"', "cannot be called 'Far_1'"),
        ('name = "far"', 'name = "far", speed = 3', "speed"),
        ('name = "far"', 'name = "far", up_mbps = 0', "up_mbps of node far is 0"),
        ('name = "far"', 'name = "far", up_mbps = nan', "up_mbps of node far is nan"),
        ('name = "far"', 'name = "far", loss = 1.5', "loss of node far is 1.5"),
        ('name = "far"', 'name = "far", delay_ms = -1', "delay_ms of node far is -1"),
        ('name = "far"', 'name = "far", jitter_ms = 1', "jitter_ms of node far is above its delay_ms"),
        ('name = "far"', 'name = "far", queue_bytes = 800', "less than one packet"),
        ('name = "far"', 'name = "far", nat = "carrier"', "carrier"),
        ("seed = 7", "mtu = 100", "mtu is 100"),
        ("seed = 7", "tick_ms = 50", "tick_ms is 50"),
        ("seed = 7", 'seed = "x"', "Expected `int`"),
        ('target = "far", delay', 'target = "moon", delay', "A path names 'moon'"),
        ('target = "far", delay', 'target = "home", delay', "to itself"),
        ('node = "router"', 'node = "sun"', "An event names 'sun'"),
        ("at_s = 4", "at_s = -4", "An event is at -4"),
        ('action = "heal"', 'action = "mend"', "mend"),
        ('["far", "router"]', '["far", "home"]', "two groups"),
        ("nodes = [", "nodes = ", "is not TOML"),
    ],
)
def test_refusals_name_what_is_wrong(tmp_path: FilePath, old: str, new: str, words: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_network(written(tmp_path, GOOD.replace(old, new, 1)))


def test_missing_file_and_double_path() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_network(FilePath("/nowhere/net.toml"))
    nodes = (Node(name="a"), Node(name="b"))
    with pytest.raises(ConfigError, match="described twice"):
        Network(nodes=nodes, paths=(Path(source="a", target="b"), Path(source="b", target="a", one_way=True)))


def test_default_queue_follows_the_rate() -> None:
    network = Network(nodes=(Node(name="a", up_mbps=100, down_mbps=0.1),))
    assert network.queue_bytes(network.nodes[0], 100) == 1_250_000
    assert network.queue_bytes(network.nodes[0], 0.1) == 32 * 1500


def test_the_documented_network_is_valid(repository: FilePath, tmp_path: FilePath) -> None:
    blocks = re.findall(r"```toml\n(.*?)```", (repository / "docs" / "lab.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        assert tomllib.loads(block)
        load_network(written(tmp_path, block))


NAMES = ["a", "b", "c", "d"]
NETWORK = Network(nodes=tuple(Node(name=name) for name in NAMES))
some = st.sampled_from(NAMES)
events = st.one_of(
    st.builds(Cut, source=some, target=some, one_way=st.booleans()),
    st.builds(Isolate, node=some),
    st.permutations(NAMES).map(lambda names: Partition(groups=(tuple(names[:2]), tuple(names[2:3])))),
)


@given(st.lists(events, max_size=5), events)
def test_cuts_accumulate_and_heal(before: list[Cut | Isolate | Partition], last: Cut | Isolate | Partition) -> None:
    cuts = Cuts(NETWORK)
    for event in before:
        cuts.apply(event)
    earlier = set(cuts.blocked)
    cuts.apply(last)
    assert earlier <= cuts.blocked
    match last:
        case Cut(source=source, target=target, one_way=one_way):
            added = {(source, target)} | (set() if one_way else {(target, source)})
        case Isolate(node=node):
            added = {pair for pair in cuts.blocked if node in pair}
            assert len({*added, (node, node)}) >= 2 * (len(NAMES) - 1)
        case Partition(groups=(left, right)):
            added = {(a, b) for a in left for b in right} | {(b, a) for a in left for b in right}
    assert cuts.blocked == earlier | added
    assert all(
        NAMES[a] != NAMES[b] or isinstance(last, Cut) or (NAMES[a], NAMES[b]) in earlier for a, b in cuts.pairs()
    )
    cuts.apply(Heal())
    assert not cuts.blocked and not cuts.pairs()


def test_cutting_a_stranger_changes_nothing() -> None:
    cuts = Cuts(NETWORK)
    with pytest.raises(ConfigError, match="'z'"):
        cuts.apply(Isolate(node="z"))
    assert not cuts.blocked
