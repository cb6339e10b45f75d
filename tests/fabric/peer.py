"""A node in a process of its own, for tests that stop, kill or isolate it.

python peer.py listen [HOST]      prints its ticket, serves, until its standard input closes
python peer.py connect TICKET     prints its node id, serves, until its standard input closes
python peer.py ask TICKET KEY     asks once and prints the answer, or the error
python peer.py gone TICKET        connects, asks, and ends without closing anything
"""

from __future__ import annotations

import asyncio
import sys

from shoal.errors import CapacityError, ShoalError
from shoal.fabric.fabric import Fabric
from shoal.fabric.identity import Identity
from shoal.fabric.service import Request
from shoal.fabric.ticket import Ticket


async def until_stdin_closes() -> None:
    await asyncio.to_thread(sys.stdin.read)


async def echo(request: Request) -> bytes:
    return request.body


async def size(request: Request) -> bytes:
    return bytes(int(request.body))


async def no(request: Request) -> bytes:
    raise CapacityError("it does not fit.", "Bring less.")


async def hog(fabric: Fabric) -> None:
    while True:
        try:
            await fabric.request("size", b"%d" % 2**23, 60.0)
        except ShoalError:
            return


async def main(command: str, *args: str) -> None:
    identity = Identity.generate()
    if command == "listen":
        fabric = await Fabric.listen(identity, *args)
        prefix, greeting = "", fabric.ticket("a run", b"s" * 16).encode()
    else:
        fabric = await Fabric.connect(identity, Ticket.decode(args[0]))
        prefix, greeting = f"{identity.node_id}/", identity.node_id
    if command == "hog":
        print("hogging", flush=True)
        await asyncio.gather(*(hog(fabric) for _ in range(80)))
    elif command in ("ask", "gone"):
        try:
            answer = await fabric.request(args[1] if command == "ask" else "echo", b"from afar", 5.0)
            print("answer", answer.decode(), flush=True)
        except ShoalError as error:
            print("error", type(error).__name__, error, flush=True)
        if command == "gone":
            return
    else:
        for name, handler in {"echo": echo, "size": size, "no": no}.items():
            await fabric.serve(prefix + name, handler)
        await fabric.declare_alive()
        print(greeting, flush=True)
        await until_stdin_closes()
    await fabric.close()


try:
    asyncio.run(main(*sys.argv[1:]))
except ShoalError as error:
    print("error", type(error).__name__, error, flush=True)
    sys.exit(1)
