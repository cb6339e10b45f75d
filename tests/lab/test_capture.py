"""Captures: what a packet file holds, how large it may become, and that a lab's captures hold what passed."""

from __future__ import annotations

import struct
import sys
import time
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import ConfigError
from shoal.lab.capture import FILE_HEADER, PACKET_HEADER, PacketFile
from shoal.lab.network import Network, Node
from shoal.lab.packet import packet_lab

PORT = 4300


def read(path: Path) -> list[tuple[float, bytes]]:
    """Packets with their times, by the format's description (draft-ietf-opsawg-pcap)."""
    data = path.read_bytes()
    magic, major, minor, _, _, snap, link = struct.unpack_from("<IHHiIII", data)
    assert (magic, major, minor, link) == (0xA1B2C3D4, 2, 4, 101)
    packets, at = [], 24
    while at < len(data):
        seconds, microseconds, kept, length = struct.unpack_from("<IIII", data, at)
        assert kept == length <= snap and microseconds < 1_000_000
        packets.append((seconds + microseconds / 1e6, data[at + 16 : at + 16 + kept]))
        at += 16 + kept
    assert at == len(data)
    return packets


@given(packets=st.lists(st.binary(min_size=1, max_size=60), max_size=8), max_bytes=st.integers(24, 400))
def test_a_file_holds_a_prefix_within_its_bound(
    tmp_path_factory: pytest.TempPathFactory, packets: list[bytes], max_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("capture") / "node.pcap"
    file = PacketFile(path, max_bytes=max_bytes)
    for number, packet in enumerate(packets):
        file.write(packet, 1_700_000_000.25 + number)
    file.close()
    kept = read(path)
    assert kept == [(1_700_000_000.25 + n, packet) for n, packet in enumerate(packets[: len(kept)])]
    assert file.omitted_packets == len(packets) - len(kept)
    assert path.stat().st_size <= max_bytes
    needed = FILE_HEADER.size + sum(PACKET_HEADER.size + len(packet) for packet in packets)
    assert (len(kept) == len(packets)) == (needed <= max_bytes)


def test_a_full_disk_ends_the_capture_alone(tmp_path: Path) -> None:
    full = tmp_path / "node.pcap"
    full.symlink_to("/dev/full")
    file = PacketFile(full)
    for _ in range(100):
        file.write(bytes(5000), 0.0)
    file.close()
    assert file.omitted_packets >= 90


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="capture"):
        PacketFile(tmp_path / "file" / "node.pcap")


@pytest.mark.netns
async def test_a_lab_captures_at_every_node(tmp_path: Path) -> None:
    """A datagram through a NAT: before it with the private address, behind it with the public one."""
    network = Network(nodes=(Node(name="hub"), Node(name="home", nat="cone"), Node(name="third")))
    begun = time.time()
    async with packet_lab(network, capture=tmp_path / "packets") as lab:
        serve = (
            f"import socket;s=socket.socket(type=socket.SOCK_DGRAM);s.bind(('{lab.address('hub')}',{PORT}));"
            "print('up',flush=True);d,a=s.recvfrom(99);s.sendto(d[::-1],a)"
        )
        ask = (
            "import socket;s=socket.socket(type=socket.SOCK_DGRAM);s.settimeout(10);"
            f"s.sendto(b'a planted text',('{lab.address('hub')}',{PORT}));print(s.recv(99).decode())"
        )
        server = await lab.run("hub", [sys.executable, "-c", serve], stdout=PIPE)
        assert server.stdout is not None and await server.stdout.readline() == b"up\n"
        client = await lab.run("home", [sys.executable, "-c", ask], stdout=PIPE)
        assert (await client.communicate())[0] == b"txet detnalp a\n"
        addresses = {name: lab.address(name) for name in ("hub", "home")} | {"public": lab.public_address("home")}
        assert (await lab.statistics()).uncaptured_packets == 0
    for node, other in (("hub", "public"), ("home", "home")):
        sent, answered = [
            (at, packet)
            for at, packet in read(tmp_path / "packets" / f"{node}.pcap")
            if packet.endswith((b"a planted text", b"txet detnalp a"))
        ]
        assert [dotted(part) for part in (sent[1][12:16], sent[1][16:20])] == [addresses[other], addresses["hub"]]
        assert [dotted(answered[1][n : n + 4]) for n in (12, 16)] == [addresses["hub"], addresses[other]]
        assert begun - 1 < sent[0] < answered[0] + 1 < time.time() + 2
    assert read(tmp_path / "packets" / "third.pcap") == []


def dotted(address: bytes) -> str:
    return ".".join(map(str, address))
