"""Tries to connect straight to every node of a packet lab that stands behind a NAT."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE, Process

from shoal.errors import RunError
from shoal.lab.packet import PacketLab

PORT = 4400
WAIT_S = 1.0
"""A connection that takes longer counts as not made."""

START_S = 120.0

SERVE = """
import socket, sys
server = socket.create_server(("0.0.0.0", int(sys.argv[1])))
print("ready", flush=True)
while True:
    server.accept()[0].close()
"""

ASK = f"""
import concurrent.futures, socket, sys
def reaches(address):
    try:
        socket.create_connection((address, int(sys.argv[1])), {WAIT_S}).close()
    except OSError:
        return False
    return True
with concurrent.futures.ThreadPoolExecutor(32) as pool:
    print(sum(pool.map(reaches, sys.argv[2:])), flush=True)
"""


async def inbound_connections(lab: PacketLab) -> int:
    """How many attempts come through, from every node to every other one behind a NAT: none should.

    Raises:
        RunError: the nodes in public are not reached either, so the attempts show nothing.
    """
    hidden = {node.name for node in lab.network.nodes if node.nat != "none"}
    nodes = [node.name for node in lab.network.nodes]
    public = [lab.address(name) for name in nodes if name not in hidden]
    servers = [await _start(lab, name, SERVE) for name in nodes]
    try:
        for server in servers:
            await _said(server)
        num_made = 0
        for source in nodes:
            others = [name for name in hidden if name != source]
            addresses = [address(name) for name in others for address in (lab.address, lab.public_address)]
            num_made += await _reached(lab, source, addresses)
            if source in hidden and await _reached(lab, source, public) < len(public):
                raise RunError(f"{source} does not reach the nodes in public.", "Is the machine too busy?")
        return num_made
    finally:
        for server in servers:
            server.kill()


async def _reached(lab: PacketLab, source: str, addresses: list[str]) -> int:
    return int(await _said(await _start(lab, source, ASK, *addresses)))


async def _start(lab: PacketLab, node: str, code: str, *arguments: str) -> Process:
    return await lab.run(node, [sys.executable, "-c", code, str(PORT), *arguments], stdout=PIPE)


async def _said(process: Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(START_S):
        return (await process.stdout.readline()).decode()
