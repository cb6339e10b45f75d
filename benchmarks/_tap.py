"""Runs a `shoal.lab.tap` before a Shoal router or coordinator, with that node's own identity.

    python _tap.py IDENTITY_FOLDER LISTEN_HOST LISTEN_PORT SERVER_HOST SERVER_PORT FOLDER

Prints `ready` once clients can connect, and ends at SIGTERM.
"""

from __future__ import annotations

import asyncio
import base64
import signal
import ssl
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from shoal.fabric.identity import Identity
from shoal.fabric.tls import listener_config, probe_context
from shoal.lab.tap import Tap


def server_context(identity: Identity) -> ssl.SSLContext:
    """What the listener that owns `identity` shows to those who connect."""
    settings = listener_config(identity)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    with TemporaryDirectory() as scratch:  # the standard library reads certificates and keys from files only
        certificate, key = Path(scratch) / "certificate", Path(scratch) / "private_key"
        for file in (certificate, key):
            file.touch(mode=0o600)
            file.write_bytes(base64.b64decode(settings[f"transport/link/tls/listen_{file.name}_base64"]))
        context.load_cert_chain(certificate, key)
    return context


async def tap(identity_folder: Path, listen: tuple[str, int], server: tuple[str, int], folder: Path) -> bool:
    """Relay until SIGTERM; whether all that went by was kept."""
    identity = Identity.load_or_create(identity_folder)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    contexts = server_context(identity), probe_context(identity.public_key)
    async with Tap(listen, server, *contexts, folder) as running:
        print("ready", flush=True)
        await stop.wait()
    return not running.overflowed


if __name__ == "__main__":
    identity_folder, listen_host, listen_port, server_host, server_port, folder = sys.argv[1:]
    kept = asyncio.run(
        tap(Path(identity_folder), (listen_host, int(listen_port)), (server_host, int(server_port)), Path(folder))
    )
    sys.exit(0 if kept else 1)
